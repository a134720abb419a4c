"""Reading tables of any kind into memory-mapped Arrow, with every row that can't be used listed and counted.

Parquet, folders and Hub ids come through `datasets`, which maps them. JSON lines and CSV are read row by row, because one
broken row would otherwise refuse the whole file, and streamed into an Arrow file of their own in `datasets`' cache, which
later runs map again. A bad row never stops a job and never vanishes: it is in `Rejects`, and `write_rejects` lists it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from modeling_notellm2.rows_notellm2 import BadRow, dataset_id, read_csv_rows, read_json_rows, row_id
from training.tables.files import atomic_write


BLOCK = 10_000
"""Rows handled at once."""
ROW, FAULT = "__row__", "__fault__"
"""Columns of a streamed file's Arrow copy: where the row stood, and why it can't be read (null: it can)."""
READERS: dict[str, Callable[[Path], Iterator[dict[str, Any] | BadRow | None]]] = {
    ".jsonl": read_json_rows,
    ".csv": read_csv_rows,
}
LISTS = ("topics", "image")


class TableError(ValueError):
    """A table that can't be used at all; the message says what it lacks."""


@dataclass(frozen=True)
class Reject:
    """A row that is left out. `row` counts from 0 (in JSON lines: every line, empty ones too)."""

    table: str
    row: int
    ids: list[str]
    reason: str


@dataclass(frozen=True)
class LoadedTable:
    """A table as `datasets` holds it.

    Attributes:
        source: where it came from.
        rows: all rows, mapped.
        readable: (m,) int64 positions of the rows that could be read.
        numbers: (n,) int64 number of each row in its source; None: rows stand there as here.
    """

    source: str
    rows: datasets.Dataset
    readable: np.ndarray
    numbers: np.ndarray | None = None


def arrow_blocks(rows: datasets.Dataset, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Position of the first row and some columns of it and those after it, block by block, zero-copy."""
    mapped = rows.select_columns(columns).with_format("arrow")
    return zip(range(0, len(mapped), BLOCK), mapped.iter(BLOCK), strict=True)


@dataclass(frozen=True)
class RejectedRows:
    """Rows of one table that are left out for one kind of reason; their ids are read when they are listed.

    Attributes:
        rows: (m,) int64 positions in the table.
        reason: the kind of reason.
        details: (m,) what to add to it for each row; None: nothing.
        id_columns: which columns name the row.
    """

    table: LoadedTable
    rows: np.ndarray
    reason: str
    details: pa.Array | None = None
    id_columns: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Reject]:
        for start in range(0, len(self.rows), BLOCK):
            rows = self.rows[start : start + BLOCK]
            numbers = rows if self.table.numbers is None else self.table.numbers[rows]
            reasons = [self.reason] * len(rows)
            if self.details is not None:
                reasons = [f"{self.reason}: {detail}" for detail in self.details[start : start + BLOCK].to_pylist()]
            for number, ids, reason in zip(numbers.tolist(), self._ids(rows), reasons, strict=True):
                yield Reject(self.table.source, number, ids, reason)

    def _ids(self, rows: np.ndarray) -> list[list[str]]:
        if not self.id_columns:
            return [[] for _ in rows]
        values = self.table.rows.select_columns(list(self.id_columns)).with_format("arrow")[rows]
        return [[row_id(value) for value in row.values()] for row in values.to_pylist()]


class Rejects:
    """All rows of a run that are left out. Kept as row numbers, so that millions of them fit into memory."""

    def __init__(self, *groups: RejectedRows):
        self.groups = [group for group in groups if len(group.rows)]

    def __iadd__(self, other: "Rejects") -> "Rejects":
        self.groups += other.groups
        return self

    def __len__(self) -> int:
        return sum(len(group.rows) for group in self.groups)

    def __iter__(self) -> Iterator[Reject]:
        return (reject for group in self.groups for reject in group)

    def counts(self) -> Counter[tuple[str, str]]:
        """Rows by source and kind of reason."""
        counted: Counter[tuple[str, str]] = Counter()
        for group in self.groups:
            counted[group.table.source, group.reason] += len(group.rows)
        return counted


def write_rejects(rejects: Iterable[Reject], path: Path) -> None:
    """One JSON line for each reject, streamed; an empty file says that there was none."""
    with atomic_write(path) as place, place.open("w", encoding="utf-8") as stream:
        for reject in rejects:
            stream.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")


def load_table(source: str, split: str = "train") -> tuple[LoadedTable, Rejects]:
    """A file, a folder or a Hub dataset as mapped rows, with the rows that could not be read.

    Args:
        source: a .parquet, .jsonl or .csv file, a folder (an image folder with metadata, Parquet files, or one that
            `save_to_disk` wrote), or a dataset of the Hub, ORG/DATA or ORG/DATA:CONFIG.
        split: which split of a folder or Hub dataset. A config of the Hub that has a single split gives that.

    Raises:
        TableError: when `source` looks like a file and is none, is a file of another type, or has no readable row.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".parquet", *READERS) and not path.is_file():
        raise TableError(f"{source}: no such table.")
    if suffix in READERS:
        return _load_streamed(path, READERS[suffix])
    if suffix == ".parquet":
        rows = datasets.load_dataset("parquet", data_files=source, split="train")
    elif path.is_file():
        raise TableError(f"{source}: a table is a .parquet, .jsonl or .csv file, a folder, or a Hub dataset id.")
    elif (path / "state.json").exists():
        rows = datasets.load_from_disk(source)
    elif path.exists():
        rows = datasets.load_dataset(source, split=split)
    else:
        rows = _load_from_hub(source, split)
    return LoadedTable(source, rows, np.arange(len(rows))), Rejects()


def _load_from_hub(source: str, split: str) -> datasets.Dataset:
    name, config = dataset_id(source)
    if config is not None:
        splits = datasets.get_dataset_split_names(name, config)
        split = splits[0] if len(splits) == 1 else split
    return datasets.load_dataset(name, config, split=split)


def _load_streamed(
    path: Path, read: Callable[[Path], Iterator[dict[str, Any] | BadRow | None]]
) -> tuple[LoadedTable, Rejects]:
    """A text file by way of its Arrow copy, which is made anew whenever the file has changed."""
    state = path.stat()
    key = blake2b(f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}".encode(), digest_size=16).hexdigest()
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "notellm2_tables" / f"{key}.arrow"
    if not copy.exists():
        _write_arrow(path, read, copy)
    rows = datasets.Dataset.from_file(str(copy))
    numbers = rows.data.column(ROW).to_numpy()
    faults = rows.data.column(FAULT)
    bad = faults.is_valid().to_numpy()
    table = LoadedTable(str(path), rows, np.flatnonzero(~bad), numbers)
    rejects = Rejects(RejectedRows(table, np.flatnonzero(bad), "unreadable row", faults.drop_null()))
    if not len(table.readable):
        first = next(iter(rejects), None)
        raise TableError(f"{path}: no usable row" + (f"; the first: {first.reason}." if first else "."))
    return table, rejects


def _write_arrow(path: Path, read: Callable[[Path], Iterator[dict[str, Any] | BadRow | None]], copy: Path) -> None:
    """Two passes, so that nothing but a block is in memory: one for the columns' names, one for the rows."""
    columns: dict[str, None] = {}
    for row in tqdm(read(path), desc=f"Columns of {path.name}", unit="row"):
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
    lists = LISTS if path.suffix.lower() == ".jsonl" else ()  # CSV has none
    text = {name: pa.list_(pa.string()) if name in lists else pa.string() for name in columns}
    schema = pa.schema({ROW: pa.int64(), FAULT: pa.string(), **text})
    rows = (
        {ROW: number, FAULT: row.reason} if isinstance(row, BadRow) else {ROW: number, **row}
        for number, row in enumerate(tqdm(read(path), desc=f"Reading {path.name}", unit="row"))
        if row is not None
    )
    with (
        atomic_write(copy) as place,
        pa.OSFile(str(place), "wb") as stream,
        pa.ipc.new_stream(stream, schema) as writer,
    ):
        while block := list(islice(rows, BLOCK)):
            writer.write_batch(pa.RecordBatch.from_pylist(block, schema=schema))
