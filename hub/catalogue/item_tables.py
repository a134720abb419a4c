"""Item tables of any size: opened once, then read from any row on, in memory that does not grow with the rows.

Opening reads every id, so that an id that occurs twice is known before the first item is encoded, and hashes the files,
so that a job started again can tell that it has the same table. Opening takes some 40 bytes of memory for each row (400 MB
for ten million); afterwards one position of 256 rows is kept.
"""

import csv
import hashlib
import io
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from modeling_notellm2.rows_notellm2 import ITEM_FIELDS, BadRow, csv_rows, dataset_id, json_rows, row_id


STRIDE = 256
"""Rows from one noted byte position of a text file to the next, and rows in a batch read from Parquet."""

NO_ID = 0
FILE_COLUMNS = ("file_name", "image_file_name")
"""How an image folder's metadata names the picture."""

RawRow = dict[str, Any] | BadRow | None
Advance = Callable[[int], Any]


class TableError(ValueError):
    """A table that can't be used at all; the message says what it lacks."""


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Attributes:
        file: the file, or the split of a dataset, that holds it.
        number: of the row in `file`, from 0 (in JSON lines: every line, empty ones too).
        folder: where its relative image paths start.
        raw: its fields, or why it can't be read.
        repeated: an earlier row of the table has its id.
    """

    file: str
    number: int
    folder: Path
    raw: dict[str, Any] | BadRow
    repeated: bool


class TablePart(Protocol):
    """One file of a table, or one split of a dataset."""

    name: str
    folder: Path
    rows: int

    def read(self, start: int, stop: int) -> Iterable[RawRow]:
        """Rows `start` to `stop`; None for an empty line."""


@dataclass(frozen=True)
class Scan:
    """What opening learns of a part.

    Attributes:
        ids: a 64-bit hash of each row's id, `NO_ID` where there is none.
        sha256: of the content.
    """

    part: TablePart
    ids: "array[int]"
    sha256: str


class ItemTable:
    """Rows of all parts, one after another.

    Args:
        source: what the user named.
        scans: of the parts, in order.
    """

    def __init__(self, source: str, scans: list[Scan]):
        self.source = source
        self.parts = [scan.part for scan in scans]
        self.files = {scan.part.name: scan.sha256 for scan in scans}
        self.starts = [0, *accumulate(part.rows for part in self.parts)]
        self.repeated = repeated_rows(np.concatenate([np.frombuffer(scan.ids, np.uint64) for scan in scans]))

    def __len__(self) -> int:
        """Rows, empty lines of JSON lines and CSV among them."""
        return self.starts[-1]

    def read(self, start: int, stop: int) -> Iterator[TableRow]:
        """Rows `start` to `stop` of the whole table, without empty lines. Reading on is cheaper than going back."""
        while start < stop:
            place = bisect_right(self.starts, start) - 1
            part, first = self.parts[place], self.starts[place]
            end = min(stop, first + part.rows)
            repeated = set(self.repeated[slice(*np.searchsorted(self.repeated, (start, end)))].tolist())
            for number, raw in enumerate(part.read(start - first, end - first), start - first):
                if raw is not None:
                    yield TableRow(part.name, number, part.folder, raw, first + number in repeated)
            start = end


def open_items(source: str, split: str | None = None, every_column: bool = False) -> ItemTable:
    """Open an item table and read all its ids.

    Args:
        source: a .parquet, .jsonl or .csv file; a folder of Parquet files, or an image folder with metadata files, in
            both of which everything below counts; a folder that `save_to_disk` wrote; a dataset of the Hub, ORG/DATA or
            ORG/DATA:CONFIG.
        split: of a dataset; None takes all of them, one after another.
        every_column: rows hold columns beyond those of items too (those of text files always do).

    Raises:
        TableError: when there is no such table, or a part of it lacks `item_id` or every field of an item.
    """
    path = Path(source)
    if not path.exists() or (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        if path.suffix.lower() in SCANNERS:
            raise TableError(f"{source}: no such table.")
        return ItemTable(source, _scan_dataset(source, split, every_column))
    if split is not None:
        raise TableError(f"{source} is no dataset and has no splits; name the files of '{split}' themselves.")
    files = [(path, path.parent)] if path.is_file() else list(_files_of(path))
    with tqdm(
        total=sum(file.stat().st_size for file, _ in files), desc="Reading ids", unit="B", unit_scale=True
    ) as bar:
        scans = []
        for file, folder in files:
            if file.suffix.lower() not in SCANNERS:
                raise TableError(f"{file}: a table is a {', '.join(SCANNERS)} file, a folder, or a Hub dataset id.")
            name = file.name if path.is_file() else file.relative_to(path).as_posix()
            scans.append(SCANNERS[file.suffix.lower()](file, name, folder, every_column, bar.update))
    return ItemTable(source, scans)


def repeated_rows(ids: np.ndarray) -> np.ndarray:
    """Rows whose id an earlier row has.

    Args:
        ids: (rows,) uint64 hashes. Two ids of ten million share one by chance in 3 tables of a million.

    Returns:
        Row numbers in order, int64.
    """
    order = np.argsort(ids, kind="stable")
    again = order[1:][ids[order[1:]] == ids[order[:-1]]]
    return np.sort(again[ids[again] != NO_ID])


@dataclass
class TextPart:
    """A JSON lines or CSV file with the byte position of every `STRIDE`-th row."""

    path: Path
    name: str
    folder: Path
    header: list[str] | None
    positions: "array[int]"
    rows: int

    def read(self, start: int, stop: int) -> Iterator[RawRow]:
        mark = start // STRIDE
        with self.path.open("rb") as stream:
            stream.seek(self.positions[mark])
            rows = _parse((line.decode("utf-8", errors="replace") for line in stream), self.header)
            yield from map(_with_image, islice(rows, start - mark * STRIDE, stop - mark * STRIDE))


class ParquetPart:
    """A Parquet file, read forward: going back starts at the row group again."""

    def __init__(self, path: Path, name: str, folder: Path, every_column: bool):
        self.path, self.name, self.folder = path, name, folder
        with _open_parquet(path) as file:
            _check_columns(str(path), file.schema_arrow.names)
            groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self.columns = [name for name in file.schema_arrow.names if every_column or name in _COLUMNS]
        self.starts = [0, *accumulate(groups)]
        self.rows = self.starts[-1]
        self._forget()

    def read(self, start: int, stop: int) -> Iterator[RawRow]:
        while start < stop:
            batch = self._batch_with(start)
            piece = batch.slice(start - self._first, stop - start)
            yield from map(_with_image, _arrow_rows(piece))
            start += piece.num_rows

    def _batch_with(self, row: int) -> pa.RecordBatch:
        """The batch that holds `row`; its first row is `self._first`."""
        group = bisect_right(self.starts, row) - 1
        if self._file is None:
            self._file = _open_parquet(self.path)
        if group != self._group or row < self._first:
            self._group, self._first, self._batch = group, self.starts[group], None
            self._batches = self._file.iter_batches(STRIDE, [group], self.columns, use_threads=False)
        while self._batch is None or row >= self._first + self._batch.num_rows:
            self._first += 0 if self._batch is None else self._batch.num_rows
            self._batch = next(self._batches)
        return self._batch

    def _forget(self) -> None:
        self._file: pq.ParquetFile | None = None
        self._group, self._first, self._batch = -1, 0, None

    def __getstate__(self) -> dict[str, Any]:
        """An open file stays in its process."""
        open_things = ("_file", "_batches", "_batch", "_group", "_first")
        return {key: value for key, value in self.__dict__.items() if key not in open_things}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


@dataclass
class DatasetPart:
    """A split of a dataset, as `datasets` maps it into memory from its cache."""

    dataset: Any
    name: str
    folder: Path
    rows: int

    def read(self, start: int, stop: int) -> Iterator[RawRow]:
        yield from map(_with_image, _arrow_rows(self.dataset[start:stop]))


_COLUMNS = ("item_id", *ITEM_FIELDS, *FILE_COLUMNS)


def _scan_text(path: Path, name: str, folder: Path, every_column: bool, advance: Advance) -> Scan:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        lines = _CountedLines(stream, digest)
        header = None
        if path.suffix.lower() == ".csv":
            header = [field.removeprefix("\ufeff") for field in next(csv.reader(lines), [])]
            _check_columns(str(path), header)
        ids, positions = array("Q"), array("Q", [lines.position])
        for raw in _parse(lines, header):
            ids.append(_id_hash(raw))
            if len(ids) % STRIDE == 0:
                advance(lines.position - positions[-1])
                positions.append(lines.position)
        advance(path.stat().st_size - positions[-1])
    return Scan(TextPart(path, name, folder, header, positions, len(ids)), ids, digest.hexdigest())


def _scan_parquet(path: Path, name: str, folder: Path, every_column: bool, advance: Advance) -> Scan:
    part = ParquetPart(path, name, folder, every_column)
    ids = array("Q")
    with _open_parquet(path) as file:
        for batch in file.iter_batches(65536, columns=["item_id"], use_threads=False):
            ids.extend(map(_id_hash, _arrow_rows(batch)))
    return Scan(part, ids, _file_digest(path, advance))


def _scan_dataset(source: str, split: str | None, every_column: bool) -> list[Scan]:
    splits = _splits_of(source, split)
    if split is not None and split not in splits:
        raise TableError(f"{source}: no split '{split}'; there are {', '.join(splits)}.")
    scans = []
    for name, dataset in splits.items():
        if split in (None, name):
            _check_columns(f"{source}, split {name}", dataset.column_names)
            columns = [column for column in dataset.column_names if every_column or column in _COLUMNS]
            dataset = dataset.select_columns(columns).with_format("arrow")
            ids, digest = array("Q"), hashlib.sha256()
            for batch in tqdm(dataset.iter(65536), desc=f"Reading ids of {name}", total=-(-len(dataset) // 65536)):
                ids.extend(map(_id_hash, _arrow_rows(batch.select(["item_id"]))))
            for file in dataset.cache_files:
                digest.update(_file_digest(Path(file["filename"]), lambda _: None).encode())
            scans.append(Scan(DatasetPart(dataset, name, Path(), len(dataset)), ids, digest.hexdigest()))
    return scans


def _splits_of(source: str, split: str | None) -> dict[str, Any]:
    """Datasets by split; of the Hub only what `split` asks for, which can be a slice ("train[:1000]")."""
    import datasets  # slow to import, and of use here alone

    saved = Path(source).exists()
    try:
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(*dataset_id(source), split=split)
    except (OSError, ValueError) as error:
        raise TableError(f"{source}: neither a file or folder nor a dataset that can be loaded ({error}).") from error
    if isinstance(loaded, dict):
        return loaded
    return {split if split and not saved else str(loaded.split or "train"): loaded}


SCANNERS = {".parquet": _scan_parquet, ".jsonl": _scan_text, ".csv": _scan_text}


class _CountedLines:
    """Lines of a binary stream as text, with the position behind the last line taken; they go into `digest` too."""

    def __init__(self, stream: BinaryIO, digest: Any):
        self.stream, self.digest, self.position = stream, digest, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.stream.readline()
        if not line:
            raise StopIteration
        self.position += len(line)
        self.digest.update(line)
        return line.decode("utf-8", errors="replace")


def _parse(lines: Iterable[str], header: list[str] | None) -> Iterator[RawRow]:
    return json_rows(lines) if header is None else csv_rows(lines, header)


def _files_of(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Files of a table's folder and where their image paths start."""
    shown = [
        file
        for file in sorted(folder.rglob("*"))
        if not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    ]
    metadata = [file for file in shown if file.stem == "metadata" and file.suffix.lower() in SCANNERS]
    tables = [file for file in shown if file.suffix.lower() == ".parquet"]
    if not metadata and not tables:
        raise TableError(f"{folder}: no Parquet file and no metadata.csv, .jsonl or .parquet of an image folder in it.")
    yield from ((file, file.parent) for file in metadata) if metadata else ((file, folder) for file in tables)


def _arrow_rows(table: pa.Table | pa.RecordBatch) -> list[RawRow]:
    """Rows as dicts. Files of other writers can hold texts that are no UTF-8: then row by row."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        return [_arrow_row(table.slice(row, 1)) for row in range(table.num_rows)]


def _arrow_row(table: pa.Table | pa.RecordBatch) -> RawRow:
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow(f"a text is not valid UTF-8 ({error.reason})")


def _with_image(raw: RawRow) -> RawRow:
    """An image folder's row with its picture as `image`."""
    if isinstance(raw, dict) and not raw.get("image"):
        raw["image"] = next((raw[name] for name in FILE_COLUMNS if raw.get(name)), None)
    return raw


def _check_columns(where: str, columns: list[str]) -> None:
    if "item_id" not in columns or not set(columns) & {*ITEM_FIELDS, *FILE_COLUMNS}:
        raise TableError(
            f"{where}: an item table needs 'item_id' and at least one of {', '.join(ITEM_FIELDS)}; "
            f"it has {', '.join(columns) or 'no column'}."
        )


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise TableError(f"{path}: not a readable Parquet file ({error}).") from error


def _id_hash(raw: RawRow) -> int:
    item_id = row_id(raw.get("item_id")) if isinstance(raw, dict) else ""
    if not item_id:
        return NO_ID
    digest = hashlib.blake2b(item_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _file_digest(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(io.DEFAULT_BUFFER_SIZE * 128):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()
