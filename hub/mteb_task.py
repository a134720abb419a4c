"""Measure any models of mteb on your own catalogue: `python hub/mteb_task.py --items I --pairs P --model A B --output DIR`.

Writes DIR/task (the catalogue as a retrieval task of mteb, ready for the Hub), DIR/scores.json (every score of every model,
with mteb's own result), DIR/scores.md (the main ones) and DIR/rejects.jsonl (rows and items that were left out, with the
reason). hub/card.py --mteb puts scores.json into a model's card. Needs the dependency group `mteb`.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hub.benchmark.folder import CARD, FILES
from hub.benchmark.measuring import REJECTS, SCORES, SHOWN, SHOWN_SCORES, TASK, TaskArguments, measure, score_rows
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS, command, parse, plain_console
from training.tables.commands.outputs import Output, claimed


WRITTEN = (*(f"{TASK}/{name}" for name in (CARD, *FILES.values())), SCORES, SHOWN_SCORES, REJECTS)


def show(report: dict[str, Any], output: Path) -> None:
    """The main scores on the terminal, and where everything is."""
    console, counts = plain_console(), report["counts"]
    table = Table(title=f"{report['task']['name']}: {counts['queries']} queries, {counts['corpus']} items")
    for number, name in enumerate(("model", "reads", *SHOWN)):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in score_rows(report):
        table.add_row(*row)
    console.print(table)
    rejected = report["rejected_rows"]
    console.print(f"Rows left out: {rejected}" + (f", see {output / REJECTS}" if rejected else ""))
    for name in (SCORES, SHOWN_SCORES, TASK):
        console.print(str(output / name), soft_wrap=True)


@command("hub/mteb_task.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(TaskArguments, options=options)
    output = Path(arguments.output)
    with claimed([Output("--output", output, WRITTEN)], (arguments.items, arguments.pairs, *arguments.model)):
        report = measure(arguments)
    show(report, output)
    return DONE_WITH_REJECTS if report["rejected_rows"] else DONE


if __name__ == "__main__":
    sys.exit(main())
