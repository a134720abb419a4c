"""All that is said of a model: figures with intervals, slices, examples, a comparison: the content of evaluation.json.

The JSON is:

    {
      "generator": str, "model": str, "weights": {file: SHA-256} | null (a model of the Hub), "compared_with": str | null,
      "settings": {option: value},
      "precision": {"name": "float32" | "bfloat16" | "float16", "reason": str},
      "counts": {"items": int, "pairs": int, "rejected_rows": int},
      "trained_share": float | null (with --train_pairs: share of the pairs that are train pairs),
      "metrics": {EMBEDDING: {
          "published":      {"queries": int, "candidates": int, "unknown_pairs": int, "repeated_pairs": int,
                             "metrics": {METRIC: INTERVAL}, "rank_percentiles": {"50": float, ...},
                             "random": {"recall@10": float, ...}},
          "multi_positive": {"queries": int, "candidates": int, "targets": int, "unknown_pairs": int,
                             "repeated_pairs": int, "metrics": {METRIC: INTERVAL}, "rank_percentiles": {...}},
          "labels":         {"items": int, "metrics": {"precision@10": INTERVAL}, "random": {...}} | null}},
      "slices": [{"embedding": EMBEDDING, "group": str, "slice": str, "queries": int,
                  "metrics": {"recall@10": INTERVAL, ...}}],
      "examples": {"embedding": EMBEDDING, "best": [EXAMPLE], "worst": [EXAMPLE]},
      "comparison": {EMBEDDING: {"published" | "multi_positive": {METRIC: {"value": float, "other": float,
                     "difference": float, "low": float, "high": float, "p_value": float}}}} | null,
      "plots": {"recall": "plots/recall.png", "ranks": ..., "slices_EMBEDDING": ..., "comparison": ...}
    }

EMBEDDING: "both", "image", "text" (what the model is shown) and "visual" (the visual embedding of a model with mICL); one
is missing where no pair has what it needs. Protocol "published": each kept pair's target among all items that are no
query; "multi_positive": all known targets of a query among all items but itself (`training.evaluation.retrieval`).
METRIC: "recall@k", "ndcg@k", "mrr", and "hit_rate@k" (multi-positive). INTERVAL: {"value": float, "low": float,
"high": float}, a bootstrap interval over queries. rank_percentiles: e.g. "90": nine of ten targets rank there or better.
Slices are of the published protocol's queries, "group" being e.g. "query text length", "target popularity",
"query fields", "category". EXAMPLE: {"query_id": str, "target_id": str, "rank": int, "score": float,
"neighbours": [{"item_id": str, "score": float}]} with the five nearest candidates, nearest first. Scores are cosines.
`difference` is this model's value minus the other's; p_value is of a sign-flip permutation test over queries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from training.batches.collators import ItemCollator
from training.batches.vision_cache import VisionCache
from training.evaluation.embed import NEIGHBOURS, Pairs, View, views
from training.evaluation.metrics import (
    Bootstrap,
    PerQuery,
    compare,
    intervals,
    multi_positive_metrics,
    published_metrics,
    rank_percentiles,
)
from training.evaluation.retrieval import (
    RetrievalResult,
    expected_precision,
    has_label,
    nearest,
    precisions_at_k,
    rank_all_targets,
    rank_targets,
)
from training.evaluation.slices import ItemFacts, item_facts, measure_slices, query_slices
from training.reporting.evaluation_plots import EVALUATION, draw_plots
from training.reporting.evaluation_tables import as_markdown
from training.tables.commands.bounds import AtLeastOne, Bounds, NotNegative, check_bounds
from training.tables.commands.files import remove_files, write_json, write_text
from training.tables.commands.outputs import GENERATOR
from training.tables.items import ItemTable
from training.trainer.adapters import unwrap_adapter


MOST_K = 1_000_000
"""Largest cut-off of recall@k: no list of recommendations is longer."""


@dataclass
class MeasureOptions:
    """What is measured, and how surely."""

    ks: list[Annotated[int, Bounds(1, MOST_K)]] = field(
        default_factory=lambda: [1, 10, 100], metadata={"help": "Cut-offs of recall@k and nDCG@k."}
    )
    resamples: AtLeastOne = field(
        default=1000, metadata={"help": "Draws of the bootstrap, and of the permutation test."}
    )
    confidence: Annotated[float, Bounds(0, 1, open=True)] = field(default=0.95, metadata={"help": "Of the intervals."})
    seed: NotNegative = field(default=0, metadata={"help": "Of all draws."})
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


def evaluate_model(
    model: Any,
    processor: Any,
    items: ItemTable,
    pairs: Pairs,
    options: MeasureOptions | None = None,
    *,
    other: tuple[Any, Any] | None = None,
    labels: Sequence[Any] | None = None,
    popularity: np.ndarray | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    rejects: Path | None = None,
    features: VisionCache | None = None,
    embedded: Iterable[View] | None = None,
) -> dict[str, Any]:
    """Everything in evaluation.json but "settings", "plots" and the names of the models.

    Args:
        model, processor: as AutoModel and AutoProcessor load them; the model is left in the mode it was in.
        items: all candidates.
        pairs: (p, 2) integer positions in `items`: query and target.
        other: another model and its processor, for the comparison.
        labels: a category for each item.
        popularity: (n,) integer, train pairs that each item is in (`training.evaluation.slices.count_in_pairs`).
        rejects: JSON lines file to which images that can't be read are added.
        features: stored vision features of `model`'s encoder.
        embedded: the items by `model`, where `views` has embedded them already.

    Raises:
        ValueError: when no pair can be measured.
    """
    options = options or MeasureOptions()
    facts = item_facts(items, processor.limits, popularity, labels)
    if embedded is None:
        collate = ItemCollator(processor, features, unwrap_adapter(model).dtype, rejects)
        embedded = views(model, collate, items, pairs, batch_size, num_workers)
    report: dict[str, Any] = {"metrics": {}, "slices": [], "examples": None, "comparison": None}
    per_query: dict[str, dict[str, PerQuery]] = {}
    for view in embedded:
        measured = measure_view(view, pairs, labels, options)
        report["metrics"][view.name] = measured.report
        report["slices"] += _slices(view, measured, facts, options)
        report["examples"] = report["examples"] or _examples(view, measured, items, options)
        per_query[view.name] = measured.per_query
    if not per_query:
        raise ValueError(f"None of {len(pairs)} pairs has two different items of the item table: nothing to measure.")
    if other is not None:
        collate = ItemCollator(other[1], rejects=rejects)
        report["comparison"] = {
            view.name: _compared(per_query[view.name], measure_view(view, pairs, labels, options), options)
            for view in views(other[0], collate, items, pairs, batch_size, num_workers)
            if view.name in per_query
        }
    return report


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


def _slices(view: View, measured: Measured, facts: ItemFacts, options: MeasureOptions) -> list[dict[str, Any]]:
    positions = np.asarray(view.positions)
    published = measured.published  # as arrays: NumPy takes a tensor of one row for a number
    queries, targets = positions[published.queries.numpy()], positions[published.targets.numpy()]
    slices = query_slices(facts, queries, targets, options.length_thresholds, options.top_categories)
    rows = measure_slices(slices, published.ranks.numpy(), options.ks, options.bootstrap)
    return [{"embedding": view.name, **row} for row in rows]


def _compared(ours: dict[str, PerQuery], other: Measured, options: MeasureOptions) -> dict[str, Any]:
    return {
        protocol: compare(values, other.per_query[protocol], options.bootstrap) for protocol, values in ours.items()
    }


def _examples(view: View, measured: Measured, items: ItemTable, options: MeasureOptions) -> dict[str, Any]:
    """The queries whose targets rank best (of equal ranks, the most similar) and worst, with their neighbours."""
    result = measured.published
    scores = (view.embeddings[result.queries].double() * view.embeddings[result.targets].double()).sum(1)
    order = np.lexsort((-scores.numpy(), result.ranks.numpy()))
    best = order[: options.examples]
    worst = order[len(best) :][-options.examples :][::-1] if options.examples else order[:0]
    in_pool = torch.ones(len(view.embeddings), dtype=torch.bool)
    in_pool[result.queries] = False
    pool = in_pool.nonzero().flatten()

    def ids(rows: torch.Tensor) -> list[str]:
        return [items.item_ids[view.positions[row]] for row in rows.tolist()]

    def described(chosen: np.ndarray) -> list[dict[str, Any]]:
        picked = torch.from_numpy(chosen.copy())
        near, rows = nearest(view.embeddings, result.queries[picked], pool, options.neighbours)
        columns = (ids(result.queries[picked]), ids(result.targets[picked]), picked.tolist(), near.tolist(), rows)
        return [
            {
                "query_id": query,
                "target_id": target,
                "rank": int(result.ranks[number]),
                "score": float(scores[number]),
                "neighbours": [
                    {"item_id": item_id, "score": score} for item_id, score in zip(ids(row), close, strict=True)
                ],
            }
            for query, target, number, close, row in zip(*columns, strict=True)
        ]

    return {"embedding": view.name, "best": described(best), "worst": described(worst)}


def write_results(report: dict[str, Any], output: Path) -> None:
    """Write evaluation.json, evaluation.md and the plots, whose places are added to the report as "plots".

    Args:
        report: what `evaluate_model` gave, with "model", "weights", "compared_with", "settings" and "counts".
    """
    remove_files(output, EVALUATION)  # first: a kill now leaves none of them beside those of another model
    report["plots"] = draw_plots(report, output / "plots")
    write_text(as_markdown(report), output / "evaluation.md")
    write_json({**GENERATOR, **report}, output / "evaluation.json")
