"""From ranks to figures: recall@k, MRR, nDCG@k and hit rate of each query, with intervals, and two models compared.

A metric is an array of one value for each query; its mean is the figure that is reported. So a bootstrap over queries
gives any metric its interval, and two models that answered the same queries are compared query by query.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.evaluation.retrieval import MultiPositiveResult, RetrievalResult


PERCENTILES = (10, 25, 50, 75, 90, 99)
DRAWS = 2**22
"""Random numbers held at once."""

PerQuery = dict[str, np.ndarray]
"""Metric name to (queries,) float64."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals and p values are drawn.

    Attributes:
        resamples: draws of the queries with replacement, or of signs.
        confidence: share of the resampled means that lie within an interval.
        seed: of the draws; the same seed gives the same figures.
    """

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0 < self.confidence < 1:
            raise ValueError(
                f"A bootstrap needs resamples, got {self.resamples}, and a confidence in (0, 1), got {self.confidence}."
            )


def published_metrics(result: RetrievalResult, ks: Sequence[int]) -> PerQuery:
    """recall@k, nDCG@k and reciprocal rank ("mrr") of each query with its one target."""
    return single_target_metrics(result.ranks.numpy(), ks)


def single_target_metrics(ranks: np.ndarray, ks: Sequence[int]) -> PerQuery:
    """As `published_metrics`, of (queries,) ranks from 1."""
    recall = {f"recall@{k}": (ranks <= k).astype(np.float64) for k in ks}
    ndcg = {f"ndcg@{k}": np.where(ranks <= k, _discount(ranks), 0.0) for k in ks}
    return recall | ndcg | {"mrr": 1 / ranks}


def multi_positive_metrics(result: MultiPositiveResult, ks: Sequence[int]) -> PerQuery:
    """Metrics of each query with all its known targets.

    recall@k is the share of its targets among the first k, hit_rate@k whether at least one is there, mrr the
    reciprocal rank of the first, and ndcg@k the discounted gain of the targets over that of the best ranking.
    """
    ranks, query_of, queries = result.ranks.numpy(), result.query_of.numpy(), len(result.queries)
    targets = np.bincount(query_of, minlength=queries)
    metrics: PerQuery = {}
    gains = np.concatenate([[0.0], np.cumsum(_discount(np.arange(1, targets.max(initial=0) + 1)))])
    for k in ks:
        hits = np.bincount(query_of, ranks <= k, minlength=queries)
        gain = np.bincount(query_of, np.where(ranks <= k, _discount(ranks), 0.0), minlength=queries)
        metrics[f"recall@{k}"] = hits / targets
        metrics[f"hit_rate@{k}"] = (hits > 0).astype(np.float64)
        metrics[f"ndcg@{k}"] = gain / gains[np.minimum(targets, k)]
    first = np.full(queries, np.iinfo(np.int64).max)
    np.minimum.at(first, query_of, ranks)
    return metrics | {"mrr": 1 / first}


def rank_percentiles(ranks: np.ndarray) -> dict[str, float]:
    """Rank that a given per cent of the targets reach or better, e.g. {"50": 3.0}: always a rank that occurs."""
    values = np.percentile(ranks, PERCENTILES, method="inverted_cdf")
    return {str(percentile): float(value) for percentile, value in zip(PERCENTILES, values, strict=True)}


def intervals(metrics: Mapping[str, np.ndarray], options: Bootstrap) -> dict[str, dict[str, float]]:
    """Mean of each metric with its percentile bootstrap interval: {"recall@10": {"value": .., "low": .., "high": ..}}.

    Queries that all have one value give an interval of no width: of few queries it says little.

    Raises:
        ValueError: without a query.
    """
    values = _matrix(metrics)
    low, high = _bootstrap_bounds(values, options)
    return {
        name: {"value": float(value), "low": float(low), "high": float(high)}
        for name, value, low, high in zip(metrics, values.mean(0), low, high, strict=True)
    }


def compare(
    ours: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray], options: Bootstrap
) -> dict[str, dict[str, float]]:
    """Two models over the same queries, metric by metric.

    The difference of the means has a bootstrap interval over queries (both models drawn together). `p_value` is the
    share of sign-flip permutations whose difference is at least as large either way: the chance of such a difference if
    it did not matter which model gave which of a query's two values. The observed signs count as one permutation, so
    it is never 0.

    Raises:
        ValueError: when the metrics or the numbers of queries differ, or without a query.
    """
    mine, theirs = _matrix(ours), _matrix(others)
    if list(ours) != list(others) or mine.shape != theirs.shape:
        raise ValueError(
            f"A paired comparison needs the same metrics of the same queries: {len(mine)} and {len(theirs)} queries."
        )
    differences = mine - theirs
    low, high = _bootstrap_bounds(differences, options)
    p_values = _sign_flip_p_values(differences, options)
    return {
        name: {
            "value": float(mine[:, column].mean()),
            "other": float(theirs[:, column].mean()),
            "difference": float(differences[:, column].mean()),
            "low": float(low[column]),
            "high": float(high[column]),
            "p_value": float(p_values[column]),
        }
        for column, name in enumerate(ours)
    }


def _bootstrap_bounds(values: np.ndarray, options: Bootstrap) -> tuple[np.ndarray, np.ndarray]:
    """Low and high bound of the mean of each column of (queries, metrics)."""
    queries = len(values)
    generator = np.random.default_rng(options.seed)
    means = []
    for count in _chunks(options.resamples, queries):
        drawn = generator.integers(queries, size=(count, queries)) + np.arange(count)[:, None] * queries
        weights = np.bincount(drawn.ravel(), minlength=count * queries).reshape(count, queries)
        means.append(weights.astype(np.float64) @ values / queries)
    tail = (1 - options.confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return low, high


def _sign_flip_p_values(differences: np.ndarray, options: Bootstrap) -> np.ndarray:
    """Two-sided p value of each column of (queries, metrics)."""
    observed = np.abs(differences.sum(0))
    rounding = 1e-12 * np.abs(differences).sum(0)
    generator = np.random.default_rng(options.seed)
    as_large = np.ones(differences.shape[1])
    for count in _chunks(options.resamples, len(differences)):
        signs = generator.integers(2, size=(count, len(differences))) * 2.0 - 1
        as_large += (np.abs(signs @ differences) >= observed - rounding).sum(0)
    return as_large / (options.resamples + 1)


def _chunks(resamples: int, queries: int) -> Iterator[int]:
    """Resamples in parts of at most `DRAWS` random numbers."""
    size = max(1, DRAWS // queries)
    return (min(size, resamples - start) for start in range(0, resamples, size))


def _matrix(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    values = np.stack(list(metrics.values()), axis=1)
    if not len(values):
        raise ValueError("No query: there is nothing to average.")
    return values


def _discount(ranks: np.ndarray) -> np.ndarray:
    return 1 / np.log2(ranks + 1.0)
