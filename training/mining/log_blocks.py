"""One file of a log as blocks of rows: by a careful reader that every file can be given, and by Arrow's quick ones.

The quick readers take a file only where they read it as the careful one does; they raise `OddFileError` for any other.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from modeling_notellm2.texts_notellm2 import plain_text
from training.mining.cooccurrence import IDS, LOG_COLUMNS
from training.tables.ids import id_of
from training.tables.lines import BadRow, Row, read_csv, read_json, text_lines
from training.tables.texts import each_text


ROWS = 65_536
"""Rows of text that are handled at once."""
BLOCK_BYTES = 1 << 24
HALF_PAIR = re.compile(rb"\\\\u[dD][89a-fA-F]")
"""An escape of JSON that may be half a surrogate pair."""

Types = dict[str, pa.DataType]


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


class OddFileError(Exception):
    """A text file that the fast readers might read in another way than the careful one."""


def parquet_blocks(path: Path) -> Iterator[Block]:
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


def lines_above_header(path: Path, encoding: str | None, comment: str | None) -> int:
    """How many lines stand above a CSV's header: comment lines that are asked for, or such that a header follows."""
    for number, line in enumerate(text_lines(path, encoding)):
        if not line.startswith(comment or "#"):
            names = [name.strip(' "\r\n') for name in line.split(",")]
            return number if comment or set(LOG_COLUMNS) <= set(names) else 0
    return 0


def _above(count: int) -> list[tuple[int, str]]:
    return [(row - count, "a comment line above the header") for row in range(count)]


def careful_csv(path: Path, encoding: str | None, above: int, unasked: int) -> Iterator[Block]:
    """Row by row, by the rules of `training.tables`."""
    yield Block(0, {}, lost=_above(unasked))
    for first, rows in _batched(read_csv(path, encoding, above)):
        values = {name: [row.get(name) if isinstance(row, dict) else None for row in rows] for name in LOG_COLUMNS}
        yield Block(first, {name: pa.array(values[name], pa.string()) for name in LOG_COLUMNS}, _faults(rows))


def careful_json(path: Path, encoding: str | None) -> Iterator[Block]:
    """Row by row, by the rules of `training.tables`."""
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


def csv_blocks(path: Path, names: list[str], above: int, unasked: int) -> Iterator[Block]:
    """As `careful_csv` reads it, for a file that has nothing odd, by Arrow."""
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


def json_blocks(path: Path) -> Iterator[Block]:
    """As `careful_json` reads it, for a file whose lines all hold the same types, by Arrow."""
    types: Types | None = None
    for chunk in _plain_chunks(path):
        if HALF_PAIR.search(chunk):
            raise OddFileError
        if types is None:
            types = _types_of(chunk[: chunk.find(b"\n") + 1 or None])
        table = pyarrow.json.read_json(
            pa.BufferReader(chunk),
            pyarrow.json.ReadOptions(use_threads=False, block_size=2 * len(chunk)),
            pyarrow.json.ParseOptions(explicit_schema=pa.schema(types), unexpected_field_behavior="ignore"),
        )
        if len(table) != chunk.count(b"\n") + (not chunk.endswith(b"\n")):
            raise OddFileError
        for batch in table.combine_chunks().to_batches():
            yield Block(0, dict(zip(batch.schema.names, batch.columns, strict=True)))


def _types_of(line: bytes) -> Types:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OddFileError from error
    known = {str: pa.string(), int: pa.int64()}
    types = {name: known.get(type(row.get(name))) for name in LOG_COLUMNS} if isinstance(row, dict) else {"": None}
    if not all(types.values()):
        raise OddFileError
    return types


def _plain_chunks(path: Path) -> Iterator[bytes]:
    """A text file in pieces of whole lines.

    Raises:
        OddFileError: for a mark other than UTF-8's, what isn't UTF-8, NUL, empty lines, and carriage returns that no line
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
        raise OddFileError
    if chunk.startswith((b"\n", b"\r")) or b"\n\n" in chunk or b"\n\r" in chunk:  # rows are counted with empty lines
        raise OddFileError
    if not chunk.isascii():
        try:
            chunk.decode("utf-8")
        except UnicodeDecodeError as error:
            raise OddFileError from error
    return chunk


def _require_plain_quotes(chunk: bytes) -> None:
    """Raises `OddFileError` unless each quote opens or closes a whole field within its line, with no quote inside."""
    if b'"' not in chunk:
        return
    codes = np.frombuffer(b"\n" + chunk + b"\n", dtype=np.uint8)
    quotes = np.flatnonzero(codes == ord('"'))
    if len(quotes) % 2:
        raise OddFileError
    opening, closing = quotes[::2], quotes[1::2]
    before, behind = codes[opening - 1], codes[closing + 1]
    ends = np.flatnonzero(codes == ord("\n"))
    in_line = np.searchsorted(ends, opening) == np.searchsorted(ends, closing)
    if not (in_line & np.isin(before, list(b",\n")) & np.isin(behind, list(b",\r\n"))).all():
        raise OddFileError
