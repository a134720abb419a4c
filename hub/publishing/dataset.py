"""Item and pair tables made into a data set of the Hub: Parquet with the pictures' bytes inside, and a card.

Each table is a config with one split, so that `training/run.py --items ORG/DATA:items --train_pairs ORG/DATA:train_pairs`
reads it by name. Columns beyond those of items and pairs (labels, splits) go along. A row that can't be used by anyone is
left out, counted in the card and listed in a rejects file.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData
from jinja2 import Environment, StrictUndefined
from tqdm.auto import tqdm

from hub.catalogue.item_tables import ItemTable, TableRow, open_items
from hub.publishing.checks import RefusedError, file_faults
from hub.publishing.sending import Publication
from modeling_notellm2.images_notellm2 import image_sources, load_image
from modeling_notellm2.prompts_notellm2 import ItemError
from modeling_notellm2.rows_notellm2 import (
    ITEM_FIELDS,
    BadRow,
    item_from_row,
    read_csv_rows,
    read_json_rows,
    row_id,
)
from training.tables.files import atomic_write


CARD = Path(__file__).with_name("dataset_card.md.jinja")
ITEMS = "items"
SPLITS = {ITEMS: "train", "train_pairs": "train", "test_pairs": "test"}
"""Split of each config."""
ROWS = 500
"""Rows written at once."""
SHARD_BYTES = 400 * 2**20
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
PAIR_IDS = ("query_id", "target_id")
ITEM_COLUMNS = {"item_id", *ITEM_FIELDS, "file_name", "image_file_name"}
Row = dict[str, Any]


@dataclass(frozen=True)
class DataDetails:
    """What only the data's owner knows.

    Attributes:
        repo: ORG/NAME.
        license: as the Hub names it.
        languages: ISO 639 codes.
        made_by: how the data were made.
    """

    repo: str
    license: str | None = None
    languages: Sequence[str] | None = None
    made_by: str | None = None


@dataclass
class WrittenTable:
    """A config as it was written.

    Attributes:
        columns: Arrow type by name.
        filled: rows in which each column has a value.
    """

    rows: int = 0
    rejects: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    filled: Counter[str] = field(default_factory=Counter)


class RejectsFile:
    """Rows that are left out, one JSON line each; the file has its name when all of them are in it."""

    def __init__(self, path: Path):
        self.path, self.stack = path, ExitStack()

    def __enter__(self) -> "RejectsFile":
        place = self.stack.enter_context(atomic_write(self.path))
        self.stream = self.stack.enter_context(place.open("w", encoding="utf-8"))
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stack.close()  # also after an error, which the rows explain

    def add(self, table: str, row: int, ids: list[str], reason: str) -> None:
        """One row, numbered from 0."""
        line = {"table": table, "row": row, "ids": ids, "reason": reason}
        self.stream.write(json.dumps(line, ensure_ascii=True) + "\n")


def prepare_dataset(
    items: str, pairs: Mapping[str, str | None], staging: Path, details: DataDetails, rejects: Path
) -> Publication:
    """Writes all tables and the card.

    Args:
        items: a table as hub/encode.py reads it.
        pairs: .parquet, .jsonl or .csv file with query_id and target_id by config; None: there is no such table.
        staging: an empty folder.
        rejects: file that lists rows left out.

    Raises:
        TableError, ValueError: for a table that can't be read, or has no usable row.
        RefusedError: when secrets or paths of this machine stand in the card.
    """
    written: dict[str, WrittenTable] = {}
    with RejectsFile(rejects) as listed:
        item_ids: set[str] = set()
        written[ITEMS] = write_items(open_items(items, every_column=True), staging, listed, item_ids)
        for config, source in pairs.items():
            if source is not None:
                written[config] = write_pairs(source, config, staging, listed, item_ids)
    for config, table in written.items():
        if not table.rows:
            raise ValueError(f"{config}: no usable row; {rejects} lists why.")
    (staging / "README.md").write_text(dataset_card(written, details), encoding="utf-8")
    files = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
    if faults := file_faults({"README.md": files["README.md"]}):
        raise RefusedError(faults)
    return Publication("dataset", files, ("data/*.parquet",))


def write_items(table: ItemTable, staging: Path, listed: RejectsFile, item_ids: set[str]) -> WrittenTable:
    """Items with their pictures' bytes. Ids that are written are added to `item_ids`."""
    written = WrittenTable()

    def usable() -> Iterator[Row]:
        for row in tqdm(table.read(0, len(table)), desc="Items", total=len(table), unit="item"):
            try:
                item = published_item(row)
            except ValueError as error:
                ids = [] if isinstance(row.raw, BadRow) else [row_id(row.raw.get("item_id"))]
                listed.add(row.file, row.number, ids, str(error))
                written.rejects += 1
            else:
                item_ids.add(item["item_id"])
                yield item

    several, extra = look_through(table)
    text = datasets.Value("string")
    image = datasets.List(datasets.Image()) if several else datasets.Image()
    own = {"item_id": text, "title": text, "topics": datasets.List(text), "content": text, "image": image}
    rows = usable() if several else ({**item, "image": (item["image"] or [None])[0]} for item in usable())
    write_table(rows, datasets.Features({**own, **extra}), ITEMS, staging, written)
    return written


def published_item(row: TableRow) -> Row:
    """A row as others can read it: pictures as a list of `{"bytes", "path"}`, the path a bare name.

    Raises:
        ValueError: for a row that is no usable item.
    """
    if isinstance(row.raw, BadRow):
        raise ItemError(row.raw.reason)
    try:
        item = item_from_row(row.raw, row.folder)
    except (ValueError, TypeError) as error:
        raise ItemError(f"unreadable topics: {error}") from error
    if not item["item_id"]:
        raise ItemError("item_id is missing")
    if row.repeated:
        raise ItemError("item_id stands in an earlier row")
    if len(item) == 1:
        raise ItemError("neither text nor image")
    try:
        json.dumps(item, ensure_ascii=False, default=lambda _: None).encode()
    except UnicodeEncodeError as error:
        raise ItemError(f"a text is not valid Unicode ({error.reason})") from error
    pictures = [published_image(source) for source in image_sources(item.get("image"))]
    others = {name: value for name, value in row.raw.items() if name not in ITEM_FIELDS}
    return {**others, **{name: item.get(name) for name in ("item_id", *ITEM_FIELDS)}, "image": pictures}


def published_image(source: Any) -> Row:
    """The file's own bytes, after it was opened once.

    Raises:
        ItemError: for a picture that can't be read.
    """
    load_image(source)
    if isinstance(source, bytes):
        return {"bytes": source, "path": None}
    path = Path(source)
    return {"bytes": path.read_bytes(), "path": path.name}


def write_pairs(source: str, config: str, staging: Path, listed: RejectsFile, item_ids: set[str]) -> WrittenTable:
    """Pairs whose both items are published."""
    written = WrittenTable()

    def usable() -> Iterator[Row]:
        for number, raw in enumerate(tqdm(read_pairs(source), desc=config, unit="pair")):
            if raw is None:
                continue
            try:
                yield published_pair(raw, item_ids)
            except ValueError as error:
                ids = [] if isinstance(raw, BadRow) else [row_id(raw.get(name)) for name in PAIR_IDS]
                listed.add(source, number, ids, str(error))
                written.rejects += 1

    write_table(usable(), pair_features(source), config, staging, written)
    return written


def published_pair(raw: Row | BadRow, item_ids: set[str]) -> Row:
    """A pair with its ids as text and its score as a number.

    Raises:
        ValueError: for a row that can't be read, names an item that isn't published, or has a score that is no number.
    """
    if isinstance(raw, BadRow):
        raise ValueError(raw.reason)
    ids = {name: row_id(raw.get(name)) for name in PAIR_IDS}
    if unknown := [one for one in ids.values() if one not in item_ids]:
        raise ValueError(f"no published item {', '.join(map(repr, unknown))}")
    score = {"score": None if raw["score"] in (None, "") else float(raw["score"])} if "score" in raw else {}
    return {**raw, **ids, **score}


def read_pairs(source: str) -> Iterator[Row | BadRow | None]:
    """Rows of a pair table; None for an empty line.

    Raises:
        ValueError: for a file of another type, or none.
    """
    path = Path(source)
    readers = {".jsonl": read_json_rows, ".csv": read_csv_rows}
    if not path.is_file() or path.suffix.lower() not in (".parquet", *readers):
        raise ValueError(f"{source}: a pair table is a .parquet, .jsonl or .csv file.")
    if path.suffix.lower() != ".parquet":
        return readers[path.suffix.lower()](path)
    return (row for batch in pq.ParquetFile(path).iter_batches(10_000) for row in batch.to_pylist())


def pair_features(source: str) -> datasets.Features:
    """Columns of a pair table: ids as text, `score` a number, others as they are.

    Raises:
        ValueError: when an id column is missing.
    """
    if source.lower().endswith(".parquet"):
        schema = pq.read_schema(source).remove_metadata()
        others = {name: schema.field(name).type for name in schema.names}
    else:
        names = {name: None for row in read_pairs(source) if isinstance(row, dict) for name in row}
        others = dict.fromkeys(names, pa.string())
    if missing := set(PAIR_IDS) - set(others):
        raise ValueError(
            f"{source}: a pair table needs query_id and target_id; {', '.join(sorted(missing))} is missing."
        )
    numbers = {"score": pa.float64()} if "score" in others else {}
    text = dict.fromkeys(PAIR_IDS, pa.string())
    return datasets.Features.from_arrow_schema(pa.schema({**text, **others, **text, **numbers}))


def look_through(table: ItemTable) -> tuple[bool, datasets.Features]:
    """Whether any item has several pictures, and the columns that are no field of an item.

    Raises:
        ValueError: for a column whose values have no common type.
    """
    several, samples = False, {}
    for row in tqdm(table.read(0, len(table)), desc="Looking through the items", total=len(table), unit="item"):
        for name, value in row.raw.items() if isinstance(row.raw, dict) else ():
            if name == "image":
                several |= isinstance(value, list) and len(value) > 1
            elif name not in ITEM_COLUMNS:
                samples.setdefault(name, {}).setdefault(type(value), value)
    fields = {}
    for name, of_type in samples.items():
        try:
            fields[name] = pa.infer_type(list(of_type.values()))
        except pa.ArrowException as error:
            raise ValueError(f"{table.source}: the values of column {name} have no common type ({error}).") from error
    return several, datasets.Features.from_arrow_schema(pa.schema(fields))


def write_table(
    rows: Iterable[Row], features: datasets.Features, config: str, staging: Path, written: WrittenTable
) -> None:
    """Parquet files `data/CONFIG-NNNNN.parquet`, a new one after some 400 MB."""
    schema = features.arrow_schema
    written.columns = {name: str(schema.field(name).type) for name in schema.names}
    (staging / "data").mkdir(parents=True, exist_ok=True)
    rows = iter(rows)
    for shard in range(100_000):
        path = staging / "data" / f"{config}-{shard:05d}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            while path.stat().st_size < SHARD_BYTES and (block := list(islice(rows, ROWS))):
                known = [{name: row.get(name) for name in schema.names} for row in block]
                writer.write_table(pa.Table.from_pylist(known, schema=schema))
                written.rows += len(block)
                written.filled.update(
                    name for row in known for name, value in row.items() if value not in (None, "", [])
                )
            finished = not block
        if finished:
            return


def dataset_card(written: Mapping[str, WrittenTable], details: DataDetails) -> str:
    """README.md: what the configs hold, how to use them, how they were made."""
    largest = max(table.rows for table in written.values())
    data = DatasetCardData(
        language=list(details.languages) if details.languages else None,
        license=details.license,
        pretty_name=details.repo.split("/")[-1],
        size_categories=[next((name for top, name in SIZES.items() if largest < top), "n>10M")],
        tags=["notellm2", "item-to-item", "recommendation", "multimodal"],
        configs=[
            {"config_name": config, "data_files": [{"split": SPLITS[config], "path": f"data/{config}-*.parquet"}]}
            | ({"default": True} if config == ITEMS else {})
            for config in written
        ],
    )
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return template.from_string(CARD.read_text(encoding="utf-8")).render(
        metadata=data.to_yaml(), tables=written, splits=SPLITS, details=details
    )
