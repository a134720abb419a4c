"""Brings an index up to a new version of its catalogue: what is unchanged stays where it is.

A flat index is written anew, which costs no more than reading the vectors. In a graph and in clusters new vectors are added,
and rows of items that are gone or have another vector lose their id: nobody finds them. When such rows come to more than a
fifth, the index is built anew.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from hub.catalogue.catalogue import Catalogue, TitleArguments, new_folder
from hub.neighbours.building import build_from, ids_schema, write_index
from hub.neighbours.index import IDS_FILE, INDEX_FILE, Index
from training.tables.commands.handler import OptionError
from training.tables.commands.outputs import Output, claimed
from training.tables.items import ItemTable


MOST_DROPPED = 0.2
"""Share of rows without an item up to which they stay: they cost memory and time, and a graph loses its short ways."""


@dataclass
class UpdateArguments(TitleArguments):
    """Which index, and the vectors that it shall hold."""

    index: str = field(metadata={"help": "Folder of an index; the new version takes its place as a whole."})
    embeddings: str = field(metadata={"help": "Folder that hub/encode.py wrote."})


def update(arguments: UpdateArguments) -> dict[str, Any]:
    """Update an index; returns what index.json holds, with `added` and `dropped`, which it doesn't hold.

    Raises:
        OptionError: without the item table of an index that has titles.
        ValueError: for an index, embeddings or an item table that can't be relied on.
    """
    output = Path(arguments.index)
    with claimed([Output("--index", output)], (arguments.embeddings, arguments.items)):
        old = Index.load(output)
        if "title" in old.ids.column_names and not arguments.items:
            raise OptionError(f"{output} has titles: pass --items with the table that was encoded.")
        catalogue = Catalogue.open(arguments.embeddings)
        table = arguments.table()
        kind, column = old.settings["kind"], old.settings["embedding"]
        rows = _Rows(old, catalogue, column)
        if kind == "flat" or rows.are_another_index or rows.dropped > MOST_DROPPED * rows.all_rows:
            made = build_from(catalogue, column, table, kind, output)
        else:
            with new_folder(output) as folder:
                made = _updated(old, output, folder, rows, catalogue, table)
    return {**made, "added": rows.added, "dropped": rows.gone}


class _Rows:
    """Which rows of an index stay, told by the states of the new version's items.

    Attributes:
        stays: (n,) bool, of the index's rows.
        added: items of the new version that are not in it as they are.
        gone: rows whose item is no longer there, or has another vector.
        dropped: all rows that would be without an item.
        all_rows: that the updated index would have.
    """

    def __init__(self, old: Index, catalogue: Catalogue, column: str):
        self.column = column
        self.are_another_index = "state" not in old.ids.column_names or old.width != catalogue.width
        states = old.ids["state"].to_numpy() if "state" in old.ids.column_names else np.zeros(len(old.ids), np.uint64)
        there = old.ids["item_id"].is_valid().to_numpy()
        rows = np.flatnonzero(there)
        order = np.argsort(states[rows], kind="stable")
        self._states, self._rows = states[rows][order], rows[order]
        self.stays = np.zeros(len(states), bool)
        self.added = 0
        for batch in catalogue.batches(column):
            rows_now = self.of(batch.states())
            self.stays[rows_now[rows_now >= 0]] = True
            self.added += int((rows_now < 0).sum())
        self.gone = int((there & ~self.stays).sum())
        self.all_rows = len(states) + self.added
        self.dropped = len(states) - int(self.stays.sum())

    def of(self, states: pa.Array) -> np.ndarray:
        """(n,) int64 row of each item in the index; -1 for one that isn't in it as it is."""
        if not len(self._states):
            return np.full(len(states), -1)
        wanted = states.to_numpy()
        at = np.searchsorted(self._states, wanted).clip(max=len(self._states) - 1)
        return np.where(self._states[at] == wanted, self._rows[at], -1)


def _updated(
    old: Index, place: Path, folder: Path, rows: _Rows, catalogue: Catalogue, table: ItemTable | None
) -> dict[str, Any]:
    index = faiss.read_index(str(place / INDEX_FILE))  # in memory: a mapped one can't grow
    schema = ids_schema(table)
    parts, places, behind = [], [], len(old.ids)
    for batch in catalogue.batches(rows.column, table):
        states = batch.states()
        at = rows.of(states)
        new = at < 0
        if new.any():
            index.add(batch.vectors[new])
        at[new] = np.arange(behind, behind + new.sum())
        behind += int(new.sum())
        places.append(at)
        parts.append(pa.record_batch(batch.metadata() | {"state": states}, schema))
    rows_of_items = np.concatenate(places)
    position = np.full(behind, -1)
    position[rows_of_items] = np.arange(len(rows_of_items))
    ids = pa.Table.from_batches(parts, schema).combine_chunks()
    taken = ids.take(pa.array(np.where(position < 0, 0, position), mask=position < 0))
    with pa.OSFile(str(folder / IDS_FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        file.write_table(taken)
    made = {name: old.settings[name] for name in ("kind", "embedding", "parameters")}
    return write_index(index, folder, {**made, "items": len(rows_of_items)}, catalogue)
