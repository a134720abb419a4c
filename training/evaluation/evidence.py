"""All that is said of a model: figures with intervals, slices, examples, a comparison: the content of evaluation.json.

The JSON is:

    {
      "generator": str, "model": str, "weights": {file: SHA-256} | null (a model of the Hub), "compared_with": [str],
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
      "models": [{"model": str, "kind": str, "reads": str, "lacks": ["both" | "image" | "text"],
                  "embedding": "both" | "image" | "text" (its fullest), "parameters": int, "dimension": int,
                  "items_per_second": float}],
      "comparison": [{"model": str, "embeddings": {EMBEDDING: {"published" | "multi_positive": {METRIC: DIFFERENCE}}}}],
      "together": {"items": int, "queries": {PROTOCOL: int}, "candidates": {PROTOCOL: int},
                   "models": [{"model": str, "embedding": str, "metrics": {PROTOCOL: {METRIC: INTERVAL}},
                               "difference": {PROTOCOL: {METRIC: DIFFERENCE}} | null (the first)}]} | null,
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
DIFFERENCE: {"value": float, "other": float, "difference": float, "low": float, "high": float, "p_value": float}:
`difference` is the first model's value minus the other's; p_value is of a sign-flip permutation test over queries.
"comparison" holds what both embed alike; "together" all models by their fullest embedding, over the items that all can
embed. items_per_second counts opening pictures and embedding by the fullest embedding, on the machine of the evaluation.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.evaluation.comparing import candidate, compare_fullest, compare_queries
from training.evaluation.embed import Embedder, Pairs, View, views
from training.evaluation.measuring import Measured, MeasureOptions, measure_view
from training.evaluation.metrics import PerQuery
from training.evaluation.retrieval import nearest
from training.evaluation.slices import ItemFacts, item_facts, measure_slices, query_slices
from training.reporting.evaluation_plots import EVALUATION, draw_plots
from training.reporting.evaluation_tables import as_markdown
from training.tables.commands.files import remove_files, write_json, write_text
from training.tables.commands.outputs import GENERATOR
from training.tables.items import ItemTable


def evaluate_model(
    embedder: Embedder,
    items: ItemTable,
    pairs: Pairs,
    options: MeasureOptions | None = None,
    *,
    others: Iterable[Embedder] = (),
    labels: Sequence[Any] | None = None,
    popularity: np.ndarray | None = None,
    embedded: Iterable[View] | None = None,
) -> dict[str, Any]:
    """Everything in evaluation.json but "settings", "plots" and the names of the models.

    Args:
        embedder: the model, of any kind (`training.evaluation.embedders.open_embedder`).
        items: all candidates.
        pairs: (p, 2) integer positions in `items`: query and target.
        others: models to compare it with; one is taken when the one before has been measured, so they may be loaded then.
        labels: a category for each item.
        popularity: (n,) integer, train pairs that each item is in (`training.evaluation.slices.count_in_pairs`).
        embedded: the items by the model, where `views` has embedded them already.

    Raises:
        ValueError: when no pair can be measured.
    """
    options = options or MeasureOptions()
    facts = item_facts(items, embedder.limits, popularity, labels)
    report: dict[str, Any] = {"metrics": {}, "slices": [], "examples": None}
    per_query: dict[str, dict[str, PerQuery]] = {}
    measured_views = []
    for view in embedded or views(embedder, items, pairs):
        measured = measure_view(view, pairs, labels, options)
        report["metrics"][view.name] = measured.report
        report["slices"] += _slices(view, measured, facts, options)
        report["examples"] = report["examples"] or _examples(view, measured, items, options)
        per_query[view.name] = measured.per_query
        measured_views.append(view)
    if not per_query:
        raise ValueError(f"{embedder.name}: {_nothing(len(pairs), embedder)}")
    candidates, comparison = [candidate(embedder, measured_views)], []
    for other in others:
        seen = list(views(other, items, pairs))
        if not seen:
            raise ValueError(f"{other.name}: {_nothing(len(pairs), other)}")
        candidates.append(candidate(other, seen))
        shared = {view.name: measure_view(view, pairs, None, options) for view in seen if view.name in per_query}
        differences = {name: compare_queries(per_query[name], result, options) for name, result in shared.items()}
        comparison.append({"model": other.name, "embeddings": differences})
    together = compare_fullest(candidates, pairs, options) if comparison else None
    about = [model.about for model in candidates]
    return {**report, "models": about, "comparison": comparison, "together": together}


def _nothing(pairs: int, embedder: Embedder) -> str:
    which = "" if "both" in embedder.modalities else f" with {' or '.join(embedder.modalities)}, all that it reads"
    return f"none of {pairs} pairs has two different items of the item table{which}: nothing to measure."


def _slices(view: View, measured: Measured, facts: ItemFacts, options: MeasureOptions) -> list[dict[str, Any]]:
    positions = np.asarray(view.positions)
    published = measured.published  # as arrays: NumPy takes a tensor of one row for a number
    queries, targets = positions[published.queries.numpy()], positions[published.targets.numpy()]
    slices = query_slices(facts, queries, targets, options.length_thresholds, options.top_categories)
    rows = measure_slices(slices, published.ranks.numpy(), options.ks, options.bootstrap)
    return [{"embedding": view.name, **row} for row in rows]


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
