"""Several models over the same queries: what each reaches, what it costs, and how surely it differs from the first.

Two models are compared query by query wherever they embed the same modality. What a team asks first is another question: is
this model, with all that it reads, better than that one with all that it reads? So all models are ranked once more over the
items that every one of them can embed, each by its fullest view: both modalities where it has them, else its only one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from training.evaluation.embed import MODALITIES, Embedder, Pairs, View, has_pair
from training.evaluation.measuring import Measured, MeasureOptions, measure_view
from training.evaluation.metrics import PerQuery, compare


PROTOCOLS = ("published", "multi_positive")


@dataclass(frozen=True)
class Candidate:
    """A model that was run, without its weights.

    Attributes:
        about: its part of "models" in evaluation.json.
        fullest: its view of most modalities.
    """

    about: dict[str, Any]
    fullest: View


def candidate(embedder: Embedder, views: Sequence[View]) -> Candidate:
    """What is kept of a model whose views (one at least) were measured."""
    fullest = next(view for name in MODALITIES for view in views if view.name == name)
    about = {
        "model": embedder.name,
        "kind": embedder.kind,
        "reads": embedder.reads,
        "lacks": [name for name in MODALITIES if name not in embedder.modalities],
        "embedding": fullest.name,
        "parameters": embedder.parameters,
        "dimension": fullest.embeddings.shape[1],
        "items_per_second": len(fullest.positions) / fullest.seconds,
    }
    return Candidate(about, fullest)


def compare_queries(first: dict[str, PerQuery], other: Measured, options: MeasureOptions) -> dict[str, Any]:
    """Differences by protocol and metric, first minus other."""
    return {protocol: compare(first[protocol], other.per_query[protocol], options.bootstrap) for protocol in PROTOCOLS}


def compare_fullest(candidates: Sequence[Candidate], pairs: Pairs, options: MeasureOptions) -> dict[str, Any] | None:
    """All models by their fullest views, over the items that all of them can embed; None where no pair is left.

    Returns:
        "together" of evaluation.json.
    """
    positions = reduce(np.intersect1d, [np.asarray(model.fullest.positions) for model in candidates])
    if not has_pair(positions.tolist(), pairs):
        return None
    measured = [measure_view(_narrowed(model.fullest, positions), pairs, None, options) for model in candidates]
    first = measured[0]
    return {
        "items": len(positions),
        "queries": {protocol: first.report[protocol]["queries"] for protocol in PROTOCOLS},
        "candidates": {protocol: first.report[protocol]["candidates"] for protocol in PROTOCOLS},
        "models": [
            {
                "model": model.about["model"],
                "embedding": model.about["embedding"],
                "metrics": {protocol: result.report[protocol]["metrics"] for protocol in PROTOCOLS},
                "difference": compare_queries(first.per_query, result, options) if number else None,
            }
            for number, (model, result) in enumerate(zip(candidates, measured, strict=True))
        ],
    }


def _narrowed(view: View, positions: np.ndarray) -> View:
    """A view's items at some positions of the table, which all are in it."""
    rows = np.searchsorted(view.positions, positions)  # a view's positions ascend
    return View(view.name, positions.tolist(), view.embeddings[rows], view.seconds)
