"""The findings as tables and a plot: `python -m training.findings_table runs/findings/results.jsonl [--output DIR]`.

One table for each experiment and data set, in Markdown: means over the seeds with the 95 % interval that Student's t gives
for them, and the number of seeds, also of experiments that are not finished. With --output the tables go into
DIR/findings.md and DIR/findings.png as well.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats
from transformers import HfArgumentParser

from training.findings import read_results


COLUMNS = {
    "both/recall@10": "recall@10, both",
    "image/recall@10": "image alone",
    "text/recall@10": "text alone",
    "both/recall@100": "recall@100, both",
    "image/recall@100": "image alone",
    "text/recall@100": "text alone",
    "both/precision@10": "precision@10, both",
}
PLOTTED = "recall@10"
MODALITIES = ("both", "image", "text")
CONFIDENCE = 0.95

Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        half_width: of the 95 % interval; NaN with one seed.
        count: seeds.
    """

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if np.isnan(self.half_width) else f" ± {self.half_width:.3f}")


@dataclass
class TableArguments:
    """Where the results are, and where the tables go."""

    results: str = field(metadata={"help": "File that training.findings wrote."})
    output: str | None = field(default=None, metadata={"help": "Folder for findings.md and findings.png."})


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent values with Student's interval: mean ± t(0.975, n - 1) * s / sqrt(n)."""
    count = len(values)
    if count < 2:
        return Estimate(float(np.mean(values)), float("nan"), count)
    width = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return Estimate(float(np.mean(values)), float(width), count)


def group(results: Results) -> dict[tuple[str, str], dict[str, list[Mapping[str, float]]]]:
    """(experiment, data set) to variant to the metrics of its seeds, all in the order of the file."""
    found: dict[tuple[str, str], dict[str, list[Mapping[str, float]]]] = {}
    for line in results:
        variants = found.setdefault((line["experiment"], line["data"]), {})
        variants.setdefault(line["variant"], []).append(line["metrics"])
    return found


def estimates(runs: Sequence[Mapping[str, float]], metric: str) -> Estimate | None:
    """Of the runs that have the metric; None where none has."""
    values = [metrics[metric] for metrics in runs if metric in metrics]
    return estimate(values) if values else None


def markdown(results: Results) -> str:
    """All tables."""
    parts = []
    for (experiment, data), variants in group(results).items():
        rows = [["variant", "seeds", *COLUMNS.values()], ["---"] * (2 + len(COLUMNS))]
        for variant, runs in variants.items():
            cells = [estimates(runs, metric) for metric in COLUMNS]
            rows.append([variant, str(len(runs)), *("" if cell is None else str(cell) for cell in cells)])
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"**{experiment}**, {data}\n\n{lines}\n")
    return "\n".join(parts)


def plot(results: Results, path: Path) -> None:
    """Recall@10 of every variant with both modalities, the image alone and the text alone, with intervals; a PNG file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot  # after the backend is chosen

    tables = group(results)
    figure, axes = pyplot.subplots(
        len(tables), 1, figsize=(9, 1 + 2.6 * len(tables)), squeeze=False, layout="constrained"
    )
    for ((experiment, data), variants), axis in zip(tables.items(), axes[:, 0], strict=True):
        for shift, modality in enumerate(MODALITIES):
            found = [estimates(runs, f"{modality}/{PLOTTED}") for runs in variants.values()]
            at = [number + 0.27 * (shift - 1) for number, one in enumerate(found) if one]
            heights = [one.mean for one in found if one]
            errors = [np.nan_to_num(one.half_width) for one in found if one]
            axis.bar(at, heights, 0.25, yerr=errors, label=modality, capsize=2)
        axis.set_xticks(range(len(variants)), list(variants), rotation=15)
        axis.set_title(f"{experiment}, {data}", loc="left", fontsize=10)
        axis.set_ylabel(PLOTTED)
    axes[0, 0].legend(ncols=3, fontsize=8)
    beside = path.with_name(path.name + ".tmp")
    figure.savefig(beside, dpi=110, format="png")
    pyplot.close(figure)
    os.replace(beside, path)


def main() -> None:
    """Entry point; a results file that can't be read ends with a message alone."""
    arguments = HfArgumentParser(TableArguments).parse_args_into_dataclasses(
        args=["--results", *sys.argv[1:]] if sys.argv[1:2] and not sys.argv[1].startswith("-") else None
    )[0]
    try:
        results = read_results(Path(arguments.results))
    except ValueError as error:
        raise SystemExit(f"training.findings_table: {arguments.results}: {error}") from error
    if not results:
        raise SystemExit(f"training.findings_table: {arguments.results} has no result; run training.findings first.")
    print(markdown(results))
    if arguments.output:
        folder = Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / "findings.md.tmp"
        beside.write_text(markdown(results), encoding="utf-8")
        os.replace(beside, folder / "findings.md")
        plot(results, folder / "findings.png")
        print(f"Tables and plot: {folder / 'findings.md'}, {folder / 'findings.png'}")


if __name__ == "__main__":
    main()
