"""Item and pair tables: from a file, folder or Hub id to checked rows, with every row left out listed and counted.

A bad row never stops a job and never vanishes: it becomes a `Reject` with its table, row, ids and reason, and
`write_rejects` puts them into one JSON lines file.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from tqdm.auto import tqdm

from modeling_notellm2.rows_notellm2 import ITEM_FIELDS, BadRow, item_from_row, read_csv_rows, read_json_rows, row_id


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
        return item_from_row(self.table[self.rows[position]], self.folder)

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
        item_id = row_id(raw["item_id"])
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
        ids = [row_id(raw["query_id"]), row_id(raw["target_id"])]
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
        return _read_rows(path, read_json_rows(path))
    if suffix == ".csv":
        return _read_rows(path, read_csv_rows(path))
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


def _fault(raw: Mapping[str, Any], item_id: str, folder: Path) -> str | None:
    """Why a row can't be used, or None. Images are decoded here: later, one bad file would stop the whole job."""
    if not item_id:
        return "item_id is empty"
    try:
        item = item_from_row(raw, folder)
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


def _read_rows(path: Path, rows: Iterable[dict[str, Any] | BadRow | None]) -> LoadedTable:
    """Row by row, because one broken row would otherwise refuse the whole file."""
    usable: list[dict[str, Any]] = []
    numbers: list[int] = []
    rejects: list[Reject] = []
    for number, row in enumerate(rows):
        if isinstance(row, BadRow):
            rejects.append(Reject(str(path), number, [], row.reason))
        elif row is not None:
            usable.append(row)
            numbers.append(number)
    if not usable:
        raise TableError(f"{path}: no usable row" + (f"; the first: {rejects[0].reason}." if rejects else "."))
    columns = dict.fromkeys(key for row in usable for key in row)
    content = {column: [row.get(column) for row in usable] for column in columns}
    return LoadedTable(datasets.Dataset.from_dict(content), numbers, rejects)
