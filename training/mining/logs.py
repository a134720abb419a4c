"""The files of an interaction log as Parquet that any engine reads alike.

Parquet whose ids are texts or integers is read by the engine itself. Everything else (CSV, JSON lines, ids that are floats,
binary, decimals, a damaged file) is brought to Parquet first, by the rules of `training.tables`: ids are texts exactly as
written, a row that can't be read costs itself and is listed with file, row and reason.
"""

import glob
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from training.mining.cooccurrence import IDS, LOG_COLUMNS, MiningError
from training.mining.log_blocks import (
    Block,
    OddFileError,
    Types,
    careful_csv,
    careful_json,
    csv_blocks,
    json_blocks,
    lines_above_header,
    parquet_blocks,
)
from training.tables.ids import ids_of
from training.tables.lines import csv_header
from training.tables.remote.places import Allowed, RemoteError, is_address
from training.tables.remote.tables import remote_files
from training.tables.sources import SUFFIXES, is_shown


REJECTS_LISTED = 100_000
"""Of each kind; more are counted only, so that a log of garbage can't fill memory or disk."""


@dataclass
class BrokenRows:
    """Rows that no engine is given: counted by kind of reason, the first of them listed with file, row and reason."""

    counts: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, file: str, row: int, reason: str) -> None:
        """Count a row of a file, from 0; in CSV the header doesn't count."""
        kind = reason.split(":")[0]
        self.counts[kind] += 1
        if self.counts[kind] <= REJECTS_LISTED:
            self.listed.append({"file": file, "row": row, "reason": reason})

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


@dataclass(frozen=True)
class LogFile:
    """A file of a log: where it, or its copy, lies, and how messages call it."""

    path: Path
    name: str


def open_log(
    source: str, folder: Path, encoding: str | None, comment: str | None, native: bool, allow_remote: str | None = None
) -> tuple[list[LogFiles], BrokenRows]:
    """The files of a log, those of one schema together, brought to Parquet in `folder` where need be.

    Args:
        source: a .parquet, .csv or .jsonl file, a folder or a glob of such, or the address of one.
        encoding: of text files without a mark; none: UTF-8.
        comment: what comment lines above a CSV's header begin with.
        native: leave Parquet of plain types to the engine; else all is brought to Parquet anew.
        allow_remote: hosts and places that may be asked (`training.tables.remote.places`).

    Raises:
        MiningError: when there is no such file, one of another type, or no file has a column.
    """
    broken = BrokenRows()
    groups: dict[tuple[Any, ...], LogFiles] = {}
    columns: dict[str, None] = {}
    files = log_files(source, allow_remote)
    for number, file in enumerate(tqdm(files, desc="Opening the log", unit="file", leave=False)):
        path = file.path
        if native and path.suffix.lower() == ".parquet" and (types := _plain_types(path)) is not None:
            trimmed, place = False, path
            columns.update(dict.fromkeys(pq.read_schema(path).names))
        else:
            trimmed, place = True, folder / f"part-{number}.parquet"
            names, of_file = _convert(file, place, encoding, comment)
            broken.update(of_file)
            columns.update(dict.fromkeys(names))
            types = dict(zip(LOG_COLUMNS, pq.read_schema(place).types, strict=True))
        key = (trimmed, *(str(kind) for kind in types.values()))
        groups.setdefault(key, LogFiles([], types, trimmed)).paths.append(str(place))
    missing = [name for name in LOG_COLUMNS if name not in columns]
    if missing:
        raise MiningError(f"{source}: no column {', '.join(missing)}; it has {', '.join(columns) or 'nothing'}.")
    return list(groups.values()), broken


def log_files(source: str, allow_remote: str | None = None) -> list[LogFile]:
    """The files that a user's word for a log stands for; of what lies elsewhere, copies.

    In folders and globs, what is hidden or begins with `_` is left out, as an unfinished Spark job's `_temporary`.

    Raises:
        MiningError: when there is none, or one of another type.
    """
    if is_address(source):
        return _fetched(source, allow_remote)
    path = Path(source.removeprefix("file://"))
    if path.is_file():
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
    return [LogFile(place, str(place)) for place in paths]


def _below(root: Path, pattern: str) -> Iterator[Path]:
    for name in sorted(glob.glob(pattern, root_dir=root, recursive=True)):
        hidden = any(part.startswith(("_", ".")) for part in Path(name).parts if part not in Path(pattern).parts)
        if not hidden and (root / name).is_file():
            yield root / name


def check_allowed(source: str, allow_remote: str | None) -> None:
    """Refuse an address that `allow_remote` doesn't name.

    Raises:
        MiningError: with what to pass.
    """
    try:
        if is_address(source):
            Allowed.of(allow_remote).check(source)
    except RemoteError as error:
        raise MiningError(f"{error}.") from error


def _fetched(source: str, allow_remote: str | None) -> list[LogFile]:
    """Copies of the files at an address: no engine fetches an extension for it."""
    check_allowed(source, allow_remote)
    try:
        files = remote_files(source, allow_remote, lambda names: list(filter(is_shown, names)))
    except RemoteError as error:
        raise MiningError(f"{source}: can't be fetched ({error}). Copy the log here and give its path.") from error
    if wrong := [file.name for file in files if not is_shown(file.name)]:
        raise MiningError(f"{wrong[0]}: a log is {', '.join(SUFFIXES)} files, or a folder of them.")
    return [LogFile(file.copy, f"{file.folder.address}/{file.name}") for file in files]


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


def _convert(file: LogFile, place: Path, encoding: str | None, comment: str | None) -> tuple[list[str], BrokenRows]:
    """Write a file's `LOG_COLUMNS` as Parquet; returns the names of all its columns and the rows left out."""
    path = file.path
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        schema = pq.read_schema(path)
        _require_different(path, schema.names)
        kind = _kept_time(schema.field("timestamp").type) if "timestamp" in schema.names else pa.string()
        return schema.names, _write(file.name, place, parquet_blocks(path), kind)
    if suffix == ".jsonl":
        names, careful = list(LOG_COLUMNS), careful_json(path, encoding)
        fast = partial(json_blocks, path)
    else:
        above = lines_above_header(path, encoding, comment)
        names = csv_header(path, encoding, above)
        _require_different(path, names)
        unasked = 0 if comment else above
        fast, careful = partial(csv_blocks, path, names, above, unasked), careful_csv(path, encoding, above, unasked)
    if encoding is None:
        for time_type in (pa.int64(), pa.string()):  # nearly always times are whole numbers, and numbers are quick
            try:
                return names, _write(file.name, place, fast(), time_type)
            except OddFileError:
                break
            except pa.ArrowException:
                continue
    return names, _write(file.name, place, careful, pa.string())


def _require_different(path: Path, names: list[str]) -> None:
    twice = [name for name in LOG_COLUMNS if names.count(name) > 1]
    if twice:
        raise MiningError(f"{path}: two columns are called {', '.join(twice)}.")


def _write(name_of_file: str, place: Path, blocks: Iterable[Block], time_type: pa.DataType) -> BrokenRows:
    broken = BrokenRows()
    schema = pa.schema([*((name, pa.string()) for name in IDS), ("timestamp", time_type)])
    with pq.ParquetWriter(place, schema) as writer:
        for block in blocks:
            for row, reason in block.lost:
                broken.add(name_of_file, row, reason)
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
                    broken.add(name_of_file, block.first + row, reason)
            writer.write_table(pa.table(columns, schema=schema).filter(pa.array(usable)))
    return broken


def _kept_time(kind: pa.DataType) -> pa.DataType:
    """As which type a Parquet's times are held: nanoseconds, which not every engine has, as microseconds."""
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return kind if _is_plain_time(kind) and not _is_text(kind) else pa.string()


__all__ = ["BrokenRows", "LogFile", "LogFiles", "check_allowed", "is_integer", "log_files", "open_log"]
