"""What is wrong with the tables of a run, counted and listed before anything is trained.

Every image is opened. Rows that training would leave out are listed with their reason, and so are those that it would
take though they spoil a result: pairs that occur twice, and test items that training sees.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from training.tables.commands.handler import plain_console
from training.tables.items import ItemTable, load_items
from training.tables.pairs import PAIR_IDS, MatchedPairs, match_pairs
from training.tables.rejects import RejectedRows, Rejects, write_rejects


REPEATED = "the pair occurs twice"
LEAKED = "a test item is seen in training"


def validate(
    items: str,
    train_pairs: str,
    eval_pairs: str | None,
    output: Path,
    eval_split: str | None = None,
    num_workers: int = 0,
    console: Console | None = None,
    split: str | None = None,
    encoding: str | None = None,
    allow_remote: str | None = None,
) -> dict[str, int]:
    """Check all tables, list the faults in `output`/rejects.jsonl and print the figures.

    Memory: as training's for the tables, and 8 bytes for each fault.

    Args:
        items, train_pairs, eval_pairs: the tables; without `eval_pairs` nothing can leak.
        eval_split: items whose column `split` says this are the test items; without it, those of `eval_pairs` are.
        num_workers: processes that open images.
        split: of `items`.
        encoding, allow_remote: of all tables, as of `training.tables.reading.open_table`.

    Returns:
        Counts under "items", "train_pairs", "eval_pairs" (usable rows), "test_items_in_training" and "<table>: <reason>".

    Raises:
        TableError: when a table can't be used at all.
    """
    table, rejects = load_items(items, split, True, num_workers, encoding, allow_remote)
    train = match_pairs(train_pairs, table, encoding=encoding)
    figures = {"items": len(table), "train_pairs": len(train.pairs)}
    test: MatchedPairs | None = None
    if eval_pairs is not None:
        test = match_pairs(eval_pairs, table, encoding=encoding)
        figures["eval_pairs"] = len(test.pairs)
    rejected = [rejects, train.rejects, repeated_pairs(train, len(table))]
    if test is not None:
        rejected += [test.rejects, repeated_pairs(test, len(table))]
    held_out = _test_items(table, test, eval_split)
    leaked = held_out & _marked(train.pairs, len(table))
    figures["test_items_in_training"] = int(leaked.sum())
    rejected.append(
        Rejects(RejectedRows(train.table, train.rows[leaked[train.pairs].any(1)], LEAKED, id_columns=PAIR_IDS))
    )

    write_rejects(chain.from_iterable(rejected), output / "rejects.jsonl")
    counted: Counter[tuple[str, str]] = sum((rejects.counts() for rejects in rejected), Counter())
    show(figures, counted, output / "rejects.jsonl", console or plain_console())
    return figures | {f"{source}: {reason}": count for (source, reason), count in counted.items()}


def repeated_pairs(matched: MatchedPairs, num_items: int) -> Rejects:
    """Rows whose (query, target) stands in an earlier row; training takes them, so such a pair counts more than once."""
    keys = matched.pairs[:, 0].astype(np.int64) * num_items + matched.pairs[:, 1]
    in_order = np.sort(keys)
    twice = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    rows = np.flatnonzero(np.isin(keys, twice))
    order = rows[np.argsort(keys[rows], kind="stable")]
    later = np.sort(order[1:][keys[order[1:]] == keys[order[:-1]]])
    return Rejects(RejectedRows(matched.table, matched.rows[later], REPEATED, id_columns=PAIR_IDS))


def show(figures: Mapping[str, int], counted: Mapping[tuple[str, str], int], path: Path, console: Console) -> None:
    """The figures as two tables, and where the list is."""
    usable = Table(title="Usable rows")
    usable.add_column("table")
    usable.add_column("rows", justify="right")
    for name in ("items", "train_pairs", "eval_pairs"):
        if name in figures:
            usable.add_row(name, f"{figures[name]:,}")
    console.print(usable)
    if not counted:
        console.print("Nothing is wrong with them.")
        return
    faults = Table(title="Faults")
    for name in ("table", "reason"):
        faults.add_column(name, overflow="fold")
    faults.add_column("rows", justify="right")
    for (source, reason), count in sorted(counted.items()):
        faults.add_row(source, reason, f"{count:,}")
    console.print(faults)
    if figures["test_items_in_training"]:
        console.print(f"{figures['test_items_in_training']:,} test items are seen in training.", style="bold")
    console.print(f"Rows and reasons: {path}")


def _test_items(items: ItemTable, test: MatchedPairs | None, eval_split: str | None) -> np.ndarray:
    """(items,) bool."""
    if eval_split is not None:
        return _marked(items.where("split", eval_split), len(items))
    return _marked(test.pairs if test is not None else np.empty(0, dtype=np.int32), len(items))


def _marked(positions: np.ndarray, count: int) -> np.ndarray:
    marked = np.zeros(count, dtype=bool)
    marked[positions] = True
    return marked
