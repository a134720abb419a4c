"""The content of evaluation.json (schema: `training.evaluate`) as pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from training.reporting.evaluation_tables import middle_metric, short_name
from training.reporting.figures import write_figure


INTERVAL = dict[str, float]
SLICES = tuple(f"slices_{embedding}" for embedding in ("both", "image", "text", "visual"))
EVALUATION = (
    "evaluation.json",
    "evaluation.md",
    *(f"plots/{name}.png" for name in ("recall", "ranks", "comparison", *SLICES)),
)
"""All files of an evaluation, in its folder."""


def draw_plots(report: dict[str, Any], folder: Path) -> dict[str, str]:
    """PNG files of an evaluation, each whole or not there; their places from the folder above, by name."""
    places = {}
    for name, figure in _figures(report):
        write_figure(figure, folder / f"{name}.png")
        places[name] = f"{folder.name}/{name}.png"
    return places


def _figures(report: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    yield "recall", _recall(report)
    yield "ranks", _ranks(report)
    for embedding in report["metrics"]:
        yield f"slices_{embedding}", _slices(report, embedding)
    if report["together"] or any(other["embeddings"] for other in report["comparison"]):
        yield "comparison", _comparison(report)


def _recall(report: dict[str, Any]) -> Figure:
    """recall@k of each embedding as bars with intervals, a panel for each protocol."""
    figure = Figure(figsize=(10, 4))
    panels = figure.subplots(1, 2, sharey=True)
    embeddings = list(report["metrics"])
    for panel, protocol in zip(panels, ("published", "multi_positive"), strict=True):
        width = 0.8 / len(embeddings)
        for number, embedding in enumerate(embeddings):
            metrics = report["metrics"][embedding][protocol]["metrics"]
            names = [name for name in metrics if name.startswith("recall@")]
            places = np.arange(len(names)) + (number - (len(embeddings) - 1) / 2) * width
            intervals = [metrics[name] for name in names]
            panel.bar(
                places,
                [interval["value"] for interval in intervals],
                width,
                yerr=_errors(intervals),
                capsize=2,
                label=embedding,
            )
            panel.set_xticks(range(len(names)), names)
        panel.set_title(f"{protocol.replace('_', '-')} protocol")
        panel.set_ylim(0, 1)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("recall")
    panels[0].legend(title="embedding")
    return figure


def _ranks(report: dict[str, Any]) -> Figure:
    """Which share of the targets reaches which rank (published protocol)."""
    figure = Figure(figsize=(6, 4))
    panel = figure.subplots()
    for embedding, parts in report["metrics"].items():
        percentiles = parts["published"]["rank_percentiles"]
        panel.plot(
            list(percentiles.values()), [int(percentile) for percentile in percentiles], marker="o", label=embedding
        )
    panel.set_xscale("log")
    panel.set_xlabel("rank of the target, or better")
    panel.set_ylabel("per cent of the queries")
    panel.set_ylim(0, 100)
    panel.grid(alpha=0.3)
    panel.legend(title="embedding")
    return figure


def _slices(report: dict[str, Any], embedding: str) -> Figure:
    """Recall of every slice of an embedding with its interval, at the middle one of the cut-offs."""
    rows = [row for row in report["slices"] if row["embedding"] == embedding]
    metric = middle_metric(rows[0])
    overall = report["metrics"][embedding]["published"]["metrics"][metric]["value"]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    sizes = [sum(row["group"] == group for row in rows) for group in groups]
    figure = Figure(figsize=(8, 0.32 * len(rows) + 0.5 * len(groups) + 1), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(groups), 1, sharex=True, height_ratios=[size + 1 for size in sizes]))
    for panel, group in zip(panels, groups, strict=True):
        shown = [row for row in rows if row["group"] == group][::-1]
        labels = [f"{_plain(row['slice'])}  ({row['queries']})" for row in shown]
        _points(panel, [row["metrics"][metric] for row in shown], labels)
        panel.axvline(overall, color="grey", linestyle="--", linewidth=1)
        panel.set_title(group, fontsize=9, loc="left")
        panel.set_xlim(-0.02, 1.02)
    panels[-1].set_xlabel(f"{metric} of '{embedding}' (dashed: all queries; in brackets: queries)")
    return figure


def _comparison(report: dict[str, Any]) -> Figure:
    """Differences to the other models with intervals: of all that each reads, then modality by modality."""
    together = report["together"]["models"] if report["together"] else []
    parts = [(model["model"], "all it reads", model["difference"]) for model in together if model["difference"]]
    parts += [
        (other["model"], embedding, protocols)
        for other in report["comparison"]
        for embedding, protocols in other["embeddings"].items()
    ]
    rows = [
        (f"{_plain(short_name(model))}: {embedding}, {protocol.replace('_', '-')}, {metric}", difference)
        for model, embedding, protocols in parts
        for protocol, metrics in protocols.items()
        for metric, difference in metrics.items()
    ][::-1]
    figure = Figure(figsize=(8, 0.25 * len(rows) + 1), layout="constrained")
    panel = figure.subplots()
    points = [
        {"value": difference["difference"], "low": difference["low"], "high": difference["high"]}
        for _, difference in rows
    ]
    _points(panel, points, [label for label, _ in rows])
    panel.axvline(0, color="grey", linestyle="--", linewidth=1)
    panel.set_xlabel(f"difference: {_plain(short_name(report['model']))} minus the other")
    return figure


def _points(panel: Any, values: Sequence[INTERVAL], labels: Sequence[str]) -> None:
    """Values with their intervals, one below the other."""
    places = range(len(values))
    panel.errorbar(
        [interval["value"] for interval in values], places, xerr=_errors(values), fmt="o", markersize=4, capsize=2
    )
    panel.set_yticks(places, labels, fontsize=8)
    panel.set_ylim(-0.6, len(values) - 0.4)
    panel.grid(axis="x", alpha=0.3)


def _errors(values: Sequence[INTERVAL]) -> np.ndarray:
    """(2, n) lengths of the error bars. A bootstrap interval may lie to one side of its value: no bar there."""
    below = [max(0.0, interval["value"] - interval["low"]) for interval in values]
    above = [max(0.0, interval["high"] - interval["value"]) for interval in values]
    return np.array([below, above])


def _plain(text: str) -> str:
    """Without what matplotlib would read as a formula, and short enough for an axis."""
    shown = text.replace("$", r"\$")
    return shown if len(shown) <= 40 else shown[:39] + "…"
