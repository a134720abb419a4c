"""The content of evaluation.json (schema: `training.evaluate`) as tables for people: Markdown, and on the terminal."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.tables.commands.handler import plain_console
from training.tables.commands.outputs import MARK


PROTOCOLS = {
    "published": "Published protocol: one target for each query, among all items that are no query",
    "multi_positive": "Multi-positive protocol: all known targets of a query, among all items but itself",
}
LEFT = ("embedding", "group", "slice", "protocol", "metric")
"""Columns of words."""


def as_markdown(report: dict[str, Any]) -> str:
    """All tables of an evaluation."""
    confidence = f"{report['settings']['confidence']:.0%}"
    counts = report["counts"]
    lines = [
        f"<!-- {MARK} -->",
        f"# Evaluation of `{report['model']}`",
        "",
        f"{counts['items']} items, {counts['pairs']} pairs, {counts['rejected_rows']} rows left out. In brackets: "
        f"{confidence} bootstrap intervals over queries. Ties count against the model.",
    ]
    for protocol, title in PROTOCOLS.items():
        lines += ["", f"## {title}", "", *_markdown(*metric_rows(report, protocol)), ""]
        lines += _markdown(*percentile_rows(report, protocol))
    if any(parts["labels"] for parts in report["metrics"].values()):
        lines += ["", "## Neighbours with the same label", "", *_markdown(*label_rows(report))]
    lines += ["", "## Slices (published protocol)", "", *_markdown(*slice_rows(report))]
    if report["comparison"]:
        lines += ["", f"## Compared with `{report['compared_with']}` on the same queries", ""]
        lines += _markdown(*comparison_rows(report))
    if report["plots"]:
        lines += ["", "## Plots", "", *(f"![{name}]({place})" for name, place in report["plots"].items())]
    return "\n".join(lines) + "\n"


def show(report: dict[str, Any], output: Path) -> None:
    """Metrics, slices of the first embedding and the comparison on the terminal, and where everything is."""
    console = plain_console()
    for protocol in PROTOCOLS:
        _print(console, f"{protocol.replace('_', '-').capitalize()} protocol", *metric_rows(report, protocol))
    first = next(iter(report["metrics"]))
    _print(console, f"Slices of '{first}' (published protocol)", *short_slice_rows(report, first))
    if report["comparison"]:
        _print(console, f"Compared with {report['compared_with']}", *comparison_rows(report))
    rejected = report["counts"]["rejected_rows"]
    console.print(f"Rows left out: {rejected}" + (f", see {output / 'rejects.jsonl'}" if rejected else ""))
    for name in ("evaluation.json", "evaluation.md", "plots"):
        console.print(str(output / name), soft_wrap=True)


Rows = tuple[list[str], list[list[str]]]
"""Column titles, and the rows under them."""


def metric_rows(report: dict[str, Any], protocol: str) -> Rows:
    """One column for each embedding, and one for a random ranking among the first one's candidates where it is known."""
    parts = {name: measured[protocol] for name, measured in report["metrics"].items()}
    first = next(iter(parts.values()))
    random = first.get("random")
    rows = [[size, *(str(part[size]) for part in parts.values())] for size in ("queries", "candidates")]
    rows += [[name, *(interval(part["metrics"][name]) for part in parts.values())] for name in first["metrics"]]
    if random is not None:
        for row in rows:
            row.append(f"{random[row[0]]:.3f}" if row[0] in random else "")
    return ["metric", *parts, *(["random"] if random is not None else [])], rows


def percentile_rows(report: dict[str, Any], protocol: str) -> Rows:
    """The rank that each per cent of the targets reaches."""
    parts = {name: measured[protocol]["rank_percentiles"] for name, measured in report["metrics"].items()}
    percents = list(next(iter(parts.values())))
    rows = [[name, *(f"{part[percent]:.0f}" for percent in percents)] for name, part in parts.items()]
    return ["embedding", *(f"{percent} % rank within" for percent in percents)], rows


def label_rows(report: dict[str, Any]) -> Rows:
    """Precision of each embedding."""
    parts = {name: measured["labels"] for name, measured in report["metrics"].items() if measured["labels"]}
    names = list(next(iter(parts.values()))["metrics"])
    rows = [
        [
            name,
            str(part["items"]),
            *(f"{interval(part['metrics'][metric])}, random {part['random'][metric]:.3f}" for metric in names),
        ]
        for name, part in parts.items()
    ]
    return ["embedding", "items", *names], rows


def slice_rows(report: dict[str, Any]) -> Rows:
    """Every slice of every embedding with recall at every cut-off."""
    names = list(report["slices"][0]["metrics"])
    rows = [
        [row["embedding"], row["group"], row["slice"], str(row["queries"])]
        + [interval(row["metrics"][name]) for name in names]
        for row in report["slices"]
    ]
    return ["embedding", "group", "slice", "queries", *names], rows


def short_slice_rows(report: dict[str, Any], embedding: str) -> Rows:
    """The slices of one embedding with recall at the middle cut-off: as much as a terminal is wide."""
    chosen = [row for row in report["slices"] if row["embedding"] == embedding]
    name = middle_metric(chosen[0])
    rows = [[row["group"], row["slice"], str(row["queries"]), interval(row["metrics"][name])] for row in chosen]
    return ["group", "slice", "queries", name], rows


def middle_metric(row: dict[str, Any]) -> str:
    """Of a slice's recalls the one at the middle cut-off."""
    names = list(row["metrics"])
    return names[(len(names) - 1) // 2]


def comparison_rows(report: dict[str, Any]) -> Rows:
    """Every metric of both models."""
    return ["embedding", "protocol", "metric", "this", "other", "difference", "p"], list(_comparison(report))


def interval(value: dict[str, float]) -> str:
    """0.302 [0.281, 0.323]"""
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _comparison(report: dict[str, Any]) -> Iterator[list[str]]:
    for name, protocols in report["comparison"].items():
        for protocol, metrics in protocols.items():
            for metric, measured in metrics.items():
                bounds = f"{measured['difference']:+.3f} [{measured['low']:+.3f}, {measured['high']:+.3f}]"
                yield [
                    name,
                    protocol.replace("_", " "),
                    metric,
                    f"{measured['value']:.3f}",
                    f"{measured['other']:.3f}",
                    bounds,
                    f"{measured['p_value']:.3f}",
                ]


def _markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _print(console: Console, title: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=title)
    for name in titles:
        table.add_column(name, justify="left" if name in LEFT else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
