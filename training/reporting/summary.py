"""What a run prints at its end: one table of all stages, and where everything is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from training.tables.commands.handler import plain_console


SHOWN = ("recall@1", "recall@10", "recall@100", "precision@10")


def result_rows(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    """The figures of all stages as a table.

    Args:
        report: content of metrics.json.

    Returns:
        The metrics shown, and for each stage its rows: a label, then a value for each metric. Empty without an evaluation.
    """
    if not report["after"]:
        return [], []
    shown = [metric for metric in SHOWN if f"random/{metric}" in report["random"]]
    stages = []
    for stage in ("random", "baselines", "before", "after"):
        names = dict.fromkeys(key.rsplit("/", 1)[0] for key in report[stage] if "/" in key)
        labels = {name: name if stage == "random" else f"{stage.removesuffix('s')}: {name}" for name in names}
        rows = [
            [label, *(f"{report[stage].get(f'{name}/{metric}', float('nan')):.3f}" for metric in shown)]
            for name, label in labels.items()
        ]
        stages.append((stage, rows))
    return shown, stages


def show(report: dict[str, Any], output: Path) -> None:
    """The closing table of `metrics.json`'s content, and the places of model, metrics and logs."""
    console = plain_console()
    shown, stages = result_rows(report)
    if stages:
        table = Table(title=f"{report['random']['queries']} queries among {report['random']['candidates']} candidates")
        table.add_column("embedding")
        for metric in shown:
            table.add_column(metric, justify="right")
        for _, rows in stages:
            for row in rows:
                table.add_row(*row)
            table.add_section()
        console.print(table)
    if report.get("trained_share"):
        console.print(f"{report['trained_share']:.1%} of the pairs measured on are train pairs: figures of memory.")
    rejected = report["counts"]["rejected_rows"]
    console.print(f"Rows left out: {rejected}" + (f", see {output / 'rejects.jsonl'}" if rejected else ""))
    console.print(f"Model:   {output / 'model'}\nMetrics: {output / 'metrics.json'}\nLogs:    {output / 'logs'}")
    if report["settings"]["report"] and (output / "report.html").exists():
        console.print(f"Report:  {output / 'report.html'}")
