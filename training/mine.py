"""Mine pairs of related items from an interaction log: `python training/mine.py --interactions LOG --output PAIRS.parquet`.

Scores, options and their exact meaning: `training.mining.cooccurrence`. Writes the pairs (query_id, target_id, score, users), for
either side of --split_time if given, and beside the output `PAIRS.rejects.jsonl`: rows of the log that were left out.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table as RichTable

from training.mining.cooccurrence import MiningArguments
from training.mining.mining import Mined, mine, rejects_of
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS, command, parse, plain_console


def show(mined: Mined, arguments: MiningArguments) -> None:
    """The counts of every step, a column for each side, and where everything is."""
    console = plain_console()
    console.print(f"Log:     {arguments.interactions}", soft_wrap=True)
    table = RichTable()
    table.add_column("")
    for name in mined.sides:
        table.add_column(name, justify="right")
    for label in next(iter(mined.sides.values())):
        table.add_row(label, *(f"{counts[label]:,}" for counts in mined.sides.values()))
    console.print(table)
    for reason, count in mined.rejected.items():
        console.print(f"Rows left out: {count:,}, {reason}")
    written = [arguments.output, *([arguments.test_output] if arguments.test_output else [])]
    console.print(f"Pairs:   {' and '.join(written)}\nRejects: {rejects_of(Path(arguments.output))}", soft_wrap=True)


@command("training/mine.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(MiningArguments, options=options)
    mined = mine(arguments)
    show(mined, arguments)
    return DONE_WITH_REJECTS if mined.rejected else DONE


__all__ = ["MiningArguments", "main", "mine"]

if __name__ == "__main__":
    sys.exit(main())
