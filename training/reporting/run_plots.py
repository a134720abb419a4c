"""The pictures of a training report: curves of the log, and saliency by layer."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from training.reporting.figures import write_figure


CURVES = {
    "loss": ("loss", "multimodal_loss", "visual_loss"),
    "recall inside the batch": ("in_batch_recall",),
    "gate (1: the picture's summary is left out)": ("gate_mean",),
    "temperature": ("temperature",),
    "items a second": ("items_per_second",),
    "evaluation": ("eval_recall@1", "eval_recall@10", "eval_recall@100"),
}
"""Panels and what of the log they show."""

RUN_PLOTS = ("plots/curves.png", "plots/saliency.png")

KINDS = {"visual": "tab:orange", "text": "tab:blue", "other": "tab:gray"}
STYLES = ("--", "-", ":", "-.")
READ_OUTS = {"multimodal": "into the multimodal embedding", "visual": "into the visual embedding"}


def draw_report_plots(metrics: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """PNG files of a run, by name; a plot without data is left out.

    Args:
        metrics: content of metrics.json; "log", and "saliency" as name of a run to the fields of
            `training.evaluation.saliency.Saliency`.
    """
    places = {}
    for name, figure in _figures(metrics):
        places[name] = folder / f"{name}.png"
        write_figure(figure, places[name])
    return places


def _figures(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    log = metrics.get("log", [])
    panels = {title: names for title, names in CURVES.items() if any(name in line for line in log for name in names)}
    if panels:
        yield "curves", curves(log, panels)
    if metrics.get("saliency"):
        yield "saliency", saliency(metrics["saliency"])


def curves(log: Sequence[Mapping[str, float]], panels: Mapping[str, Sequence[str]]) -> Figure:
    """A panel for each entry: what of the log it shows, over the steps."""
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(10.5, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, min(3, len(panels)), squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            points = [(line["step"], line[name]) for line in log if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("eval_"))
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.yaxis.get_major_formatter().set_useOffset(False)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    return figure


def saliency(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Shares of the information flow by layer: a panel for each read-out, a colour for each kind of token, a dash for
    each of the runs."""
    shown = [name for name in READ_OUTS if any(run.get(name) for run in runs.values())]
    figure = Figure(figsize=(5.2 * len(shown), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for style, (run, shares) in zip(STYLES * len(runs), runs.items(), strict=False):
            for kind, colour in KINDS.items():
                if shares.get(name):
                    values = shares[name][kind]
                    axis.plot(range(1, len(values) + 1), values, style, color=colour, label=f"{kind}, {run}")
        axis.set_title(f"Information flow {READ_OUTS[name]}", fontsize=10, loc="left")
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel("share")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2)
    return figure
