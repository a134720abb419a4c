"""One page about a training run for people who would rather look: `python training/report.py --run runs/demo`.

Writes RUN/report.html, self-contained and offline, from what the run left there: metrics.json (settings, counts, curves,
figures before and after, baselines, saliency), evaluation.json (intervals, slices, best and worst queries) and the item
table, for pictures. What a run doesn't have, the page says it doesn't have. The plots stand in RUN/plots as well.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.reporting.page import PAGE, write_report
from training.reporting.run_plots import RUN_PLOTS
from training.tables.commands.handler import DONE, FileError, command, parse
from training.tables.commands.hashes import weights_of
from training.tables.commands.options import allow_remote_option
from training.tables.commands.outputs import Output, claimed
from training.tables.items import ItemTable, load_items
from training.tables.remote.places import is_address


@dataclass
class ReportArguments:
    """Which run is shown."""

    run: str = field(metadata={"help": "Folder that training/run.py wrote."})
    items: str | None = field(
        default=None, metadata={"help": "Its item table, for pictures; none: the one that it was trained on."}
    )
    allow_remote: str | None = allow_remote_option()


def items_of(run: Path, source: str | None, allow_remote: str | None = None) -> ItemTable | None:
    """The items that a run was measured on, of its table or the one named; None, with a line, where its table has gone."""
    settings = json.loads((run / "metrics.json").read_text(encoding="utf-8")).get("settings", {})
    named = source or settings.get("items", "")
    if source is None and not Path(named).exists() and not (allow_remote and is_address(named)):
        remedy = "pass --allow_remote" if is_address(named) else "name it with --items"
        print(f"No pictures: the run's item table {named!r} is not there; {remedy}.")
        return None
    items, _ = load_items(
        named, settings.get("split"), False, encoding=settings.get("encoding"), allow_remote=allow_remote
    )
    split = settings.get("eval_split")
    return items.select(items.where("split", split)) if split else items


def report(arguments: ReportArguments) -> Path:
    """The whole job; returns the page's place.

    Raises:
        FileError: for a folder of no finished run, or whose metrics are of another model.
    """
    run = Path(arguments.run)
    try:
        items = items_of(run, arguments.items, arguments.allow_remote)
        with claimed([Output("--run", run, (PAGE, *RUN_PLOTS))], [arguments.items]):
            return write_report(run, items, weights_of(run / "model"))
    except FileNotFoundError as error:
        raise FileError(f"{run} is no folder of a finished run: {error}") from error


@command("training/report.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(ReportArguments, options=options)
    print(f"Report: {report(arguments)}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
