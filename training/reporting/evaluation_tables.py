"""The content of evaluation.json (schema: `training.evaluate`) as tables for people: Markdown, and on the terminal."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.tables.commands.handler import plain_console
from training.tables.commands.markdown import as_text
from training.tables.commands.outputs import MARK


PROTOCOLS = {
    "published": "Published protocol: one target for each query, among all items that are no query",
    "multi_positive": "Multi-positive protocol: all known targets of a query, among all items but itself",
}
LEFT = ("embedding", "group", "slice", "protocol", "metric", "model", "kind", "reads", "lacks")
"""Columns of words."""


def as_markdown(report: dict[str, Any]) -> str:
    """All tables of an evaluation."""
    confidence = f"{report['settings']['confidence']:.0%}"
    counts = report["counts"]
    lines = [
        f"<!-- {MARK} -->",
        f"# Evaluation of {as_text(report['model'])}",
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
    lines += ["", "## Models", "", *_markdown(*model_rows(report))]
    if report["together"]:
        lines += ["", "## All models, each with all that it reads, over the items that all can embed"]
        for protocol in PROTOCOLS:
            names = metric_names(report, protocol)
            lines += ["", together_title(report, protocol), "", *_markdown(*together_rows(report, protocol, names))]
    for other in report["comparison"]:
        lines += ["", f"## Difference to {as_text(other['model'])} on the same queries, modality by modality", ""]
        lines += _markdown(*comparison_rows(other))
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
    _print(console, "Models", *cost_rows(report))
    if report["together"]:
        for protocol in PROTOCOLS:
            shown = _middle([name for name in metric_names(report, protocol) if name.startswith("recall@")])
            _print(console, together_title(report, protocol), *together_rows(report, protocol, [shown]))
    elif report["comparison"]:
        console.print("All models: no pair has two items that every model can embed.")
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
    return _middle(list(row["metrics"]))


def _middle(names: Sequence[str]) -> str:
    return names[(len(names) - 1) // 2]


def short_name(model: str) -> str:
    """The last two parts of a model's folder, or its id."""
    return "/".join(Path(model).parts[-2:])


def cost_rows(report: dict[str, Any]) -> Rows:
    """As `model_rows`, as much as a terminal is wide."""
    titles, rows = model_rows(report)
    narrow = [column for column, title in enumerate(titles) if title not in ("kind", "reads")]
    return [titles[column] for column in narrow], [[row[column] for column in narrow] for row in rows]


def model_rows(report: dict[str, Any]) -> Rows:
    """Kind and cost of each model."""
    titles = ["model", "kind", "reads", "lacks", "parameters", "dimension", "items/s"]
    rows = [
        [
            *(short_name(model["model"]), model["kind"], model["reads"], ", ".join(model["lacks"]) or "nothing"),
            *(f"{model['parameters']:,}", str(model["dimension"]), f"{model['items_per_second']:.1f}"),
        ]
        for model in report["models"]
    ]
    return titles, rows


def metric_names(report: dict[str, Any], protocol: str) -> list[str]:
    """Metrics that all models were compared by."""
    return list(report["together"]["models"][0]["metrics"][protocol])


def together_title(report: dict[str, Any], protocol: str) -> str:
    """How much the models were compared on."""
    together = report["together"]
    return (
        f"{protocol.replace('_', '-').capitalize()} protocol: {together['items']} items, "
        f"{together['queries'][protocol]} queries, {together['candidates'][protocol]} candidates"
    )


def together_rows(report: dict[str, Any], protocol: str, names: Sequence[str]) -> Rows:
    """Every model with what it reaches, and how much the first exceeds it."""
    titles = ["model", "reads", "parameters", "items/s"]
    titles += [title for name in names for title in (name, "first minus this", "p")]
    rows = []
    for model, about in zip(report["together"]["models"], report["models"], strict=True):
        row = [
            short_name(model["model"]),
            model["embedding"],
            f"{about['parameters']:,}",
            f"{about['items_per_second']:.1f}",
        ]
        for name in names:
            row.append(interval(model["metrics"][protocol][name]))
            row += _difference(model["difference"][protocol][name]) if model["difference"] else ["", ""]
        rows.append(row)
    return titles, rows


def comparison_rows(other: dict[str, Any]) -> Rows:
    """Every metric of the first model and another one."""
    return ["embedding", "protocol", "metric", "first", "this", "first minus this", "p"], [
        [
            name,
            protocol.replace("_", " "),
            metric,
            f"{measured['value']:.3f}",
            f"{measured['other']:.3f}",
            *_difference(measured),
        ]
        for name, protocols in other["embeddings"].items()
        for protocol, metrics in protocols.items()
        for metric, measured in metrics.items()
    ]


def interval(value: dict[str, float]) -> str:
    """0.302 [0.281, 0.323]"""
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _difference(measured: dict[str, float]) -> list[str]:
    """+0.021 [-0.003, +0.045], and the p value."""
    bounds = f"{measured['difference']:+.3f} [{measured['low']:+.3f}, {measured['high']:+.3f}]"
    return [bounds, f"{measured['p_value']:.3f}"]


def _markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [[as_text(cell) for cell in line] for line in (titles, *rows)]
    lines.insert(1, ["---"] * len(titles))
    return ["| " + " | ".join(line) + " |" for line in lines]


def _print(console: Console, title: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=title)
    for name in titles:
        table.add_column(name, justify="left" if name in LEFT else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
