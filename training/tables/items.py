"""Item tables, checked and addressed by position: what training, evaluation, encoding, the pages and publishing read.

Rows stay mapped (`training.tables.reading`). In memory are a row number for each item, and the ids of blocks in which some
row is left out. Ten million items are some hundred megabytes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.tables.columns import ITEM_FIELDS, item_from_values
from training.tables.images import PER_TASK, picture_faults
from training.tables.reading import Table, open_table
from training.tables.rejects import RejectedRows, Rejects, TableError
from training.tables.remote.pictures import fetch_pictures_of


IMAGES_CHECKED = 1_000_000
"""Tables of up to this many items have every image opened when they are loaded, unless the caller decides."""
MISSING, NOTHING, REPEATED, UNREADABLE = (
    "item_id is missing",
    "neither text nor image",
    "item_id stands in an earlier row",
    "unreadable image",
)
"""Kinds of reasons for which rows that can be read are no items."""

Item = dict[str, Any]


class ItemIds(Sequence[str]):
    """The ids of an item table as strings, made when they are asked for."""

    AT_ONCE = 10_000

    def __init__(self, column: pa.ChunkedArray):
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, position: int) -> str: ...
    @overload
    def __getitem__(self, position: slice) -> list[str]: ...
    def __getitem__(self, position: int | slice) -> str | list[str]:
        if isinstance(position, slice):
            return self.column[position].to_pylist()
        return self.column[int(position)].as_py()

    def __iter__(self) -> Iterator[str]:
        return (
            item_id for start in range(0, len(self), self.AT_ONCE) for item_id in self[start : start + self.AT_ONCE]
        )

    def positions(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """(m,) int32 position of each id; -1 for one that is none of these. A pass over all ids, so ask for many."""
        places = pc.index_in(ids.cast(pa.large_string()), value_set=self.column)
        pa.default_memory_pool().release_unused()
        return places.fill_null(-1).to_numpy(zero_copy_only=False)


class ItemTable(Sequence[Item]):
    """Items by position. Images stay encoded until the processor opens them.

    Args:
        table: any rows with `item_id` and some of title, topics, content, image.
        ids: (n,) Arrow large_string of the usable rows, all different.
        rows: (n,) int64 positions of the usable rows in `table`.
        broken: by position in `table`, which of an item's pictures can't be read.
    """

    def __init__(
        self, table: Table, ids: pa.ChunkedArray, rows: np.ndarray, broken: Mapping[int, frozenset[int]] | None = None
    ):
        self.table, self.item_ids, self.rows, self.broken = table, ItemIds(ids), rows, broken or {}
        self._fields = [name for name in ("item_id", *ITEM_FIELDS) if name in table.column_names]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "ItemTable":
        """Items that are in memory, as they are: all of them count, and nothing of them is checked but their types."""
        table = Table.of_rows([{"item_id": str(number), **row} for number, row in enumerate(rows)])
        return cls(table, table.column("item_id"), np.arange(len(rows)))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, position: int) -> Item: ...
    @overload
    def __getitem__(self, position: slice) -> list[Item]: ...
    def __getitem__(self, position: int | slice) -> Item | list[Item]:
        """The item (or those of a slice) as the processor takes it: `item_id` and the fields it has."""
        if isinstance(position, slice):
            return [self._item(row) for row in self.rows[position].tolist()]
        return self._item(int(self.rows[position]))

    def __iter__(self) -> Iterator[Item]:
        return (item for start in range(0, len(self), PER_TASK) for item in self[start : start + PER_TASK])

    def between(self, start: int, stop: int) -> range:
        """Positions of the items that stand in rows `start` to `stop` of the table."""
        return range(*np.searchsorted(self.rows, (start, stop)).tolist())

    def fetch_pictures(self, positions: Iterable[int]) -> None:
        """Have the pictures of some items fetched that lie elsewhere and may be, side by side, before they are opened."""
        if self.table.allow_remote:
            fetch_pictures_of(self[position] for position in positions)

    def place(self, position: int) -> tuple[str, int]:
        """File (or split) that holds an item, and its row there, from 0."""
        return self.table.place(int(self.rows[position]))

    def column(self, name: str) -> list[str | None]:
        """A further column (a category, a split) as text, in the order of the items; None where it is empty.

        Raises:
            TableError: when the table has no such column.
        """
        return self.table.texts(name).take(pa.array(self.rows)).to_pylist()

    def where(self, name: str, value: str) -> np.ndarray:
        """(m,) int64 positions of the items whose column says `value`, compared as texts.

        Raises:
            TableError: when the table has no such column.
        """
        return np.flatnonzero(pc.equal(self.table.texts(name), value).fill_null(False).to_numpy()[self.rows])

    def fields_present(self) -> dict[str, np.ndarray]:
        """(n,) bool for each field of an item that the table has a column for: which items have it."""
        columns = [name for name in ITEM_FIELDS if name in self.table.column_names]
        return {name: self.table.column(name).is_valid().to_numpy()[self.rows] for name in columns}

    def select(self, positions: Sequence[int] | np.ndarray) -> "ItemTable":
        """The items at `positions`, as a table of their own."""
        chosen = np.asarray(positions, dtype=np.int64)
        return ItemTable(self.table, self.item_ids.column.take(pa.array(chosen)), self.rows[chosen], self.broken)

    def _item(self, row: int) -> Item:
        values = self.table.row(row, self._fields)
        if row in self.broken:
            values["image"] = [picture for at, picture in enumerate(values["image"]) if at not in self.broken[row]]
        return item_from_values(values, self.table.folder(row), self.table.allow_remote)


def load_items(
    source: str,
    split: str | None = None,
    check_images: bool | None = None,
    num_workers: int = 0,
    encoding: str | None = None,
    allow_remote: str | None = None,
) -> tuple[ItemTable, Rejects]:
    """Read an item table and check every row.

    Of rows with one id the first usable one counts. A picture that can't be read is left out and listed; an item none of
    whose pictures can be read is left out.

    Args:
        source, split, encoding, allow_remote: as of `training.tables.reading.open_table`. A picture that lies elsewhere is
            fetched when it is opened.
        check_images: open every image too. None: in tables of up to `IMAGES_CHECKED` items; beyond, a pass over all
            images is left to `--validate_only`, and an unreadable one is met by who opens it.
        num_workers: processes that open images; 0: this one.

    Raises:
        TableError: when there is no `item_id` column, no item field, or no usable row.
    """
    screening = _Screening(open_table(source, split, encoding, allow_remote))
    screening.leave_out_the_empty()
    screening.leave_out_repeats(num_workers)
    few = screening.usable.sum() <= IMAGES_CHECKED
    if check_images or (check_images is None and few):
        screening.open_pictures(screening.items(), num_workers)
    items = screening.items()
    if not len(items):
        first = screening.rejects.first()
        reason = f"; the first: {first.reason}" if first else ""
        raise TableError(f"{source}: none of {len(screening.table)} rows is usable{reason}.")
    return items, screening.rejects


class _Screening:
    """Which rows of a table are items, narrowed down step by step."""

    def __init__(self, table: Table):
        columns = table.column_names
        if "item_id" not in columns or not set(columns) & set(ITEM_FIELDS):
            raise TableError(
                f"{table.source}: an item table needs 'item_id' and at least one of {', '.join(ITEM_FIELDS)}; "
                f"it has {', '.join(columns)}."
            )
        self.table = table
        unusable, self.rejects = table.unreadable(("item_id",))
        self.usable = ~unusable
        self.broken: dict[int, frozenset[int]] = {}

    def leave_out_the_empty(self) -> None:
        """Rows without an id, and rows without anything else."""
        self._reject(np.flatnonzero(self.usable & self.table.column("item_id").is_null().to_numpy()), MISSING)
        fields = [name for name in ITEM_FIELDS if name in self.table.column_names]
        filled = np.any([self.table.column(name).is_valid().to_numpy() for name in fields], axis=0)
        self._reject(np.flatnonzero(self.usable & ~filled), NOTHING)

    def leave_out_repeats(self, num_workers: int) -> None:
        """All rows of one id but its first usable one; the pictures of such rows are opened to know which that is."""
        first, items = self._firsts()
        again = first != np.arange(len(first))
        if not again.any():
            return
        self.open_pictures(items.select(np.flatnonzero(np.isin(first, first[again]))), num_workers)
        first, items = self._firsts()
        self._reject(items.rows[first != np.arange(len(first))], REPEATED)

    def open_pictures(self, items: ItemTable, num_workers: int) -> None:
        """Finds pictures that can't be read, and leaves out the items that have no other."""
        if "image" not in self.table.column_names:
            return
        rows: dict[bool, list[int]] = {True: [], False: []}
        reasons: dict[bool, list[str]] = {True: [], False: []}
        for position, faults in picture_faults(items, num_workers):
            row = int(items.rows[position])
            whole = None not in faults
            if not whole:
                known = self.broken.get(row, frozenset())
                self.broken[row] = known | {at for at, fault in enumerate(faults) if fault is not None}
            for fault in dict.fromkeys(faults) if whole else faults:
                if fault is not None and not (whole and rows[whole][-1:] == [row]):
                    rows[whole].append(row)
                    reasons[whole].append(fault)
        for whole in (True, False):
            at, details = np.array(rows[whole], dtype=np.int64), pa.array(reasons[whole], pa.string())
            self.rejects += Rejects(RejectedRows(self.table, at, UNREADABLE, details, ("item_id",)))
        self.usable[rows[True]] = False

    def items(self) -> ItemTable:
        """The rows that are usable so far; ids are copied only where some of a block are left out."""
        chunks = []
        column = self.table.column("item_id")
        for start, chunk in zip(self.table.starts, column.chunks, strict=False):
            mask = self.usable[start : start + len(chunk)]
            chunks.append(chunk if mask.all() else chunk.filter(pa.array(mask)))
        ids = pa.chunked_array(chunks, column.type)
        return ItemTable(self.table, ids, np.flatnonzero(self.usable), self.broken)

    def _firsts(self) -> tuple[np.ndarray, ItemTable]:
        """Position of the first item with each item's id, and the items."""
        items = self.items()
        return items.item_ids.positions(items.item_ids.column), items

    def _reject(self, rows: np.ndarray, reason: str) -> None:
        self.rejects += Rejects(RejectedRows(self.table, rows, reason, id_columns=("item_id",)))
        self.usable[rows] = False
