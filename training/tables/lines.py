"""CSV and JSON lines, row by row, so that a broken row costs itself and nothing behind it.

Bytes are decoded line by line. UTF-8 is the rule, with or without a mark; UTF-16 and UTF-32 need their mark; anything else
its name. A byte that is none of the encoding's rejects its row: nothing is replaced. Lines end with a line feed, a carriage
return, or both.
"""

import codecs
import csv
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from training.tables.rejects import TableError


MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
ESCAPE = "tables_escape"
ESCAPED = re.compile("[\udc00-\udcff]")
HALF_PAIR = re.compile("[\ud800-\udfff]")
LONGEST = 1 << 20
"""Characters of a row of several lines, at most; a quote that is open for longer is a stray one."""


@dataclass(frozen=True)
class BadRow:
    """A row that can't be read, and why."""

    reason: str


Row = dict[str, Any] | BadRow | None

csv.field_size_limit(LONGEST)


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Each byte that can't be decoded as a half surrogate, which `_undecoded` finds."""
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(ESCAPE, _escape)


def read_csv(path: Path, encoding: str | None = None, skip: int = 0) -> Iterator[Row]:
    """The rows below a CSV's header, every field as text; None for an empty line.

    Args:
        skip: lines above the header; empty ones there never count.

    Raises:
        TableError: for an encoding that Python doesn't know, or a header that isn't in it.
    """
    encoding = _marked_encoding(path) or encoding
    lines = islice(text_lines(path, encoding), skip, None)
    header = _header(path, lines, encoding)
    id_column = next((number for number, name in enumerate(header) if name.endswith("_id")), 0)
    waiting = _Lines(lines)
    while (line := waiting.take()) is not None:
        if not line.strip():
            yield None
            continue
        fields = _fields(line, waiting, len(header), id_column, encoding)
        yield fields if isinstance(fields, BadRow) else dict(zip(header, fields, strict=True))


def csv_header(path: Path, encoding: str | None = None, skip: int = 0) -> list[str]:
    """The names of a CSV's columns; none for an empty file."""
    return _header(path, islice(text_lines(path, encoding), skip, None), encoding)


def read_json(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """The objects of a JSON lines file; None for an empty line."""
    encoding = _marked_encoding(path) or encoding
    for line in text_lines(path, encoding):
        if not line.strip():
            yield None
            continue
        if (fault := _undecoded(line, encoding)) is not None:
            yield fault
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadRow(f"unreadable row: {error}")
            continue
        if not isinstance(row, dict):
            yield BadRow(f"unreadable row: no JSON object but {type(row).__name__}")
        elif any(HALF_PAIR.search(name) for name in row):
            yield BadRow("unreadable row: a column's name is not valid Unicode")
        else:
            yield row


class _Lines:
    """Lines that can be given back."""

    def __init__(self, lines: Iterator[str]):
        self.lines, self.returned = lines, deque[str]()

    def take(self) -> str | None:
        return self.returned.popleft() if self.returned else next(self.lines, None)

    def give_back(self, lines: Iterable[str]) -> None:
        self.returned.extendleft(reversed(list(lines)))


def _fields(line: str, waiting: _Lines, width: int, id_column: int, encoding: str | None) -> list[str] | BadRow:
    """The fields of the row that begins with `line`; further lines are taken where a quoted field goes on in them."""
    if '"' not in line:
        return _checked(line, _split(line), width, encoding)
    taken, characters = [line], len(line)
    fields = _parse(taken)
    while fields is None and characters < LONGEST and (another := waiting.take()) is not None:
        taken.append(another)
        characters += len(another)
        if '"' in another:
            fields = _parse(taken)
    whole = isinstance(fields, list) and len(fields) == width
    if len(taken) > 1 and (not whole or _look_like_rows(taken, fields, width, id_column)):
        waiting.give_back(taken[1:])
        return BadRow("unreadable row: a quote that nothing closes")
    return _checked("".join(taken), fields, width, encoding)


def _checked(text: str, fields: list[str] | BadRow | None, width: int, encoding: str | None) -> list[str] | BadRow:
    if (fault := _undecoded(text, encoding)) is not None:
        return fault
    if fields is None:
        return BadRow("unreadable row: a quote that nothing closes")
    if isinstance(fields, list) and len(fields) != width:
        return BadRow(f"unreadable row: {len(fields)} fields, but the header has {width}")
    return fields


def _split(line: str) -> list[str]:
    return line.removesuffix("\n").removesuffix("\r").split(",")


def _parse(lines: list[str]) -> list[str] | BadRow | None:
    """The fields of a row of some lines; None when a quoted field doesn't end in them."""
    try:
        return next(csv.reader(lines, strict=True), [])
    except csv.Error as error:
        return None if "unexpected end of data" in str(error) else BadRow(f"unreadable row: {error}")


def _look_like_rows(lines: list[str], fields: list[str] | BadRow | None, width: int, id_column: int) -> bool:
    """Whether the further lines of a row are rows themselves: as many fields, and an id of the characters of the row's own.

    Then two stray quotes make what looks like one long field. Words are ids only where they are as long as the row's own:
    else a text of several lines, with a comma in each, would be taken for rows.
    """
    if not isinstance(fields, list):
        return True
    own, length = _characters(fields[id_column]), len(fields[id_column].strip())
    for line in lines[1:]:
        alone = _split(line)
        if len(alone) != width:
            return False
        its = _characters(alone[id_column])
        if not its or not its <= own or ("0" not in its and len(alone[id_column].strip()) != length):
            return False
    return True


def _characters(text: str) -> set[str]:
    """Kinds of the characters of an id: digits, letters, and each other one as itself."""
    return {
        "0" if character.isdecimal() else "a" if character.isascii() and character.isalpha() else character
        for character in text.strip()
    }


def _header(path: Path, lines: Iterator[str], encoding: str | None) -> list[str]:
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return []
    if (fault := _undecoded(first, encoding)) is not None:
        raise TableError(f"{path}: its header is {fault.reason.removeprefix('unreadable row: ')}.")
    if "\0" in first:
        raise TableError(f"{path}: its header holds NUL bytes; if it is UTF-16, name --encoding utf-16-le (or -be).")
    fields = _parse([first])
    if not isinstance(fields, list):
        raise TableError(f"{path}: its first line is no header of a CSV ({first.strip()[:80]!r}).")
    return [name.strip() for name in fields]


def text_lines(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The lines of a text file with their ends.

    Raises:
        TableError: for an encoding that Python doesn't know.
    """
    known = _marked_encoding(path) or encoding or "utf-8"
    try:
        with path.open(encoding=known, errors=ESCAPE, newline="") as stream:
            yield from stream
    except LookupError as error:
        raise TableError(f"--encoding {encoding}: Python knows no such encoding of text.") from error
    except UnicodeError as error:
        raise TableError(f"{path}: can't be read with --encoding {encoding} ({error}).") from error


def _marked_encoding(path: Path) -> str | None:
    """The encoding that a file's mark tells, if it has one."""
    with path.open("rb") as stream:
        start = stream.read(4)
    return next((name for mark, name in MARKS if start.startswith(mark)), None)


def _undecoded(text: str, encoding: str | None) -> BadRow | None:
    if text.isascii() or (escaped := ESCAPED.search(text)) is None:
        return None
    byte = ord(escaped[0]) - 0xDC00
    advice = "; is it another encoding?" if encoding else "; name the file's encoding with --encoding"
    return BadRow(f"unreadable row: not {encoding or 'UTF-8'}: byte 0x{byte:02x} at {escaped.start()}{advice}")
