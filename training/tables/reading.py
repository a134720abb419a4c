"""A table of any kind as mapped Arrow: every row by its position, in any order, from any number of threads and processes.

Opening a table copies it, streamed, into one Arrow file in the cache of `datasets`, in which every column has its form
(`training.tables.columns`) and every row that can't be read has a fault in its place. The copy is named by the content of the
table's files: a table that has changed is copied anew, an unchanged one is only mapped. Memory is that of a block.
"""

import contextlib
import json
import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from training.tables.columns import FILE_COLUMNS, IMAGE_TYPE, cells_column, form_of, other_of, reason_of
from training.tables.commands.files import atomic_write
from training.tables.formats import EMPTY_LINE, Block, TablePart, Types, open_part
from training.tables.rejects import Reject, RejectedRows, Rejects, TableError, write_rejects
from training.tables.remote.places import RemoteFolder
from training.tables.sources import cache_folder, parts_of
from training.tables.texts import each_text, texts_of, values_of


PART, FAULT = "__part__", "__fault__"
"""Columns of a copy beside the table's: number of the file or split, and why the row can't be read (null: it can)."""
FORMAT = 1
"""Of the copy; with another one, old copies aren't used."""
DAYS_KEPT = 30
"""Days after which a copy goes that nobody has opened since."""


@dataclass
class Table:
    """All rows of a table, mapped; opened by `open_table`.

    Args:
        source, split, encoding, allow_remote: what was opened, and what may be asked for its pictures.
        copy: the Arrow file.
        names: of the files or splits.
        folders: where relative paths of pictures start in each of them.
        files: SHA-256 by name.
    """

    source: str
    split: str | None
    encoding: str | None
    copy: Path | None
    names: list[str]
    folders: list[Path | RemoteFolder]
    files: dict[str, str] = field(repr=False)
    allow_remote: str | None = None

    def __post_init__(self) -> None:
        if self.copy is not None:
            self._map()

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], folder: Path = Path()) -> "Table":
        """Rows that are in memory, by the same rules.

        Raises:
            TableError: for a cell that can't be what its column is.
        """
        types: Types = dict.fromkeys(name for row in rows for name in row)
        columns = {}
        for name in types:
            columns[name], faults = cells_column(name, [row.get(name) for row in rows])
            for row, fault in faults.items():
                raise TableError(f"row {row}: {reason_of(name, fault)}")
        table = cls("rows in memory", None, None, None, ["rows in memory"], [folder], {})
        table._hold([_record(Block(len(rows), columns, {}), 0, _schema(types))])
        return table

    def _map(self) -> None:
        with pa.memory_map(str(self.copy)) as mapped:
            table = pa.ipc.open_stream(mapped).read_all()
        self._hold(table.to_batches())

    def _hold(self, batches: list[pa.RecordBatch]) -> None:
        self.batches = batches
        self.starts = [0, *accumulate(len(batch) for batch in batches)]
        self.parts = [batch.column(PART)[0].as_py() for batch in batches]

    def __getstate__(self) -> dict[str, Any]:
        """What is mapped is mapped again by who unpickles this."""
        mapped = ("batches", "starts", "parts", "_part_starts") if self.copy is not None else ()
        return {key: value for key, value in self.__dict__.items() if key not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.copy is not None:
            if not self.copy.exists():  # another machine
                self.copy = open_table(self.source, self.split, self.encoding, self.allow_remote).copy
            self._map()

    def __len__(self) -> int:
        """Rows, empty lines of text files among them."""
        return self.starts[-1]

    @property
    def schema(self) -> pa.Schema:
        """Of the table's columns."""
        schema = self.batches[0].schema
        return pa.schema([column for column in schema if column.name not in (PART, FAULT)])

    @property
    def column_names(self) -> list[str]:
        return self.schema.names

    def row(self, position: int, columns: Sequence[str]) -> dict[str, Any]:
        """Some cells of a row, as Python values."""
        number = bisect_right(self.starts, position) - 1
        batch, offset = self.batches[number], position - self.starts[number]
        return {name: batch.column(name)[offset].as_py() for name in columns}

    def place(self, position: int) -> tuple[str, int]:
        """File (or split) of a row, and its number there, from 0."""
        part = self.parts[bisect_right(self.starts, position) - 1]
        return self.names[part], position - self._part_starts[part]

    def folder(self, position: int) -> Path | RemoteFolder:
        """Where relative paths of a row's pictures start."""
        return self.folders[self.parts[bisect_right(self.starts, position) - 1]]

    def faults(self, rows: np.ndarray) -> list[str]:
        """Why rows can't be read."""
        return [self.row(row, [FAULT])[FAULT] for row in rows.tolist()]

    def blocks(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Position of the first row and some columns of it and those after it, block by block, zero-copy."""
        for start, batch in zip(self.starts, self.batches, strict=False):
            yield start, pa.Table.from_batches([batch.select(list(columns))])

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column, mapped.

        Raises:
            TableError: when the table has no such column.
        """
        if name not in self.column_names:
            raise TableError(f"{self.source}: no column '{name}'; it has {', '.join(self.column_names)}.")
        return pa.chunked_array([batch.column(name) for batch in self.batches], self.schema.field(name).type)

    def texts(self, name: str) -> pa.ChunkedArray:
        """A column as text, by the rule of titles; null where it is empty."""
        chunks = []
        for chunk in self.column(name).chunks:
            if pa.types.is_nested(chunk.type):
                chunks.append(each_text(values_of(chunk), other_of)[0])
            else:
                chunks.append(texts_of(chunk)[0])
        return pa.chunked_array(chunks, pa.string())

    def take(self, positions: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Some columns of some rows, in any order. In memory, so ask for few, or for columns without pictures."""
        order = np.argsort(positions, kind="stable")
        ascending = np.asarray(positions)[order]
        cuts = np.searchsorted(ascending, self.starts)
        pieces = [
            pa.Table.from_batches([batch.select(list(columns)).take(pa.array(ascending[first:behind] - start))])
            for batch, start, first, behind in zip(self.batches, self.starts, cuts[:-1], cuts[1:], strict=False)
            if first < behind
        ]
        if not pieces:
            return self.schema.empty_table().select(list(columns))
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        joined = pa.concat_tables(pieces)
        return joined if (np.diff(order) == 1).all() else joined.take(pa.array(back))

    def require(self, names: Sequence[str]) -> None:
        """Raises TableError, naming what is there, unless the table has all these columns."""
        missing = [name for name in names if name not in self.column_names]
        if missing:
            raise TableError(f"{self.source}: no column {', '.join(missing)}; it has {', '.join(self.column_names)}.")

    def unreadable(self, id_columns: tuple[str, ...]) -> tuple[np.ndarray, Rejects]:
        """(n,) bool, which rows are none (faults and empty lines), and the faults."""
        faults = pa.chunked_array([batch.column(FAULT) for batch in self.batches], pa.string())
        without = faults.is_valid().to_numpy()
        broken = pc.fill_null(pc.not_equal(faults, EMPTY_LINE), False).to_numpy()
        return without, Rejects(RejectedRows(self, np.flatnonzero(broken), None, id_columns=id_columns))

    def empty_lines(self) -> int:
        """How many rows are empty lines of text files."""
        return sum(pc.sum(pc.equal(batch.column(FAULT), EMPTY_LINE)).as_py() or 0 for batch in self.batches)

    @cached_property
    def _part_starts(self) -> dict[int, int]:
        starts: dict[int, int] = {}
        for part, start in zip(self.parts, self.starts, strict=False):
            starts.setdefault(part, start)
        return starts


def open_table(
    source: str, split: str | None = None, encoding: str | None = None, allow_remote: str | None = None
) -> Table:
    """A table of any kind as mapped rows.

    Args:
        source, split: as of `training.tables.sources.parts_of`.
        encoding: of its text files; None: UTF-8, or what their mark says.
        allow_remote: hosts and places that it, and its pictures, may be fetched from (`training.tables.remote.places`).

    Raises:
        TableError: when there is no such table, a file of it is none, or it has no row.
    """
    places = parts_of(source, split, allow_remote)
    parts = [open_part(place, encoding) for place in places]
    files = {part.name: part.sha256() for part in tqdm(parts, desc="Hashing", unit="file", disable=len(parts) < 20)}
    described = json.dumps([FORMAT, encoding, [[name, digest, _kind(name)] for name, digest in files.items()]])
    copy = cache_folder() / f"{blake2b(described.encode(), digest_size=16).hexdigest()}.arrow"
    if copy.exists():
        os.utime(copy)  # a copy in use stays
    else:
        _write_copy(parts, copy, source)
        _remove_unused(copy.parent)
    names, folders = [part.name for part in parts], [part.folder for part in parts]
    table = Table(source, split, encoding, copy, names, folders, files, allow_remote)
    if not len(table):
        raise TableError(f"{source}: no usable row: it is empty.")
    if not table.column_names and (first := table.unreadable(())[1].first()):  # JSON lines without a single object
        raise TableError(f"{source}: none of {len(table)} rows is usable; the first: {first.reason}.")
    return table


def _remove_unused(folder: Path) -> None:
    """Remove the copies of tables that nobody has opened for `DAYS_KEPT` days; who has one mapped keeps it."""
    for copy in folder.glob("*.arrow"):
        with contextlib.suppress(OSError):  # another process was quicker, or it is another user's
            if copy.stat().st_mtime < time.time() - DAYS_KEPT * 86_400:
                copy.unlink()


def _kind(name: str) -> str:
    return Path(name).suffix.lower()


def _write_copy(parts: list[TablePart], copy: Path, source: str) -> None:
    types = _types(parts)
    schema = _schema(types)
    with (
        atomic_write(copy) as place,
        pa.OSFile(str(place), "wb") as stream,
        pa.ipc.new_stream(stream, schema) as writer,
        tqdm(desc=f"Reading {Path(source).name}", unit="row") as progress,
    ):
        for number, part in enumerate(parts):
            for block in part.blocks(types):
                if block.rows:
                    writer.write_batch(_record(block, number, schema))
                    progress.update(block.rows)


def _types(parts: list[TablePart]) -> Types:
    """Columns of all parts; one whose types differ is held as text."""
    types: Types = {}
    for part in parts:
        for name, kind in part.types().items():
            if name in types and types[name] is not None and types[name] != kind:
                known = types[name]
                either_is_null = pa.null() in (known, kind)
                types[name] = (kind if known == pa.null() else known) if either_is_null else None
            else:
                types.setdefault(name, kind)
    return {name: None if kind == pa.null() else kind for name, kind in types.items() if not name.startswith("__")}


def _schema(types: Types) -> pa.Schema:
    """Of a copy."""
    fields = {name: form.type if (form := form_of(name)) else kind or pa.string() for name, kind in types.items()}
    if any(name in fields for name in FILE_COLUMNS):
        fields = {name: kind for name, kind in fields.items() if name not in FILE_COLUMNS} | {"image": IMAGE_TYPE}
    return pa.schema({PART: pa.int32(), FAULT: pa.string(), **fields})


def _record(block: Block, part: int, schema: pa.Schema) -> pa.RecordBatch:
    columns = dict(block.columns)
    named = [columns.pop(name) for name in FILE_COLUMNS if name in columns]
    for pictures in named:
        given = columns.get("image", pa.nulls(block.rows, IMAGE_TYPE))
        columns["image"] = pc.if_else(given.is_valid(), given, pictures)
    faults: list[str | None] = [block.faults.get(row) for row in range(block.rows)] if block.faults else []
    columns[FAULT] = pa.array(faults, pa.string()) if faults else pa.nulls(block.rows, pa.string())
    columns[PART] = pa.array(np.full(block.rows, part, dtype=np.int32))
    return pa.RecordBatch.from_arrays(
        [columns[field.name] if field.name in columns else pa.nulls(block.rows, field.type) for field in schema],
        schema=schema,
    )


__all__ = ["Reject", "RejectedRows", "Rejects", "Table", "TableError", "open_table", "write_rejects"]
