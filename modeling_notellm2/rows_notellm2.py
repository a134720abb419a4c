"""Rows of a catalogue's files as items: what CSV, JSON lines and Parquet hold differently comes out alike.

Training and encoding read tables by these rules. A row that can't be read comes out as a `BadRow` with the reason, so that
whoever reads can list it and go on. Needs the standard library alone.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ITEM_FIELDS = ("title", "topics", "content", "image")


@dataclass(frozen=True)
class BadRow:
    """A row that can't be read, and why."""

    reason: str


def item_from_row(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A table row as the processor takes it: empty fields left out, ids as text, topics as a list.

    Args:
        raw: the row; fields other than an item's are ignored.
        folder: where relative image paths start.

    Raises:
        ValueError: for topics that are no list of texts.
    """
    item: dict[str, Any] = {"item_id": row_id(raw.get("item_id"))}
    for field in ("title", "content"):
        if raw.get(field):
            item[field] = str(raw[field])
    topics = raw.get("topics")
    if isinstance(topics, str):  # CSV has no lists
        topics = json.loads(topics) if topics.lstrip().startswith("[") else topics.replace("，", ",").split(",")
    topics = [str(topic).strip() for topic in (topics if topics is not None else []) if str(topic).strip()]
    if topics:
        item["topics"] = topics
    image = raw.get("image")
    images = [_located(one, folder) for one in (image if isinstance(image, list) else [image]) if _is_there(one)]
    if images:
        item["image"] = images if isinstance(image, list) else images[0]
    return item


def row_id(value: Any) -> str:
    """An id as text without surrounding blanks; empty for None and NaN."""
    return "" if value is None or value != value else str(value).strip()


def dataset_id(source: str) -> tuple[str, str | None]:
    """Id and config of a Hub dataset named `ORG/DATA` or `ORG/DATA:CONFIG`; None for the default config."""
    name, _, config = source.partition(":")
    return name, config or None


def read_csv_rows(path: Path) -> Iterator[dict[str, Any] | BadRow | None]:
    """The rows of a CSV file with a header, one after another; None for an empty line, so that rows can be counted."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        lines = iter(stream)
        yield from csv_rows(lines, next(csv.reader(lines), []))


def read_json_rows(path: Path) -> Iterator[dict[str, Any] | BadRow | None]:
    """The lines of a JSON lines file, one after another; None for an empty line, so that lines can be counted."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as stream:
        yield from json_rows(stream)


def csv_rows(lines: Iterable[str], header: Sequence[str]) -> Iterator[dict[str, Any] | BadRow | None]:
    """Rows of CSV lines below the header. Every field is text: an id of digits stays what it is.

    No line is taken from `lines` before it is needed, so that whoever counts them knows where each row begins.
    """
    reader = csv.reader(lines)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield BadRow(str(error))
            continue
        if row is None:
            return
        if len(row) == len(header):
            yield dict(zip(header, row, strict=True))
        else:
            yield BadRow(f"{len(row)} fields, but the header has {len(header)}") if row else None


def json_rows(lines: Iterable[str]) -> Iterator[dict[str, Any] | BadRow | None]:
    """Rows of JSON lines; None for an empty one."""
    for line in lines:
        if not line.strip():
            yield None
            continue
        try:
            yield _json_row(line)
        except (ValueError, RecursionError) as error:
            yield BadRow(str(error))


def _json_row(line: str) -> dict[str, Any]:
    """One line's object with columns of one type each: topics and images as lists, everything else as text."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {type(row).__name__}")
    for field in ("topics", "image"):
        value = row.get(field)
        if field == "topics" and isinstance(value, str):
            value = value.replace("，", ",").split(",")
        value = [value] if isinstance(value, str) else value or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{field} must be text or a list of texts: {json.dumps(row[field])[:80]}")
        if field in row:
            row[field] = value
    for field in ("title", "content"):
        if not isinstance(row.get(field), str | None):
            raise ValueError(f"{field} must be text: {json.dumps(row[field])[:80]}")
    lists = ("topics", "image")
    return {key: value if key in lists or value is None else str(value) for key, value in row.items()}


def _is_there(image: Any) -> bool:
    return bool(image.get("bytes") or image.get("path")) if isinstance(image, Mapping) else bool(image)


def _located(image: Any, folder: Path) -> Any:
    """Bytes as they are; a path taken from the table's folder."""
    if isinstance(image, Mapping):
        return image["bytes"] if image.get("bytes") else _located(image["path"], folder)
    return str(folder / image) if isinstance(image, str) else image
