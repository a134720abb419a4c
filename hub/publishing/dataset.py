"""Item and pair tables made into a data set of the Hub: Parquet with the pictures' bytes inside, and a card.

Each table is a config with one split, so that `training/run.py --items ORG/DATA:items --train_pairs ORG/DATA:train_pairs`
reads it by name. Columns beyond those of items and pairs (labels, splits) go along. A row that can't be used by anyone is
left out, counted in the card and listed in a rejects file.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData
from jinja2 import Environment, StrictUndefined
from tqdm.auto import tqdm

from hub.publishing.checks import Fault, RefusedError, file_faults
from hub.publishing.secrets import own_folders, secrets_in
from hub.publishing.sending import Publication
from modeling_notellm2.images_notellm2 import image_sources, load_image
from modeling_notellm2.prompts_notellm2 import ItemError
from training.tables.columns import ITEM_FIELDS
from training.tables.commands.files import atomic_write
from training.tables.commands.markdown import as_text
from training.tables.items import Item, ItemTable, load_items
from training.tables.pairs import PAIR_IDS
from training.tables.reading import Table, open_table
from training.tables.rejects import Reject, RejectedRows, Rejects
from training.tables.remote.pictures import RemotePicture
from training.tables.remote.places import RemoteFolder


CARD = Path(__file__).with_name("dataset_card.md.jinja")
ITEMS = "items"
SPLITS = {ITEMS: "train", "train_pairs": "train", "test_pairs": "test"}
"""Split of each config."""
ROWS = 500
"""Rows written at once."""
MOST_FAULTS = 20
SHARD_BYTES = 400 * 2**20
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
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
        secrets: texts that must not be published, the first `MOST_FAULTS` of them.
    """

    rows: int = 0
    rejects: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    filled: Counter[str] = field(default_factory=Counter)
    secrets: list[Fault] = field(default_factory=list)


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

    def add(self, reject: Reject) -> None:
        """One row, or a picture of it."""
        self.stream.write(json.dumps(asdict(reject), ensure_ascii=True) + "\n")


def prepare_dataset(
    items: str,
    pairs: Mapping[str, str | None],
    staging: Path,
    details: DataDetails,
    rejects: Path,
    split: str | None = None,
    encoding: str | None = None,
    pictures_anywhere: bool = False,
    allow_remote: str | None = None,
) -> Publication:
    """Writes all tables and the card.

    Args:
        items: item table.
        pairs: pair table by config; None: there is no such table.
        staging: an empty folder.
        rejects: file that lists rows left out.
        split: of the items; None: all.
        encoding, allow_remote: of the tables, as of `training.tables.reading.open_table`.
        pictures_anywhere: also pictures outside the table's folder.

    Raises:
        TableError, ValueError: for a table that can't be read, or has no usable row.
        RefusedError: when secrets or paths of this machine stand in the tables' texts or in the card.
    """
    written: dict[str, WrittenTable] = {}
    with RejectsFile(rejects) as listed:
        # Pictures are opened one by one.
        loaded = load_items(items, split, check_images=False, encoding=encoding, allow_remote=allow_remote)
        written[ITEMS], published = write_items(*loaded, staging, listed, pictures_anywhere=pictures_anywhere)
        for config, source in pairs.items():
            if source is not None:
                table = open_table(source, None, encoding, allow_remote)
                written[config] = write_pairs(table, config, staging, listed, published)
    for config, of_config in written.items():
        if not of_config.rows:
            raise ValueError(f"{config}: no usable row; {rejects} lists why.")
    (staging / "README.md").write_text(dataset_card(written, details), encoding="utf-8")
    if secrets := [fault for table in written.values() for fault in table.secrets]:
        raise RefusedError(secrets)
    files = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
    if faults := file_faults({"README.md": files["README.md"]}):
        raise RefusedError(faults)
    return Publication("dataset", files, ("data/*.parquet",))


def write_items(
    items: ItemTable,
    rejects: Rejects,
    staging: Path,
    listed: RejectsFile,
    every_column: bool = True,
    pictures_anywhere: bool = False,
) -> tuple[WrittenTable, ItemTable]:
    """Items with their pictures' bytes, and which of them these are.

    Args:
        every_column: also those that are no fields of items.
        pictures_anywhere: also pictures outside the table's folder.
    """
    written = WrittenTable()
    folders = None if pictures_anywhere else items.table.folders
    published: list[int] = []
    own = [name for name in items.table.column_names if every_column and name not in ("item_id", *ITEM_FIELDS)]

    def usable() -> Iterator[Row]:
        for start in tqdm(range(0, len(items.table), ROWS), desc="Items", unit="block"):
            stop = start + ROWS
            lost = [(reject.file, reject.row, reject) for reject in rejects.between(start, stop)]
            rows: list[Row] = []
            positions = items.between(start, stop)
            items.fetch_pictures(positions)
            for position in positions:
                file, number = items.place(position)
                item, faults = published_item(items[position], folders)
                lost += [
                    (file, number, Reject(items.table.source, number, [item["item_id"]], fault, file))
                    for fault in faults
                ]
                if item["image"] or not faults:
                    published.append(position)
                    rows.append(items.table.row(int(items.rows[position]), own) | item)
            for *_, reject in sorted(lost, key=lambda place: place[:2]):
                listed.add(reject)
            written.rejects += len(lost)
            yield from rows

    several = _several_pictures(items)
    text = datasets.Value("string")
    image = datasets.List(datasets.Image()) if several else datasets.Image()
    features = {"item_id": text, "title": text, "topics": datasets.List(text), "content": text, "image": image}
    extra = datasets.Features.from_arrow_schema(pa.schema([items.table.schema.field(name) for name in own]))
    rows = usable() if several else ({**item, "image": (item["image"] or [None])[0]} for item in usable())
    write_table(rows, datasets.Features({**features, **extra}), ITEMS, staging, written)
    return written, items.select(published)


def published_item(item: Item, folders: Sequence[Path | RemoteFolder] | None = None) -> tuple[Row, list[str]]:
    """An item as others can read it, and why pictures of it can't be published.

    The pictures are a list of `{"bytes", "path"}`, the path a bare name.

    Args:
        folders: below which picture files must lie; None: anywhere.
    """
    pictures, faults = [], []
    for source in image_sources(item.get("image")):
        try:
            _require_within(source, folders)
            pictures.append(published_image(source))
        except ItemError as error:
            faults.append(str(error))
    return {**{name: item.get(name) for name in ("item_id", *ITEM_FIELDS)}, "image": pictures}, faults


def _require_within(source: Any, folders: Sequence[Path | RemoteFolder] | None) -> None:
    if folders is None or isinstance(source, bytes):
        return
    if isinstance(source, RemotePicture):
        within = any(isinstance(folder, RemoteFolder) and folder.holds(source.address) for folder in folders)
    else:
        path = Path(source).resolve()
        within = any(isinstance(folder, Path) and path.is_relative_to(folder.resolve()) for folder in folders)
    if not within:
        raise ItemError(f"{source} lies outside the table's folder: put it there, or pass --pictures_anywhere")


def published_image(source: Any) -> Row:
    """A picture as the model sees it, written anew: nothing of its metadata (place, author, comments) goes along.

    JPEG stays JPEG, of quality 95; everything else becomes PNG, which loses nothing.

    Raises:
        ItemError: for a picture that can't be read.
    """
    image = load_image(source)
    image.info.clear()  # some of it would be written again
    encoded, name = (source, None) if isinstance(source, bytes) else (Path(source).read_bytes(), Path(source).stem)
    is_jpeg = encoded.startswith(b"\xff\xd8")
    stream = io.BytesIO()
    image.save(stream, "JPEG" if is_jpeg else "PNG", **({"quality": 95} if is_jpeg else {}))
    return {"bytes": stream.getvalue(), "path": name and f"{name}.{'jpg' if is_jpeg else 'png'}"}


def write_pairs(table: Table, config: str, staging: Path, listed: RejectsFile, published: ItemTable) -> WrittenTable:
    """Pairs whose both items are published."""
    if missing := set(PAIR_IDS) - set(table.column_names):
        raise ValueError(
            f"{table.source}: a pair table needs query_id and target_id; {', '.join(sorted(missing))} is missing."
        )
    written = WrittenTable()
    known = np.stack([published.item_ids.positions(table.column(name)) for name in PAIR_IDS], axis=1) >= 0
    unreadable, rejects = table.unreadable(PAIR_IDS)

    def usable() -> Iterator[Row]:
        for start in tqdm(range(0, len(table), ROWS), desc=config, unit="block"):
            lost = rejects.between(start, start + ROWS)
            for row in np.flatnonzero(~unreadable[start : start + ROWS]) + start:
                values = table.row(int(row), table.column_names)
                try:
                    yield published_pair(values, known[row])
                except ValueError as error:
                    only = RejectedRows(table, np.array([row]), str(error), id_columns=PAIR_IDS)
                    lost += list(only)
            for reject in sorted(lost, key=lambda reject: (reject.file, reject.row)):
                listed.add(reject)
            written.rejects += len(lost)

    write_table(usable(), pair_features(table), config, staging, written)
    return written


def published_pair(values: Row, known: np.ndarray) -> Row:
    """A pair with its score as a number; `known` is (2,) bool, whether query and target are published.

    Raises:
        ValueError: for a row that names an item that isn't published, or has a score that is not a number.
    """
    if unknown := [values[name] for name, is_known in zip(PAIR_IDS, known, strict=True) if not is_known]:
        raise ValueError(f"no published item {', '.join(repr(item_id or '') for item_id in unknown)}")
    score = {"score": None if values["score"] in (None, "") else float(values["score"])} if "score" in values else {}
    return {**values, **score}


def pair_features(table: Table) -> datasets.Features:
    """Columns of a pair table: ids as text, `score` a number, others as they are."""
    types = {name: table.schema.field(name).type for name in table.column_names}
    text = {name: pa.string() for name, kind in types.items() if kind == pa.large_string()}
    numbers = {"score": pa.float64()} if "score" in types else {}
    order = dict.fromkeys(PAIR_IDS, pa.string())
    return datasets.Features.from_arrow_schema(pa.schema({**order, **types, **text, **numbers}))


def _several_pictures(items: ItemTable) -> bool:
    """Whether any item has several pictures."""
    if "image" not in items.table.column_names:
        return False
    return any(
        (pc.max(pc.list_value_length(block["image"])).as_py() or 0) > 1 for _, block in items.table.blocks(["image"])
    )


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
                written.secrets += list(islice(_secrets_of(config, known), MOST_FAULTS - len(written.secrets)))
                writer.write_table(pa.Table.from_pylist(known, schema=schema))
                written.rows += len(block)
                written.filled.update(
                    name for row in known for name, value in row.items() if value not in (None, "", [])
                )
            finished = not block
        if finished:
            return


def _secrets_of(config: str, rows: Sequence[Row]) -> Iterator[Fault]:
    """What looks like a secret in any text of some rows."""
    here = own_folders(None)
    for row in rows:
        name = row.get("item_id") or row.get("query_id")
        for column, value in row.items():
            texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
            text, place = "\n".join(texts), f"{config}, {name!r}, column {column}"
            for what, _ in secrets_in(text):
                yield Fault(place, f"what looks like {what}", "Take it out of the table.")
            if match := here.search(text):
                yield Fault(place, f"a path of this machine, {match[0]}", "Take it out of the table.")


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
    template.filters["text"] = as_text
    return template.from_string(CARD.read_text(encoding="utf-8")).render(
        metadata=data.to_yaml(), tables=written, splits=SPLITS, details=details
    )
