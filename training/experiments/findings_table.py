"""Tables and plots of the findings: `python -m training.experiments.findings_table runs/findings/results.jsonl [MORE.jsonl ...]`.

Prints markdown: for every experiment and data set the mean over seeds of each variant with its 95 % t interval, then
how far it is from the experiment's first variant, seed by seed. Works while the runs go on: `n` says how many seeds there
are. The plots go to `plots/` beside the first file.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import t

from training.experiments.findings import read_results
from training.reporting.figures import write_figure
from training.tables.commands.handler import DONE, FileError, OptionParser, about, command


CONFIDENCE = 0.95
COLUMNS = (
    "both/recall@1",
    "both/recall@10",
    "both/recall@100",
    "both/precision@10",
    "image/recall@100",
    "image/precision@10",
    "text/recall@100",
    "text/precision@10",
)
COMPARED = ("both/recall@100", "both/precision@10", "image/recall@100", "image/precision@10", "text/precision@10")
SHOWN = ("recall@100", "precision@10")
COLOURS = {"both": "tab:blue", "image": "tab:orange", "text": "tab:green"}

Line = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        value: nan without a seed.
        margin: half of the t interval's width; nan below two seeds.
        count: seeds.
    """

    value: float
    margin: float
    count: int

    def __str__(self) -> str:
        if isnan(self.value):
            return "–"
        return f"{self.value:.3f}" if isnan(self.margin) else f"{self.value:.3f} ± {self.margin:.3f}"


@dataclass(frozen=True)
class Group:
    """The runs of one experiment on one data set.

    Attributes:
        items: what the items were given of their texts.
        variants: name to seed to metrics; in the order in which they first came.
    """

    experiment: str
    data: str
    items: str
    variants: dict[str, dict[int, dict[str, float]]]

    def estimate(self, variant: str, metric: str) -> Estimate:
        """The mean over the seeds that have the metric."""
        return estimate([metrics[metric] for metrics in self.variants[variant].values() if metric in metrics])

    def difference(self, variant: str, reference: str, metric: str) -> Estimate:
        """Mean over the seeds that both variants have of one's metric less the other's."""
        ours, theirs = self.variants[variant], self.variants[reference]
        both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        return estimate(
            [
                ours_at[metric] - theirs_at[metric]
                for ours_at, theirs_at in both
                if metric in ours_at and metric in theirs_at
            ]
        )


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent values with Student's interval: mean ± t(0.975, n - 1) * s / sqrt(n)."""
    count = len(values)
    if count < 2:
        return Estimate(values[0] if values else nan, nan, count)
    quantile = t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return Estimate(mean(values), float(quantile) * stdev(values) / sqrt(count), count)


def group(lines: Sequence[Line]) -> list[Group]:
    """The runs by experiment and data set, in the order in which they first came.

    Raises:
        ValueError: when one variant has two runs of one seed: files of different settings don't mix.
    """
    groups: dict[tuple[str, str], Group] = {}
    for line in lines:
        place = line["experiment"], line["data"]
        seeds = groups.setdefault(place, Group(*place, line["items"], {})).variants.setdefault(line["variant"], {})
        if line["seed"] in seeds:
            raise ValueError(
                f"{line['experiment']}, {line['data']}: {line['variant']} has several runs of seed {line['seed']}. "
                "Keep the results of different settings in files of their own."
            )
        seeds[line["seed"]] = line["metrics"]
    return list(groups.values())


def render(groups: Sequence[Group]) -> str:
    """All tables in markdown."""
    parts = []
    for runs in groups:
        items = "" if runs.items == "as they are" else f" (items: {runs.items})"
        parts.append(f"**{runs.experiment}, {runs.data}**{items}\n\n{_means(runs)}")
        if differences := _differences(runs):
            parts.append(differences)
    return "\n\n".join(parts)


def _means(runs: Group) -> str:
    columns = [c for c in COLUMNS if any(c in m for seeds in runs.variants.values() for m in seeds.values())]
    rows = [
        [name, str(len(seeds)), *(str(runs.estimate(name, column)) for column in columns)]
        for name, seeds in runs.variants.items()
    ]
    return markdown(["variant", "n", *(column.replace("/", " ") for column in columns)], rows)


def _differences(runs: Group) -> str | None:
    """Against the first variant; an interval that leaves out zero is bold. None where there is nothing to compare."""
    reference, *others = runs.variants
    rows = []
    for name in others:
        differences = [runs.difference(name, reference, metric) for metric in COMPARED]
        seeds = max(difference.count for difference in differences)
        if seeds > 1:
            rows.append([f"{name} − {reference}", str(seeds), *map(_signed, differences)])
    return markdown(["difference", "n", *(metric.replace("/", " ") for metric in COMPARED)], rows) if rows else None


def _signed(difference: Estimate) -> str:
    if isnan(difference.margin):
        return "–"
    text = f"{difference.value:+.3f} ± {difference.margin:.3f}"
    return f"**{text}**" if abs(difference.value) > difference.margin else text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all but the first column stand to the right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *rows))


def draw_plots(groups: Sequence[Group], folder: Path) -> Iterator[Path]:
    """A PNG for every experiment and data set, written beside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    for runs in groups:
        name = re.sub(r"\W+", "_", f"{runs.experiment} {runs.data}".lower()).strip("_")
        write_figure(_figure(runs), folder / f"{name}.png")
        yield folder / f"{name}.png"


def _figure(runs: Group) -> Figure:
    """A bar with its interval for each variant and modality, a panel for each metric."""
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(runs.variants)))
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    height = 0.8 / len(COLOURS)
    for panel, metric in zip(panels, SHOWN, strict=True):
        for number, (modality, colour) in enumerate(COLOURS.items()):
            estimates = [runs.estimate(name, f"{modality}/{metric}") for name in runs.variants]
            places = [row + (number - 1) * height for row in range(len(estimates))]
            margins = [bar.margin for bar in estimates]  # nan draws none
            panel.barh(
                places, [bar.value for bar in estimates], height, xerr=margins, color=colour, capsize=2, label=modality
            )
        panel.set_xlabel(metric)
        panel.set_xlim(left=0)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(runs.variants)), runs.variants)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper right", ncols=len(COLOURS))
    figure.suptitle(f"{runs.experiment}, {runs.data}", x=0.125, ha="left")
    return figure


@command("training.experiments.findings_table")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    parser = OptionParser(prog="python -m training.experiments.findings_table")
    parser.add_argument("results", metavar="RESULTS.jsonl", nargs="+", type=Path, help="What findings.py wrote.")
    paths: list[Path] = parser.parse_args(options).results
    lines = []
    for path in paths:
        with about(path, "Pass a file that training.experiments.findings wrote."):
            results = read_results(path)
        if not results:
            raise FileError(f"{path} has no finished run yet; run training.experiments.findings.")
        lines += results
    groups = group(lines)
    print(render(groups))
    print("\n" + "\n".join(f"Plot: {place}" for place in draw_plots(groups, paths[0].parent / "plots")))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
