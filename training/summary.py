"""What a run prints at its end: one table of all stages, and where everything is."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


SHOWN = ("recall@1", "recall@10", "recall@100", "precision@10")


def show(report: dict[str, Any], output: Path) -> None:
    """The closing table of `metrics.json`'s content, and the places of model, metrics and logs."""
    console = Console()
    if report["after"]:
        table = Table(title=f"{report['random']['queries']} queries among {report['random']['candidates']} candidates")
        table.add_column("embedding")
        shown = [metric for metric in SHOWN if f"random/{metric}" in report["random"]]
        for metric in shown:
            table.add_column(metric, justify="right")
        for stage in ("random", "baselines", "before", "after"):
            names = dict.fromkeys(key.rsplit("/", 1)[0] for key in report[stage] if "/" in key)
            for name in names:
                label = name if stage == "random" else f"{stage.removesuffix('s')}: {name}"
                table.add_row(
                    label, *(f"{report[stage].get(f'{name}/{metric}', float('nan')):.3f}" for metric in shown)
                )
            table.add_section()
        console.print(table)
    rejected = report["counts"]["rejected_rows"]
    console.print(f"Rows left out: {rejected}" + (f", see {output / 'rejects.jsonl'}" if rejected else ""))
    console.print(f"Model:   {output / 'model'}\nMetrics: {output / 'metrics.json'}\nLogs:    {output / 'logs'}")
