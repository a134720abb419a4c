"""The files of an interaction log as Parquet that any engine reads alike.

Parquet whose ids are texts or integers is read by the engine itself. Everything else (CSV, JSON lines, ids that are floats,
binary, decimals, a damaged file) is brought to Parquet first, by the rules of `training.tables`: ids are texts exactly as
written, a row that can't be read costs itself and is listed with file, row and reason.
"""

import codecs
import glob
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from training.mining.cooccurrence import IDS, LOG_COLUMNS, MiningError
from training.tables.ids import id_of, ids_of
from training.tables.lines import BadRow, Row, csv_header, read_csv, read_json, text_lines
from training.tables.texts import each_text, plain_text


SUFFIXES = (".parquet", ".csv", ".jsonl")
ROWS = 65_536
"""Rows of text that are handled at once."""
BLOCK_BYTES = 1 << 24
HALF_PAIR = re.compile(rb"\\\\u[dD][89a-fA-F]")
"""An escape of JSON that may be half a surrogate pair."""
REJECTS_LISTED = 100_000
"""Of each kind; more are counted only, so that a log of garbage can't fill memory or disk."""

Types = dict[str, pa.DataType]


@dataclass
class BrokenRows:
    """Rows that no engine is given: counted by kind of reason, the first of them listed with file, row and reason."""

    counts: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, path: Path, row: int, reason: str) -> None:
        """Count a row of a file, from 0; in CSV the header doesn't count."""
        kind = reason.split(":")[0]
        self.counts[kind] += 1
        if self.counts[kind] <= REJECTS_LISTED:
            self.listed.append({"file": str(path), "row": row, "reason": reason})

    def update(self, other: "BrokenRows") -> None:
        """Count those of another file too."""
        for row in other.listed:
            if self.counts[row["reason"].split(":")[0]] < REJECTS_LISTED:
                self.listed.append(row)
        self.counts += other.counts


@dataclass(frozen=True)
class LogFiles:
    """Parquet files of one schema.

    Attributes:
        paths: the files.
        types: of `LOG_COLUMNS`; null for a column that they lack.
        trimmed: whether texts have no blanks around them.
    """

    paths: list[str]
    types: Types
    trimmed: bool


def open_log(
    source: str, folder: Path, encoding: str | None, comment: str | None, native: bool
) -> tuple[list[LogFiles], BrokenRows]:
    """The files of a log, those of one schema together, brought to Parquet in `folder` where need be.

    Args:
        source: a .parquet, .csv or .jsonl file, a folder or a glob of such, or a URL.
        encoding: of text files without a mark; none: UTF-8.
        comment: what comment lines above a CSV's header begin with.
        native: leave Parquet of plain types to the engine; else all is brought to Parquet anew.

    Raises:
        MiningError: when there is no such file, one of another type, or no file has a column.
    """
    broken = BrokenRows()
    groups: dict[tuple[Any, ...], LogFiles] = {}
    columns: dict[str, None] = {}
    paths = log_paths(source, folder)
    for number, path in enumerate(tqdm(paths, desc="Opening the log", unit="file", leave=False)):
        if native and path.suffix.lower() == ".parquet" and (types := _plain_types(path)) is not None:
            trimmed, place = False, path
            columns.update(dict.fromkeys(pq.read_schema(path).names))
        else:
            trimmed, place = True, folder / f"part-{number}.parquet"
            names, of_file = _convert(path, place, encoding, comment)
            broken.update(of_file)
            columns.update(dict.fromkeys(names))
            types = dict(zip(LOG_COLUMNS, pq.read_schema(place).types, strict=True))
        key = (trimmed, *(str(kind) for kind in types.values()))
        groups.setdefault(key, LogFiles([], types, trimmed)).paths.append(str(place))
    missing = [name for name in LOG_COLUMNS if name not in columns]
    if missing:
        raise MiningError(f"{source}: no column {', '.join(missing)}; it has {', '.join(columns) or 'nothing'}.")
    return list(groups.values()), broken


def log_paths(source: str, folder: Path) -> list[Path]:
    """The files that a user's word for a log stands for; those of a URL are copied into `folder`.

    In folders and globs, what is hidden or begins with `_` is left out, as an unfinished Spark job's `_temporary`.

    Raises:
        MiningError: when there is none, or one of another type.
    """
    path = Path(source)
    if "://" in source:
        paths = list(_fetched(source, folder))
    elif path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = [place for place in _below(path, "**/*") if place.suffix.lower() in SUFFIXES]
    else:
        parts = path.parts
        fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        root = Path(*parts[:fixed])
        paths = list(_below(root, str(Path(*parts[fixed:])))) if fixed < len(parts) else []
    if not paths:
        raise MiningError(
            f"{source}: no such file" + (f", or no {', '.join(SUFFIXES)} file in it." if path.is_dir() else ".")
        )
    wrong = next((place for place in paths if place.suffix.lower() not in SUFFIXES), None)
    if wrong is not None:
        raise MiningError(f"{wrong}: a log is {', '.join(SUFFIXES)} files, or a folder of them.")
    return paths


def _below(root: Path, pattern: str) -> Iterator[Path]:
    for name in sorted(glob.glob(pattern, root_dir=root, recursive=True)):
        hidden = any(part.startswith(("_", ".")) for part in Path(name).parts if part not in Path(pattern).parts)
        if not hidden and (root / name).is_file():
            yield root / name


def _fetched(url: str, folder: Path) -> Iterator[Path]:
    """Copies of the files of a URL, by fsspec: no engine fetches an extension for it."""
    try:
        system, place = fsspec.url_to_fs(url)
        names = system.glob(place) if glob.has_magic(place) else [place]
        for number, name in enumerate(names):
            copy = folder / f"copy-{number}{Path(name.split('?')[0]).suffix}"
            system.get_file(name, str(copy))
            yield copy
    except (OSError, ValueError, ImportError) as error:
        raise MiningError(f"{url}: can't be fetched ({error}). Copy the log here and give its path.") from error
    except Exception as error:  # each kind of file system has errors of its own
        raise MiningError(f"{url}: can't be fetched ({error!r}). Copy the log here and give its path.") from error


def _plain_types(path: Path) -> Types | None:
    """Types of the log's columns where engines read them by the rules themselves; None where not."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise MiningError(f"{path}: not a readable Parquet file ({error}).") from error
    if len(set(schema.names)) < len(schema.names):
        return None
    types = {}
    for name in LOG_COLUMNS:
        kind = schema.field(name).type if name in schema.names else pa.null()
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        types[name] = kind
    plain = all(_is_text(types[name]) or is_integer(types[name]) for name in IDS) and _is_plain_time(types["timestamp"])
    return types if plain else None


def is_integer(kind: pa.DataType) -> bool:
    """Whether ids of a type are whole numbers of at most 64 bits with a sign."""
    return pa.types.is_integer(kind) and kind != pa.uint64()


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_plain_time(kind: pa.DataType) -> bool:
    number = pa.types.is_integer(kind) or kind in (pa.float32(), pa.float64())
    return number or _is_text(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind)


@dataclass(frozen=True)
class Block:
    """Some rows of a file.

    Attributes:
        first: number of the first in its file.
        columns: of `LOG_COLUMNS`, those that are there.
        faults: reasons of rows that can't be used, by place in the block; "" for a line that is empty, and no row.
        lost: numbers in the file and reasons of rows that are not in the columns.
    """

    first: int
    columns: dict[str, pa.Array]
    faults: dict[int, str] = field(default_factory=dict)
    lost: Sequence[tuple[int, str]] = ()


class _OddFileError(Exception):
    """A text file that the fast readers might read in another way than the careful one."""


def _convert(path: Path, place: Path, encoding: str | None, comment: str | None) -> tuple[list[str], BrokenRows]:
    """Write a file's `LOG_COLUMNS` as Parquet; returns the names of all its columns and the rows left out."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        schema = pq.read_schema(path)
        _require_different(path, schema.names)
        kind = _kept_time(schema.field("timestamp").type) if "timestamp" in schema.names else pa.string()
        return schema.names, _write(path, place, _parquet_blocks(path), kind)
    if suffix == ".jsonl":
        names, careful = list(LOG_COLUMNS), _careful_json(path, encoding)
        fast = partial(_json_blocks, path)
    else:
        above = _lines_above_header(path, encoding, comment)
        names = csv_header(path, encoding, above)
        _require_different(path, names)
        unasked = 0 if comment else above
        fast, careful = partial(_csv_blocks, path, names, above, unasked), _careful_csv(path, encoding, above, unasked)
    if encoding is None:
        for time_type in (pa.int64(), pa.string()):  # nearly always times are whole numbers, and numbers are quick
            try:
                return names, _write(path, place, fast(), time_type)
            except _OddFileError:
                break
            except pa.ArrowException:
                continue
    return names, _write(path, place, careful, pa.string())


def _require_different(path: Path, names: list[str]) -> None:
    twice = [name for name in LOG_COLUMNS if names.count(name) > 1]
    if twice:
        raise MiningError(f"{path}: two columns are called {', '.join(twice)}.")


def _write(path: Path, place: Path, blocks: Iterable[Block], time_type: pa.DataType) -> BrokenRows:
    broken = BrokenRows()
    schema = pa.schema([*((name, pa.string()) for name in IDS), ("timestamp", time_type)])
    with pq.ParquetWriter(place, schema) as writer:
        for block in blocks:
            for row, reason in block.lost:
                broken.add(path, row, reason)
            rows = len(next(iter(block.columns.values()), ()))
            columns, faults = {}, dict(block.faults)
            for name in LOG_COLUMNS:
                column = block.columns.get(name, pa.nulls(rows))
                if name in IDS or time_type == pa.string():
                    column, wrong = ids_of(column)  # what a time is as text follows the same rule
                else:
                    column, wrong = column.cast(time_type, safe=time_type == pa.int64()), {}
                columns[name] = column
                for row, reason in wrong.items():
                    faults.setdefault(row, f"{name} is {reason}")
            usable = np.ones(rows, dtype=bool)
            for row, reason in sorted(faults.items()):
                usable[row] = False
                if reason:
                    broken.add(path, block.first + row, reason)
            writer.write_table(pa.table(columns, schema=schema).filter(pa.array(usable)))
    return broken


def _kept_time(kind: pa.DataType) -> pa.DataType:
    """As which type a Parquet's times are held: nanoseconds, which not every engine has, as microseconds."""
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return kind if _is_plain_time(kind) and not _is_text(kind) else pa.string()


def _parquet_blocks(path: Path) -> Iterator[Block]:
    """Row group by row group; the rest of a damaged one is lost."""
    file = pq.ParquetFile(path, page_checksum_verification=True)
    names = [name for name in LOG_COLUMNS if name in file.schema_arrow.names]
    first = 0
    for group in range(file.num_row_groups):
        rows, done = file.metadata.row_group(group).num_rows, 0
        try:
            for batch in file.iter_batches(ROWS, [group], names):
                yield Block(first + done, dict(zip(batch.schema.names, batch.columns, strict=True)))
                done += len(batch)
        except (OSError, pa.ArrowException) as error:
            reason = f"unreadable row: the Parquet file is damaged here ({error})"
            yield Block(first, {}, lost=[(first + row, reason) for row in range(done, rows)])
        first += rows


def _lines_above_header(path: Path, encoding: str | None, comment: str | None) -> int:
    """How many lines stand above a CSV's header: comment lines that are asked for, or such that a header follows."""
    for number, line in enumerate(text_lines(path, encoding)):
        if not line.startswith(comment or "#"):
            names = [name.strip(' "\r\n') for name in line.split(",")]
            return number if comment or set(LOG_COLUMNS) <= set(names) else 0
    return 0


def _above(count: int) -> list[tuple[int, str]]:
    return [(row - count, "a comment line above the header") for row in range(count)]


def _careful_csv(path: Path, encoding: str | None, above: int, unasked: int) -> Iterator[Block]:
    yield Block(0, {}, lost=_above(unasked))
    for first, rows in _batched(read_csv(path, encoding, above)):
        values = {name: [row.get(name) if isinstance(row, dict) else None for row in rows] for name in LOG_COLUMNS}
        yield Block(first, {name: pa.array(values[name], pa.string()) for name in LOG_COLUMNS}, _faults(rows))


def _careful_json(path: Path, encoding: str | None) -> Iterator[Block]:
    for first, rows in _batched(read_json(path, encoding)):
        faults, columns = _faults(rows), {}
        for name in LOG_COLUMNS:
            text_of = id_of if name in IDS else plain_text
            cells = (row.get(name) if isinstance(row, dict) else None for row in rows)
            columns[name], wrong = each_text(cells, text_of)
            for row, reason in wrong.items():
                faults.setdefault(row, f"{name} is {reason}")
        yield Block(first, columns, faults)


def _batched(rows: Iterator[Row]) -> Iterator[tuple[int, list[Row]]]:
    first = 0
    while batch := list(islice(rows, ROWS)):
        yield first, batch
        first += len(batch)


def _faults(rows: list[Row]) -> dict[int, str]:
    """Reasons of rows that can't be read; none for an empty line."""
    return {
        number: row.reason if isinstance(row, BadRow) else ""
        for number, row in enumerate(rows)
        if not isinstance(row, dict)
    }


def _csv_blocks(path: Path, names: list[str], above: int, unasked: int) -> Iterator[Block]:
    """As `_careful_csv` reads it, for a file that has nothing odd, by Arrow."""
    for chunk in _plain_chunks(path):
        _require_plain_quotes(chunk)
    lost = _above(unasked)

    def wrong(row: pyarrow.csv.InvalidRow) -> str:
        if row.text.strip():
            reason = f"unreadable row: {row.actual_columns} fields, but the header has {row.expected_columns}"
            lost.append((row.number - above - 2, reason))
        return "skip"

    reader = pyarrow.csv.open_csv(
        path,
        pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=names, skip_rows=above + 1),
        pyarrow.csv.ParseOptions(invalid_row_handler=wrong),
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            include_columns=[name for name in LOG_COLUMNS if name in names],
        ),
    )
    for batch in reader:
        yield Block(0, dict(zip(batch.schema.names, batch.columns, strict=True)), lost=tuple(lost))
        lost.clear()
    yield Block(0, {}, lost=lost)


def _json_blocks(path: Path) -> Iterator[Block]:
    """As `_careful_json` reads it, for a file whose lines all hold the same types, by Arrow."""
    types: Types | None = None
    for chunk in _plain_chunks(path):
        if HALF_PAIR.search(chunk):
            raise _OddFileError
        if types is None:
            types = _types_of(chunk[: chunk.find(b"\n") + 1 or None])
        table = pyarrow.json.read_json(
            pa.BufferReader(chunk),
            pyarrow.json.ReadOptions(use_threads=False, block_size=2 * len(chunk)),
            pyarrow.json.ParseOptions(explicit_schema=pa.schema(types), unexpected_field_behavior="ignore"),
        )
        if len(table) != chunk.count(b"\n") + (not chunk.endswith(b"\n")):
            raise _OddFileError
        for batch in table.combine_chunks().to_batches():
            yield Block(0, dict(zip(batch.schema.names, batch.columns, strict=True)))


def _types_of(line: bytes) -> Types:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _OddFileError from error
    known = {str: pa.string(), int: pa.int64()}
    types = {name: known.get(type(row.get(name))) for name in LOG_COLUMNS} if isinstance(row, dict) else {"": None}
    if not all(types.values()):
        raise _OddFileError
    return types


def _plain_chunks(path: Path) -> Iterator[bytes]:
    """A text file in pieces of whole lines.

    Raises:
        _OddFileError: for a mark other than UTF-8's, what isn't UTF-8, NUL, empty lines, and carriage returns that no line
            feed follows.
    """
    with path.open("rb") as stream:
        rest = b""
        first = True
        while piece := stream.read(BLOCK_BYTES):
            piece = rest + piece
            if first:
                piece, first = piece.removeprefix(codecs.BOM_UTF8), False
            end = piece.rfind(b"\n") + 1
            chunk, rest = piece[:end], piece[end:]
            if chunk:
                yield _required_plain(chunk)
        if rest:
            yield _required_plain(rest)


def _required_plain(chunk: bytes) -> bytes:
    if b"\0" in chunk or chunk.count(b"\r") != chunk.count(b"\r\n"):
        raise _OddFileError
    if chunk.startswith((b"\n", b"\r")) or b"\n\n" in chunk or b"\n\r" in chunk:  # rows are counted with empty lines
        raise _OddFileError
    if not chunk.isascii():
        try:
            chunk.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _OddFileError from error
    return chunk


def _require_plain_quotes(chunk: bytes) -> None:
    """Raises `_OddFileError` unless each quote opens or closes a whole field within its line, with no quote inside."""
    if b'"' not in chunk:
        return
    codes = np.frombuffer(b"\n" + chunk + b"\n", dtype=np.uint8)
    quotes = np.flatnonzero(codes == ord('"'))
    if len(quotes) % 2:
        raise _OddFileError
    opening, closing = quotes[::2], quotes[1::2]
    before, behind = codes[opening - 1], codes[closing + 1]
    ends = np.flatnonzero(codes == ord("\n"))
    in_line = np.searchsorted(ends, opening) == np.searchsorted(ends, closing)
    if not (in_line & np.isin(before, list(b",\n")) & np.isin(behind, list(b",\r\n"))).all():
        raise _OddFileError


__all__ = ["BrokenRows", "LogFiles", "is_integer", "log_paths", "open_log"]
