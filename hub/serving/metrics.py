"""What `/metrics` tells Prometheus: requests, batches and the queue."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("notellm2_requests", "Answered requests.", ("route", "status"), registry=registry)
        self._seconds = Histogram(
            "notellm2_request_seconds", "From a request's body to its answer.", ("route",), registry=registry
        )
        self._items = Counter("notellm2_items", "Items that were encoded.", registry=registry)
        self._tokens = Counter("notellm2_tokens", "Tokens that were encoded, without padding.", registry=registry)
        self._batch_items = Histogram("notellm2_batch_items", "Items of a batch.", buckets=SIZES, registry=registry)
        self._batch_seconds = Histogram("notellm2_batch_seconds", "Of the model, for a batch.", registry=registry)
        self.queue = Gauge("notellm2_queue_items", "Items that wait or are encoded.", registry=registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, items: int, tokens: int, seconds: float) -> None:
        """Count a batch that the model has encoded."""
        self._items.inc(items)
        self._tokens.inc(tokens)
        self._batch_items.observe(items)
        self._batch_seconds.observe(seconds)
