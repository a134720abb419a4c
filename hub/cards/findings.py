"""What a card says about quality: a table and sentences, each derived from the figures of metrics.json.

A difference is called one only where it exceeds twice its standard error, that of two independent shares over the run's
number of queries (of precision: items): a little too careful, as both are measured on the same queries.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from training.tables.commands.markdown import as_text


NAMES = {
    "both": "picture and text",
    "image": "picture alone",
    "text": "text alone",
    "visual": "visual embedding",
}
STAGES = {"random": "random", "baselines": "baseline", "before": "untrained", "after": "trained"}
METRICS = ("recall@1", "recall@10", "recall@100", "precision@10")
HEADLINE = "recall@10"

Metrics = Mapping[str, Any]


def read_metrics(metrics: str | Path | Metrics | None) -> dict[str, Any]:
    """Content of metrics.json, also made of `training/evaluate.py`'s evaluation.json; empty for None.

    Raises:
        ValueError: when it is of neither form, or holds a figure that is no share.
    """
    if metrics is None:
        return {}
    if isinstance(metrics, Mapping):
        name, content = "The metrics", dict(metrics)
    else:
        name = str(metrics)
        content = json.loads(Path(metrics).read_text(encoding="utf-8"))
    if isinstance(content, dict) and isinstance(content.get("metrics"), dict):
        content = _of_evaluation(content)
    if not isinstance(content, dict) or not isinstance(content.get("after"), dict):
        raise ValueError(
            f"{name}: no figures under 'after'; pass the metrics.json that training/run.py wrote, or an evaluation.json."
        )
    for stage in STAGES:
        for key, value in content.get(stage, {}).items():
            if "/" in key and not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ValueError(f"{name}: {stage} {key} is {value!r}; expected a share between 0 and 1.")
    return content


def _of_evaluation(evaluation: Metrics) -> dict[str, Any]:
    """evaluation.json's figures of the published protocol in the form of metrics.json."""
    after: dict[str, float] = {}
    for name, protocols in evaluation["metrics"].items():
        measured = [protocols["published"], *([protocols["labels"]] if protocols.get("labels") else [])]
        for protocol_figures in measured:
            for metric, interval in protocol_figures["metrics"].items():
                after[f"{name}/{metric}"] = interval["value"]
    whole = evaluation["metrics"].get("both", {})
    chance = {**whole.get("published", {}).get("random", {}), **((whole.get("labels") or {}).get("random") or {})}
    sizes = {key: whole["published"][key] for key in ("queries", "candidates")} if whole else {}
    counts = evaluation.get("counts", {})
    return {
        "random": {f"random/{metric}": value for metric, value in chance.items()} | sizes,
        "after": after,
        "counts": {"eval_items": counts.get("items"), "eval_pairs": counts.get("pairs")},
        "settings": {"label_column": evaluation.get("settings", {}).get("label_column")},
        "weights": evaluation.get("weights"),
    }


def eval_results(metrics: Metrics, dataset: str | None, dataset_name: str) -> list[EvalResult]:
    """The trained model's figures for the card's model-index.

    Args:
        dataset: Hub id of what was measured on, or None.
        dataset_name: what people call it.
    """
    results = []
    for key, value in metrics.get("after", {}).items():
        part, metric = key.rsplit("/", 1)
        results.append(
            EvalResult(
                task_type="feature-extraction",
                task_name=f"Item-to-item retrieval, {NAMES.get(part, part)}",
                dataset_type=dataset or "custom",
                dataset_name=dataset_name,
                dataset_config=part,
                dataset_split=metrics.get("settings", {}).get("eval_split"),
                metric_type=metric,
                metric_name=f"{metric} ({NAMES.get(part, part)})",
                metric_value=value,
            )
        )
    return results


def results_table(metrics: Metrics) -> dict[str, Any] | None:
    """Columns and rows of the card's table of figures: random, baselines, before and after training."""
    columns = [name for name in METRICS if any(key.endswith(f"/{name}") for key in metrics.get("after", {}))]
    rows = []
    for stage, label in STAGES.items():
        figures = metrics.get(stage, {})
        label = "model" if stage == "after" and not metrics.get("before") else label  # nothing says it was trained
        for part in dict.fromkeys(key.rsplit("/", 1)[0] for key in figures if "/" in key):
            shown = [figures.get(f"{part}/{column}") for column in columns]
            cells = ["" if figure is None else f"{figure:.3f}" for figure in shown]
            rows.append(
                {"name": label if stage == part else f"{label}: {NAMES.get(part, as_text(part))}", "cells": cells}
            )
    return {"columns": columns, "rows": rows} if columns else None


@dataclass(frozen=True)
class _Question:
    """What is asked of two figures, its answers when the first is lower, not clearly different and higher, and the figures."""

    asked: str
    answers: tuple[str, str, str]
    figures: str = "{:.3f} with it, {:.3f} without"

    def answer(self, sign: int, value: float, other: float) -> str:
        return f"{self.asked}: {self.answers[sign + 1]} ({self.figures.format(value, other)})."


PICTURE_BESIDE_TEXT = _Question(
    "Picture beside text",
    (
        "the text alone does better than with the picture",
        "no clear gain from the picture beside the text",
        "the picture adds to the text",
    ),
)
PICTURE_ALONE = _Question(
    "Picture without text",
    (
        "the picture alone does worse than chance",
        "the picture alone does no better than chance",
        "the picture alone carries",
    ),
    "{:.3f}, chance {:.3f}",
)
TEXT_BESIDE_PICTURE = _Question(
    "Text beside picture",
    (
        "the picture alone does better than with the text",
        "no clear gain from the text beside the picture",
        "the text adds to the picture",
    ),
)


def findings(metrics: Metrics) -> list[str]:
    """Sentences on training, baselines and modalities, from the figures alone."""
    after, queries = metrics.get("after", {}), metrics.get("random", {}).get("queries", 0)
    if f"both/{HEADLINE}" not in after:
        return []
    compare = _Comparison(queries)
    trained = after[f"both/{HEADLINE}"]
    sentences = [f"With picture and text {HEADLINE} is {trained:.3f}{_reference(metrics)}."]
    before = metrics.get("before", {}).get(f"both/{HEADLINE}")
    if before is not None:
        sentences.append(f"Training: {compare.sentence('trained', trained, 'untrained', before)}.")
    sentences += _modalities(after, metrics.get("random", {}).get(f"random/{HEADLINE}"), compare)
    items = _Comparison(metrics.get("counts", {}).get("eval_items", queries))
    for metric in METRICS:
        sentences += _baselines(
            metric, metrics.get("baselines", {}), after, items if "precision" in metric else compare
        )
    return sentences


def _reference(metrics: Metrics) -> str:
    chance = metrics.get("random", {}).get(f"random/{HEADLINE}")
    return "" if chance is None else f", by chance it would be {chance:.3f}"


def _modalities(after: Metrics, chance: float | None, compare: "_Comparison") -> list[str]:
    """Does the picture count beside the text, and does it carry alone?"""
    both, text, image = (after.get(f"{part}/{HEADLINE}") for part in ("both", "text", "image"))
    asked = [
        (PICTURE_BESIDE_TEXT, both, text),
        (PICTURE_ALONE, image, chance),
        (TEXT_BESIDE_PICTURE, both, image),
    ]
    return [
        question.answer(compare.sign(value, other), value, other)
        for question, value, other in asked
        if value is not None and other is not None
    ]


def _baselines(metric: str, baselines: Metrics, after: Metrics, compare: "_Comparison") -> list[str]:
    """Whether the model passes the best baseline at a figure."""
    own = after.get(f"both/{metric}")
    figures = {key.rsplit("/", 1)[0]: value for key, value in baselines.items() if key.endswith(f"/{metric}")}
    if own is None or not figures:
        return []
    best = max(figures, key=lambda name: figures[name])
    text = compare.sentence("the model", own, f"the best baseline, {best}", figures[best])
    return [f"{metric} against baselines: {text}."]


class _Comparison:
    """Two shares of the same number of queries.

    Args:
        queries: their number; 0 where it is unknown: any difference then counts as one.
    """

    def __init__(self, queries: int):
        self.queries = queries

    def sign(self, value: float, other: float) -> int:
        """1 or -1 where `value` is clearly larger or smaller, else 0."""
        error = math.sqrt((value * (1 - value) + other * (1 - other)) / self.queries) if self.queries else 0.0
        return 0 if abs(value - other) <= 2 * error else (1 if value > other else -1)

    def sentence(self, name: str, value: float, other_name: str, other: float) -> str:
        """Both figures and which is better."""
        verdict = {1: "better than", 0: "not clearly different from", -1: "worse than"}[self.sign(value, other)]
        return f"{name} ({value:.3f}) is {verdict} {other_name} ({other:.3f})"


def protocol(metrics: Metrics) -> str:
    """How the figures were measured."""
    random = metrics.get("random", {})
    if "queries" not in random:
        return ""
    text = (
        f"Recall by the published protocol: {random['queries']:,} queries, each with one right answer among "
        f"{random['candidates']:,} candidates. Each modality is measured over the items that have it."
    )
    if any(key.startswith("precision@", key.find("/") + 1) for key in metrics["after"]):
        label = metrics.get("settings", {}).get("label_column")
        text += f" precision@10: share of the 10 nearest items with the query's {f'`{label}`' if label else 'label'}."
    return text


def model_metrics(results: Sequence[EvalResult]) -> list[str]:
    """Names of the figures, each once."""
    return list(dict.fromkeys(result.metric_type for result in results))
