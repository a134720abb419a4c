"""Metrics of one view of the items, by both protocols, with intervals, and what is asked of a measurement."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from training.evaluation.embed import NEIGHBOURS, Pairs, View
from training.evaluation.metrics import (
    Bootstrap,
    PerQuery,
    intervals,
    multi_positive_metrics,
    published_metrics,
    rank_percentiles,
)
from training.evaluation.retrieval import (
    RetrievalResult,
    expected_precision,
    has_label,
    precisions_at_k,
    rank_all_targets,
    rank_targets,
)
from training.tables.commands.bounds import Bounds, NotNegative, Seed, check_bounds


MOST_K = 1_000_000
"""Largest cut-off of recall@k: no list of recommendations is longer."""


@dataclass
class MeasureOptions:
    """What is measured, and how surely."""

    ks: list[Annotated[int, Bounds(1, MOST_K)]] = field(
        default_factory=lambda: [1, 10, 100], metadata={"help": "Cut-offs of recall@k and nDCG@k."}
    )
    resamples: Annotated[int, Bounds(1, 1_000_000)] = field(
        default=1000, metadata={"help": "Draws of the bootstrap, and of the permutation test."}
    )
    confidence: Annotated[float, Bounds(0, 1, open=True)] = field(default=0.95, metadata={"help": "Of the intervals."})
    seed: Seed = field(default=0, metadata={"help": "Of all draws."})
    length_thresholds: list[NotNegative] = field(
        default_factory=list,
        metadata={
            "help": "Most characters of a short text and of a medium one (two numbers); none: the quartiles of the "
            "queries' and of the targets' texts."
        },
    )
    top_categories: NotNegative = field(default=10, metadata={"help": "Categories with a slice of their own."})
    examples: NotNegative = field(default=12, metadata={"help": "Best queries, and worst queries, that are listed."})
    neighbours: NotNegative = field(default=5, metadata={"help": "Nearest candidates listed with each of them."})

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks are positive cut-offs; got {self.ks}.")
        check_bounds(self)
        self.ks = sorted(set(self.ks))
        self.bootstrap = Bootstrap(self.resamples, self.confidence, self.seed)


@dataclass(frozen=True)
class Measured:
    """One view of the items, ranked.

    Attributes:
        report: its part of "metrics" in evaluation.json.
        per_query: the values behind it, by protocol.
        published: ranks by the published protocol.
    """

    report: dict[str, Any]
    per_query: dict[str, PerQuery]
    published: RetrievalResult


def measure_view(view: View, pairs: Pairs, labels: Sequence[Any] | None, options: MeasureOptions) -> Measured:
    """Both protocols, and precision where there are labels, over the items of a view."""
    published = rank_targets(view.embeddings, view.positions, pairs.tolist())
    everything = rank_all_targets(view.embeddings, view.positions, pairs.tolist())
    per_query = {
        "published": published_metrics(published, options.ks),
        "multi_positive": multi_positive_metrics(everything, options.ks),
    }
    report: dict[str, Any] = {
        protocol: {
            "queries": len(result.queries),
            "candidates": result.pool_size,
            "unknown_pairs": result.unknown_pairs,
            "repeated_pairs": result.repeated_pairs,
            "metrics": intervals(per_query[protocol], options.bootstrap),
            "rank_percentiles": rank_percentiles(result.ranks.numpy()),
        }
        for protocol, result in (("published", published), ("multi_positive", everything))
    }
    report["published"]["random"] = {f"recall@{k}": published.expected_recall(k) for k in options.ks}
    report["multi_positive"]["targets"] = len(everything.targets)
    report["labels"] = _precision(view, labels, options)
    return Measured(report, per_query, published)


def _precision(view: View, labels: Sequence[Any] | None, options: MeasureOptions) -> dict[str, Any] | None:
    """Share of the nearest items with the same label, over the labelled items; None without one."""
    chosen = [labels[position] for position in view.positions] if labels is not None else []
    if len(chosen) <= NEIGHBOURS or not any(map(has_label, chosen)):
        return None
    name = f"precision@{NEIGHBOURS}"
    values = precisions_at_k(view.embeddings, chosen, NEIGHBOURS).numpy()
    return {
        "items": len(values),
        "metrics": intervals({name: values}, options.bootstrap),
        "random": {name: expected_precision(chosen)},
    }
