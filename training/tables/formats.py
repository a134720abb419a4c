"""The kinds of files, each as a stream of Arrow tables of bounded size with the faults of their rows.

Whatever breaks in a file costs the rows that it touches: a line of text, a cell, the rest of a damaged row group of Parquet.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training.tables.columns import Classes, arrow_column, cells_column, own_type, reason_of
from training.tables.lines import BadRow, Row, csv_header, read_csv, read_json
from training.tables.rejects import TableError
from training.tables.remote.places import RemoteFolder
from training.tables.sources import TableFile, TableSplit, noted_sha256
from training.tables.texts import Faults, is_stringlike


MOST_ROWS = 10_000
MOST_BYTES = 16 * 2**20
"""Of a block. Rows with pictures are so few at once that no offset of 32 bits overflows."""
PROBE = 16
"""Rows of a Parquet file that are read to see how large they are."""
EMPTY_LINE = ""
"""The fault of a line that has nothing: no row, and no reject."""

Types = dict[str, pa.DataType | None]
"""Columns in their order; the type of the user's own, None: held as text."""


@dataclass(frozen=True)
class Block:
    """Some rows of a file.

    Attributes:
        rows: how many.
        columns: by name, each with `rows` values in the form of its name.
        faults: reasons of the rows that can't be used.
    """

    rows: int
    columns: dict[str, pa.Array]
    faults: Faults


class TablePart(Protocol):
    """One file or split, opened."""

    name: str
    folder: Path | RemoteFolder

    @abstractmethod
    def types(self) -> Types:
        """Its columns."""

    @abstractmethod
    def blocks(self, types: Types) -> Iterator[Block]:
        """All rows, in order.

        Args:
            types: of the whole table, by which the user's own columns are held.
        """

    @abstractmethod
    def sha256(self) -> str:
        """Of the content."""


def open_part(part: TableFile | TableSplit, encoding: str | None) -> TablePart:
    """Opens a file or split.

    Raises:
        TableError: when it is no file of its kind.
    """
    if isinstance(part, TableSplit):
        return SavedPart(part)
    if part.path.is_dir():
        return LancePart(part.path, part.name, part.folder)
    suffix = part.path.suffix.lower()
    if suffix == ".parquet":
        return ParquetPart(part.path, part.name, part.folder)
    return TextPart(part.path, part.name, part.folder, encoding)


@dataclass
class TextPart:
    """A CSV or JSON lines file."""

    path: Path
    name: str
    folder: Path | RemoteFolder
    encoding: str | None

    def types(self) -> Types:
        """The header's names, columns without one left out; in JSON lines the keys of all objects, which are read once."""
        if self._is_csv:
            named = [name for name in csv_header(self.path, self.encoding) if name]
            return dict.fromkeys(_different(named, self.path))
        keys: Types = {}
        for row in read_json(self.path, self.encoding):
            if isinstance(row, dict):
                keys.update(dict.fromkeys(row))
        return keys

    def blocks(self, types: Types) -> Iterator[Block]:
        """Blocks of rows, cut by their characters."""
        waiting: list[Row] = []
        size = 0
        for row in self._rows():
            waiting.append(row)
            size += sum(map(_size, row.values())) if isinstance(row, dict) else 1
            if len(waiting) == MOST_ROWS or size > MOST_BYTES:
                yield self._block(waiting, types)
                waiting, size = [], 0
        if waiting:
            yield self._block(waiting, types)

    def sha256(self) -> str:
        """Of the file."""
        return noted_sha256(self.path)

    @property
    def _is_csv(self) -> bool:
        return self.path.suffix.lower() == ".csv"

    def _rows(self) -> Iterator[Row]:
        return (read_csv if self._is_csv else read_json)(self.path, self.encoding)

    def _block(self, rows: list[Row], types: Types) -> Block:
        cells = [row if isinstance(row, dict) else {} for row in rows]
        faults: Faults = {}
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                faults[number] = row.reason if isinstance(row, BadRow) else EMPTY_LINE
        columns = {}
        for name in types:
            columns[name], broken = cells_column(name, [row.get(name) for row in cells])
            _add(faults, broken, name)
        return Block(len(rows), columns, faults)


@dataclass
class ParquetPart:
    """A Parquet file, mapped."""

    path: Path
    name: str
    folder: Path | RemoteFolder
    classes: Classes = field(init=False)

    def __post_init__(self) -> None:
        self.classes = classes_of(self._file.schema_arrow)

    def types(self) -> Types:
        """From the file's schema."""
        _different(self._file.schema_arrow.names, self.path)
        return _own_types(self._file.schema_arrow, self.classes)

    def blocks(self, types: Types) -> Iterator[Block]:
        """Row group by row group, in batches whose size follows what the rows before took."""
        row_bytes = 1.0
        for group in range(self._file.num_row_groups):
            metadata = self._file.metadata.row_group(group)
            row_bytes = max(row_bytes, metadata.total_byte_size / max(metadata.num_rows, 1))
            done = 0
            try:
                if metadata.num_rows:
                    probe = next(self._file.iter_batches(PROBE, [group], use_threads=False))
                    row_bytes = max(row_bytes, _bytes(probe) / len(probe))
                size = int(min(max(MOST_BYTES / row_bytes, 1), MOST_ROWS))
                for batch in self._file.iter_batches(size, [group], use_threads=False):
                    yield from _cut(batch, types, self.classes)
                    done += len(batch)
                    row_bytes = max(row_bytes, _bytes(batch) / max(len(batch), 1))
            except (OSError, pa.ArrowException) as error:
                yield _lost(metadata.num_rows - done, f"the Parquet file is damaged here ({error})")

    def sha256(self) -> str:
        """Of the file."""
        return noted_sha256(self.path)

    @cached_property
    def _file(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path, memory_map=True, pre_buffer=False, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise TableError(f"{self.path}: not a readable Parquet file ({error}).") from error


@dataclass
class LancePart:
    """A Lance table: a folder, of which the newest version counts."""

    path: Path
    name: str
    folder: Path | RemoteFolder

    def types(self) -> Types:
        """From the table's schema."""
        return _own_types(self._dataset.schema, {})

    def blocks(self, types: Types) -> Iterator[Block]:
        """Fragment by fragment; rows that were deleted are none."""
        for fragment in self._dataset.get_fragments():
            done = 0
            try:
                rows = fragment.to_batches(
                    batch_size=MOST_ROWS, batch_size_bytes=MOST_BYTES, blob_handling="all_binary"
                )
                for batch in rows:
                    yield from _cut(batch, types, {})
                    done += len(batch)
            except (OSError, ValueError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())
                yield _lost(fragment.count_rows() - done, f"the Lance file is damaged here ({reason:.200})")

    def sha256(self) -> str:
        """Of the files of this version, and of what it has of them."""
        digest = hashlib.sha256(self._dataset.schema.to_string().encode())
        for fragment in self._dataset.get_fragments():
            digest.update(repr(fragment).encode())
            for file in fragment.data_files():
                digest.update(noted_sha256(self.path / "data" / file.path).encode())
        return digest.hexdigest()

    @cached_property
    def _dataset(self) -> Any:
        try:
            import lance
        except ImportError as error:
            raise TableError(f"{self.path}: a Lance table is read with pylance: pip install pylance.") from error
        try:
            return lance.dataset(str(self.path))
        except (OSError, ValueError) as error:
            raise TableError(f"{self.path}: not a readable Lance table ({error}).") from error


@dataclass
class SavedPart:
    """A split of a data set, which `datasets` has mapped already."""

    split: TableSplit

    def __post_init__(self) -> None:
        self.name: str = self.split.name
        self.folder: Path | RemoteFolder = self.split.folder
        self.schema: pa.Schema = self.split.dataset.features.arrow_schema
        self.classes = classes_of(self.schema)

    def types(self) -> Types:
        """From the data set's features."""
        return _own_types(self.schema, self.classes)

    def blocks(self, types: Types) -> Iterator[Block]:
        """Blocks of rows, the first one small, to see how large they are."""
        dataset = self.split.dataset.with_format("arrow")
        start, size = 0, PROBE
        while start < len(dataset):
            table = dataset[start : start + size]
            columns = {name: _joined(table.column(name)) for name in table.column_names}
            yield _arrow_block(columns, len(table), types, self.classes)
            start += len(table)
            size = int(min(max(MOST_BYTES * len(table) / max(table.nbytes, 1), 1), MOST_ROWS))

    def sha256(self) -> str:
        """Of the files that hold it and of how its rows are chosen from them."""
        files = [noted_sha256(Path(file["filename"])) for file in self.split.dataset.cache_files]
        return hashlib.sha256("".join([*files, str(self.split.dataset._fingerprint)]).encode()).hexdigest()


def classes_of(schema: pa.Schema) -> Classes:
    """Names of classes by column, which `datasets` keeps in a schema's metadata."""
    described = (schema.metadata or {}).get(b"huggingface")
    if not described:
        return {}
    features: dict[str, Any] = json.loads(described).get("info", {}).get("features") or {}
    classes = {}
    for name, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            classes[name] = inner["names"]
    return classes


def _different(names: list[str], path: Path) -> list[str]:
    """The names of a file's columns.

    Raises:
        TableError: when two are alike.
    """
    if len(set(names)) < len(names):
        raise TableError(f"{path}: two columns have one name in {', '.join(names)}.")
    return names


def _own_types(schema: pa.Schema, classes: Classes) -> Types:
    return {name: None if name in classes else own_type(schema.field(name).type) for name in schema.names}


def _arrow_block(columns: dict[str, pa.Array], rows: int, types: Types, classes: Classes) -> Block:
    made, faults = {}, Faults()
    for name in types.keys() & columns.keys():
        column = columns[name]
        made[name], broken = arrow_column(name, column, types[name], classes.get(name))
        _add(faults, broken, name)
    return Block(rows, made, faults)


def _cut(batch: pa.RecordBatch, types: Types, classes: Classes) -> Iterator[Block]:
    """A batch in pieces of about `MOST_BYTES`."""
    size = max(1, len(batch) * MOST_BYTES // max(_bytes(batch), MOST_BYTES))
    for start in range(0, len(batch), size):
        piece = batch.slice(start, size)
        yield _arrow_block(dict(zip(piece.schema.names, piece.columns, strict=True)), len(piece), types, classes)


def _bytes(batch: pa.RecordBatch) -> int:
    """Of a batch, once its dictionaries are written out."""
    total = 0
    for column in batch.columns:
        total += column.nbytes
        if pa.types.is_dictionary(column.type) and is_stringlike(column.type.value_type):
            total += pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    return total


def _lost(rows: int, reason: str) -> Block:
    return Block(rows, {}, dict.fromkeys(range(rows), f"unreadable row: {reason}"))


def _joined(column: pa.ChunkedArray) -> pa.Array:
    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


def _add(faults: Faults, broken: Faults, name: str) -> None:
    for row, reason in broken.items():
        faults.setdefault(row, reason_of(name, reason))


def _size(cell: Any) -> int:
    """About how many bytes a cell takes. Not by recursion: what is nested deeply is told later, by name and row."""
    size, waiting = 0, [cell]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Iterable) and not isinstance(part, str):
            waiting.extend(part)
        else:
            size += len(part) if isinstance(part, str) else 8
    return size
