"""Item and pair tables, checked and addressed by position: what training, evaluation and mining of negatives read.

Rows stay mapped (`training.tables.reading`). In memory are, for each item, its id as Arrow holds it and a row number; for each
pair, two positions of 4 bytes. Ten million items are a few hundred megabytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling_notellm2.rows_notellm2 import ITEM_FIELDS, item_from_row
from training.tables.checks import content_faults, field_present
from training.tables.images import PER_TASK, image_faults
from training.tables.reading import (
    BLOCK,
    LoadedTable,
    Reject,
    RejectedRows,
    Rejects,
    TableError,
    arrow_blocks,
    load_table,
    write_rejects,
)


IMAGES_CHECKED = 1_000_000
"""Tables of up to so many items have every image opened when they are loaded, unless the caller decides."""


class ItemIds(Sequence[str]):
    """The ids of an item table as strings, made when they are asked for."""

    def __init__(self, column: pa.Array):
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
        return (item_id for start in range(0, len(self), BLOCK) for item_id in self[start : start + BLOCK])

    def positions(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """(m,) int32 position of each id; -1 for one that is none of these. A pass over all ids, so ask for many."""
        found = pc.index_in(ids.cast(pa.large_string()), value_set=self.column)
        pa.default_memory_pool().release_unused()
        return found.fill_null(-1).to_numpy(zero_copy_only=False)


class ItemTable(Sequence[dict[str, Any]]):
    """Items by position. Images stay encoded until the processor opens them.

    Args:
        table: any rows with `item_id` and some of title, topics, content, image.
        ids: (n,) Arrow large_string of the usable rows, all different.
        rows: (n,) integer positions of the usable rows in `table`.
        folder: where relative image paths start.
    """

    def __init__(self, table: datasets.Dataset, ids: pa.Array, rows: np.ndarray, folder: Path):
        self.table, self.item_ids, self.rows, self.folder = table, ItemIds(ids), rows, folder
        self._fields = table.select_columns([name for name in ("item_id", *ITEM_FIELDS) if name in table.column_names])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, position: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, position: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, position: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """The item (or those of a slice) as the processor takes it: `item_id` and the fields it has."""
        if not isinstance(position, slice):
            return item_from_row(self._fields[int(self.rows[position])], self.folder)
        columns = self._fields[self.rows[position]]
        raws = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return [item_from_row(raw, self.folder) for raw in raws]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (item for start in range(0, len(self), PER_TASK) for item in self[start : start + PER_TASK])

    def column(self, name: str) -> list[Any]:
        """A further column (a category, a split), in the order of the items, as Python values.

        Raises:
            TableError: when the table has no such column.
        """
        return self._column(name).to_pylist()

    def where(self, name: str, value: str) -> np.ndarray:
        """(m,) int64 positions of the items whose column says `value`, compared as texts.

        Raises:
            TableError: when the table has no such column.
        """
        return np.flatnonzero(pc.equal(self._column(name).cast(pa.string()), value).fill_null(False).to_numpy())

    def fields_present(self) -> dict[str, np.ndarray]:
        """(n,) bool for each field of an item that the table has a column for: which items have it."""
        columns = [name for name in ITEM_FIELDS if name in self.table.column_names]
        present = {name: np.zeros(len(self.table), dtype=bool) for name in columns}
        for start, block in arrow_blocks(self.table, columns):
            for name in columns:
                present[name][start : start + len(block)] = field_present(name, block[name].combine_chunks())
        return {name: found[self.rows] for name, found in present.items()}

    def select(self, positions: Sequence[int] | np.ndarray) -> "ItemTable":
        """The items at `positions`, as a table of their own."""
        chosen = np.asarray(positions, dtype=np.int64)
        return ItemTable(self.table, self.item_ids.column.take(pa.array(chosen)), self.rows[chosen], self.folder)

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            raise TableError(f"The item table has no column '{name}'; it has {', '.join(self.table.column_names)}.")
        return self.table.select_columns([name]).with_format("arrow")[self.rows][name]


@dataclass(frozen=True)
class PairTable:
    """Pairs as positions in an item table.

    Attributes:
        pairs: (n, 2) int32, query and target.
        groups: (n,) int32 code of each pair's `distinct_column`, -1 where it is missing, if asked for.
        negatives: (n, k) int32 hard negatives of each pair, if the table has columns negative_1 .. negative_k.
    """

    pairs: np.ndarray
    groups: np.ndarray | None = None
    negatives: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def members(self) -> np.ndarray:
        """(n, 2 + k) int32: query, target, hard negatives."""
        return self.pairs if self.negatives is None else np.concatenate([self.pairs, self.negatives], axis=1)


def load_items(
    source: str, split: str = "train", check_images: bool | None = None, num_workers: int = 0
) -> tuple[ItemTable, Rejects]:
    """Read an item table and check every row.

    Args:
        source, split: as for `load_table`.
        check_images: open every image too, and reject items whose image can't be read. None: for tables of up to
            `IMAGES_CHECKED` items; beyond, a pass over all images is left to `--validate_only`, and an unreadable one is
            met by the collator.
        num_workers: processes that open images; 0: this one.

    Raises:
        TableError: when there is no `item_id` column, no item field, or no usable row.
    """
    loaded, rejects = load_table(source, split)
    columns = set(loaded.rows.column_names)
    if "item_id" not in columns or not columns & set(ITEM_FIELDS):
        raise TableError(
            f"{source}: an item table needs 'item_id' and at least one of {', '.join(ITEM_FIELDS)}; "
            f"it has {', '.join(loaded.rows.column_names)}."
        )
    if "image" in columns and isinstance(loaded.rows.features["image"], datasets.Image):
        encoded = loaded.rows.cast_column("image", datasets.Image(decode=False))
        loaded = LoadedTable(loaded.source, encoded, loaded.readable, loaded.numbers)
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    ids = clean_ids(loaded, "item_id").combine_chunks()
    usable = np.zeros(len(loaded.rows), dtype=bool)
    usable[loaded.readable] = True

    def rejected(rows: np.ndarray, reason: str, details: pa.Array | None = None) -> None:
        nonlocal rejects
        rejects += Rejects(RejectedRows(loaded, rows, reason, details, ("item_id",)))
        usable[rows] = False

    rejected(np.flatnonzero(usable & (pc.binary_length(ids).to_numpy() == 0)), "item_id is empty")
    for reason, rows, details in content_faults(loaded, usable, folder):
        rejected(rows, reason, details)
    items = _items_at(loaded, ids, usable, folder)
    first = items.item_ids.positions(items.item_ids.column)
    rejected(items.rows[first != np.arange(len(first))], "item_id occurs twice")
    if "image" in columns and (check_images or (check_images is None and usable.sum() <= IMAGES_CHECKED)):
        items = _items_at(loaded, ids, usable, folder)
        faults = list(image_faults(items, num_workers))
        broken = items.rows[[position for position, _ in faults]]
        rejected(broken, "unreadable image", pa.array([fault for _, fault in faults], pa.string()))
    if not usable.any():
        reason = next(iter(rejects)).reason if len(rejects) else "it is empty"
        raise TableError(f"{source}: none of {len(loaded.rows)} rows is usable; the first: {reason}.")
    return _items_at(loaded, ids, usable, folder), rejects


def _items_at(table: LoadedTable, ids: pa.Array, usable: np.ndarray, folder: Path) -> ItemTable:
    """The items of the rows that a mask (rows,) says; ids are copied only where some are left out."""
    kept = ids if usable.all() else ids.filter(pa.array(usable))
    return ItemTable(table.rows, kept, np.flatnonzero(usable), folder)


@dataclass(frozen=True)
class MatchedPairs:
    """A pair table held against an item table: `pairs` (m, 2) int32, its `rows` (m,) int64, and what was left out."""

    table: LoadedTable
    rows: np.ndarray
    pairs: np.ndarray
    rejects: Rejects


def match_pairs(source: str, items: ItemTable, split: str = "train") -> MatchedPairs:
    """Find the members of each pair; pairs whose members are not in `items`, or are one item, are rejected.

    Raises:
        TableError: when a column is missing or no pair is usable.
    """
    loaded, rejects = load_table(source, split)
    require_columns(loaded, ["query_id", "target_id"])
    rows = loaded.readable
    pairs = np.empty((len(rows), 2), dtype=np.int32)
    for side, name in enumerate(("query_id", "target_id")):
        pairs[:, side] = items.item_ids.positions(clean_ids(loaded, name))[rows]
    known = pairs >= 0
    reasons = {
        "not among the usable items: query and target": ~known.any(1),
        "not among the usable items: query": ~known[:, 0] & known[:, 1],
        "not among the usable items: target": known[:, 0] & ~known[:, 1],
        "query and target are one item": known.all(1) & (pairs[:, 0] == pairs[:, 1]),
    }
    for reason, wrong in reasons.items():
        rejects += Rejects(RejectedRows(loaded, rows[wrong], reason, id_columns=("query_id", "target_id")))
    usable = known.all(1) & (pairs[:, 0] != pairs[:, 1])
    if not usable.any():
        first = next(iter(rejects), None)
        raise TableError(
            f"{source}: none of {len(loaded.rows)} pairs is usable"
            + (f"; the first: {first.reason}. Does it belong to the item table?" if first else ".")
        )
    return MatchedPairs(loaded, rows[usable], pairs[usable], rejects)


def load_pairs(
    source: str, items: ItemTable, split: str = "train", distinct_column: str | None = None, seed: int = 0
) -> tuple[PairTable, Rejects]:
    """Read a pair table, with the hard negatives of its columns negative_1 .. negative_k where it has them.

    A hard negative that is empty or not among the items gives its place to an item drawn from the table's pairs, so
    that all batches have one shape.

    Args:
        distinct_column: becomes `PairTable.groups`.
        seed: of the negatives that are drawn.

    Raises:
        TableError: when a column is missing or no pair is usable.
    """
    matched = match_pairs(source, items, split)
    columns = matched.table.rows.column_names
    groups = negatives = None
    if distinct_column is not None:
        require_columns(matched.table, [distinct_column])
        values = matched.table.rows.select_columns([distinct_column]).with_format("arrow")[matched.rows]
        groups = _group_codes(values[distinct_column].combine_chunks())
    names = [name for number in range(1, len(columns)) if (name := f"negative_{number}") in columns]
    if names:
        found = [items.item_ids.positions(clean_ids(matched.table, name))[matched.rows] for name in names]
        negatives = np.stack(found, axis=1)
        empty = negatives < 0
        drawn = np.random.default_rng(seed).integers(matched.pairs.size, size=int(empty.sum()))
        negatives[empty] = matched.pairs.reshape(-1)[drawn]
    return PairTable(matched.pairs, groups, negatives), matched.rejects


def _group_codes(values: pa.Array) -> np.ndarray:
    """(n,) int32 code of each value; -1 for what is missing: null, NaN and blank text, which bind nothing."""
    missing = pc.is_null(values, nan_is_null=True)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        missing = pc.or_kleene(missing, pc.equal(pc.utf8_trim_whitespace(values), ""))
    codes = pc.fill_null(values.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
    return np.where(missing.to_numpy(zero_copy_only=False), np.int32(-1), codes)


def require_columns(table: LoadedTable, names: Sequence[str]) -> None:
    """Raises TableError, naming what is there, unless the table has all these columns."""
    missing = [name for name in names if name not in table.rows.column_names]
    if missing:
        raise TableError(
            f"{table.source}: no column {', '.join(missing)}; it has {', '.join(table.rows.column_names)}."
        )


def clean_ids(table: LoadedTable, name: str) -> pa.ChunkedArray:
    """A column of ids as `row_id` has them: text without surrounding blanks, empty for null. Mapped where possible.

    Raises:
        TableError: for a column that is neither text nor numbers.
    """
    chunks = []
    for _, block in arrow_blocks(table.rows, [name]):
        for chunk in block[name].chunks:
            try:
                text = pc.fill_null(chunk.cast(pa.large_string()), "")
            except pa.ArrowNotImplementedError as error:
                raise TableError(f"{table.source}: {name} is a column of {chunk.type}; ids are texts.") from error
            trimmed = pc.utf8_trim_whitespace(text)
            chunks.append(text if trimmed.equals(text) else trimmed)
    return pa.chunked_array(chunks, pa.large_string())


__all__ = [
    "ItemIds",
    "ItemTable",
    "PairTable",
    "Reject",
    "Rejects",
    "TableError",
    "clean_ids",
    "load_items",
    "load_pairs",
    "match_pairs",
    "require_columns",
    "write_rejects",
]
