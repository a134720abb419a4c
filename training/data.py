"""Item and pair tables: from a file, folder or Hub id to checked rows, with every row left out listed and counted.

A bad row never stops a job and never vanishes: it becomes a `Reject` with its table, row, ids and reason, and
`write_rejects` puts them into one JSON lines file.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from tqdm.auto import tqdm


ITEM_FIELDS = ("title", "topics", "content", "image")
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


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
    """Rows as `datasets` holds them, the number of each in its source, and those that could not be read."""

    rows: datasets.Dataset
    numbers: Sequence[int]
    rejects: list[Reject]


class ItemTable:
    """Items by position or by id. Images stay encoded until the processor opens them.

    Args:
        table: any rows with `item_id` and some of title, topics, content, image.
        item_ids: of the usable rows, all different.
        rows: positions of the usable rows in `table`, in order.
        folder: where relative image paths start.
    """

    def __init__(self, table: datasets.Dataset, item_ids: list[str], rows: list[int], folder: Path):
        self.table, self.item_ids, self.rows, self.folder = table, item_ids, rows, folder
        self.position_of = {item_id: position for position, item_id in enumerate(item_ids)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The item as the processor takes it: `item_id` and the fields it has."""
        return read_item(self.table[self.rows[position]], self.folder)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[position] for position in range(len(self)))

    def column(self, name: str) -> list[Any]:
        """A further column (a category, a split), in the order of the items.

        Raises:
            TableError: when the table has no such column.
        """
        if name not in self.table.column_names:
            raise TableError(f"The item table has no column '{name}'; it has {', '.join(self.table.column_names)}.")
        return self.table.select_columns(name).select(self.rows)[name][:]

    def select(self, positions: Sequence[int]) -> "ItemTable":
        """The items at `positions`, as a table of their own."""
        ids = [self.item_ids[position] for position in positions]
        return ItemTable(self.table, ids, [self.rows[position] for position in positions], self.folder)


@dataclass(frozen=True)
class PairTable:
    """Pairs as positions in an item table; `groups` holds the `distinct_column` of each pair, if asked for."""

    pairs: list[tuple[int, int]]
    groups: list[str] | None = None


def load_items(source: str, split: str = "train") -> tuple[ItemTable, list[Reject]]:
    """Read an item table and check every row, images included.

    Args:
        source: a .parquet, .jsonl or .csv file, a folder (an image folder with metadata, Parquet files, or one that
            `save_to_disk` wrote), or a dataset id of the Hub.
        split: which split of a folder or Hub dataset.

    Raises:
        TableError: when there is no `item_id` column, no item field, or no usable row.
    """
    loaded = load_table(source, split)
    table, rejects = loaded.rows, list(loaded.rejects)
    columns = set(table.column_names)
    if "item_id" not in columns or not columns & set(ITEM_FIELDS):
        raise TableError(
            f"{source}: an item table needs 'item_id' and at least one of {', '.join(ITEM_FIELDS)}; "
            f"it has {', '.join(table.column_names)}."
        )
    if "image" in columns and isinstance(table.features["image"], datasets.Image):
        table = table.cast_column("image", datasets.Image(decode=False))
    folder = Path(source) if Path(source).is_dir() else Path(source).parent

    ids: dict[str, int] = {}
    for row, raw in enumerate(tqdm(table, desc=f"Checking {Path(source).name}", unit="item")):
        item_id = _identifier(raw["item_id"])
        reason = "item_id occurs twice" if item_id in ids else _fault(raw, item_id, folder)
        if reason is None:
            ids[item_id] = row
        else:
            rejects.append(Reject(source, loaded.numbers[row], [item_id], reason))
    if not ids:
        raise TableError(f"{source}: none of {len(table)} rows is usable; the first: {rejects[0].reason}.")
    return ItemTable(table, list(ids), list(ids.values()), folder), rejects


def load_pairs(
    source: str, items: ItemTable, split: str = "train", distinct_column: str | None = None
) -> tuple[PairTable, list[Reject]]:
    """Read a pair table; pairs whose members are not in `items`, or are one item, are rejected.

    Raises:
        TableError: when a column is missing or no pair is usable.
    """
    loaded = load_table(source, split)
    table, rejects = loaded.rows, list(loaded.rejects)
    wanted = ["query_id", "target_id", *([distinct_column] if distinct_column else [])]
    missing = [column for column in wanted if column not in table.column_names]
    if missing:
        raise TableError(f"{source}: no column {', '.join(missing)}; it has {', '.join(table.column_names)}.")

    pairs, groups = [], []
    for number, raw in zip(loaded.numbers, table.select_columns(wanted), strict=True):
        ids = [_identifier(raw["query_id"]), _identifier(raw["target_id"])]
        unknown = [item_id for item_id in ids if item_id not in items.position_of]
        if unknown:
            rejects.append(Reject(source, number, ids, f"not among the usable items: {', '.join(unknown)}"))
        elif ids[0] == ids[1]:
            rejects.append(Reject(source, number, ids, "query and target are one item"))
        else:
            pairs.append((items.position_of[ids[0]], items.position_of[ids[1]]))
            groups.append(str(raw[distinct_column]) if distinct_column else "")
    if not pairs:
        raise TableError(
            f"{source}: none of {len(table)} pairs is usable"
            + (f"; the first: {rejects[0].reason}. Does it belong to the item table?" if rejects else ".")
        )
    return PairTable(pairs, groups if distinct_column else None), rejects


def load_table(source: str, split: str = "train") -> LoadedTable:
    """Rows of a file, a folder or a Hub dataset, with the rows that could not be read.

    Raises:
        TableError: when `source` looks like a file and is none, or is a file of another type.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".parquet", ".csv") and not path.is_file():
        raise TableError(f"{source}: no such table.")
    if suffix == ".jsonl":
        return _read_json_lines(path)
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".parquet":
        table = datasets.load_dataset("parquet", data_files=source, split="train")
    elif path.is_file():
        raise TableError(f"{source}: a table is a .parquet, .jsonl or .csv file, a folder, or a Hub dataset id.")
    elif (path / "state.json").exists():
        table = datasets.load_from_disk(source)
    else:
        table = datasets.load_dataset(source, split=split)
    return LoadedTable(table, range(len(table)), [])


def write_rejects(rejects: Iterable[Reject], path: Path) -> None:
    """One JSON line for each reject; an empty file says that there was none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects))
    os.replace(beside, path)


def read_item(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A table row as an item: empty fields left out, ids as text, topics as a list, image paths from `folder`."""
    item: dict[str, Any] = {"item_id": _identifier(raw["item_id"])}
    for field in ("title", "content"):
        if raw.get(field):
            item[field] = str(raw[field])
    topics = raw.get("topics")
    if isinstance(topics, str):  # CSV has no lists
        topics = json.loads(topics) if topics.lstrip().startswith("[") else topics.replace("，", ",").split(",")
    topics = [str(topic).strip() for topic in topics or [] if str(topic).strip()]
    if topics:
        item["topics"] = topics
    image = raw.get("image")
    images = [_located(one, folder) for one in (image if isinstance(image, list) else [image]) if _is_there(one)]
    if images:
        item["image"] = images if isinstance(image, list) else images[0]
    return item


def _is_there(image: Any) -> bool:
    return bool(image.get("bytes") or image.get("path")) if isinstance(image, Mapping) else bool(image)


def _located(image: Any, folder: Path) -> Any:
    """Bytes as they are; a path taken from the table's folder."""
    if isinstance(image, Mapping):
        return image["bytes"] if image.get("bytes") else _located(image["path"], folder)
    return str(folder / image) if isinstance(image, str) else image


def _fault(raw: Mapping[str, Any], item_id: str, folder: Path) -> str | None:
    """Why a row can't be used, or None. Images are decoded here: later, one bad file would stop the whole job."""
    if not item_id:
        return "item_id is empty"
    try:
        item = read_item(raw, folder)
    except (ValueError, TypeError) as error:
        return f"unreadable topics: {error}"
    if len(item) == 1:
        return f"none of {', '.join(ITEM_FIELDS)} is filled"
    images = item.get("image", [])
    for image in images if isinstance(images, list) else [images]:
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                opened.draft("RGB", (64, 64))  # JPEG at low resolution: cheap, and still reads the whole file
                opened.load()
        except IMAGE_ERRORS as error:
            return f"unreadable image: {error}"
    return None


def _identifier(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _read_rows(path: Path, rows: Iterable[tuple[int, Callable[[], dict[str, Any]]]]) -> LoadedTable:
    """Row by row, because one broken row would otherwise refuse the whole file."""
    usable: list[dict[str, Any]] = []
    numbers: list[int] = []
    rejects: list[Reject] = []
    for number, read in rows:
        try:
            usable.append(read())
            numbers.append(number)
        except ValueError as error:
            rejects.append(Reject(str(path), number, [], str(error)))
    if not usable:
        raise TableError(f"{path}: no usable row" + (f"; the first: {rejects[0].reason}." if rejects else "."))
    columns = dict.fromkeys(key for row in usable for key in row)
    content = {column: [row.get(column) for row in usable] for column in columns}
    return LoadedTable(datasets.Dataset.from_dict(content), numbers, rejects)


def _read_json_lines(path: Path) -> LoadedTable:
    lines = enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return _read_rows(path, ((number, partial(_json_row, line)) for number, line in lines if line.strip()))


def _read_csv(path: Path) -> LoadedTable:
    """Every field as text: an id of digits stays what it is."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        reader = csv.reader(stream)
        header = next(reader, [])
        return _read_rows(path, ((number, partial(_csv_row, header, row)) for number, row in enumerate(reader)))


def _csv_row(header: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(header):
        raise ValueError(f"{len(row)} fields, but the header has {len(header)}")
    return dict(zip(header, row, strict=True))


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
