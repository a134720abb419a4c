"""Item and pair tables as a folder of a retrieval task: queries and corpus are items, and the pairs say what is relevant.

It is a folder in the layout that mteb loads from the Hub (configs `corpus`, `queries` and `qrels`), so it can be pushed
there and run by others. An item's texts stand in one line, `text`, which every model reads, and by field in `item`, which
NoteLLM-2 reads. mteb shows a model one picture: the first of each item.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hub.publishing.dataset import published_image
from modeling_notellm2.images_notellm2 import image_sources
from training.tables.commands.files import atomic_write, write_text
from training.tables.commands.outputs import MARK, marked
from training.tables.items import ItemTable
from training.tables.one_line import one_line


ITEM = "item"
"""Column with an item's texts as JSON, by field; models of others read the column `text`."""
SPLIT = "test"
FILES = {name: f"{name}/{SPLIT}.parquet" for name in ("corpus", "queries", "qrels")}
CARD = "README.md"
TEXT_FIELDS = ("title", "topics", "content")
MODALITIES = {"t": ("text",), "i": ("image",), "it": ("image", "text")}
CATEGORIES = tuple(f"{query}2{target}" for query in MODALITIES for target in MODALITIES)
ROWS = 500
"""Rows written at once."""


@dataclass(frozen=True)
class WrittenTask:
    """What `write_task` wrote.

    Attributes:
        corpus, queries: items on each side.
        relevant: different pairs.
        lacking: positions of the items that a pair names and that lack a modality of their side, ascending.
    """

    corpus: int
    queries: int
    relevant: int
    lacking: list[int]


def write_task(items: ItemTable, pairs: np.ndarray, folder: Path, category: str) -> WrittenTask:
    """Write the task's tables and card.

    Args:
        items: all of them are candidates, as far as they have what the corpus is made of.
        pairs: (p, 2) integer positions in `items`: query and target.
        folder: of the task.
        category: what queries and corpus are made of, e.g. "it2it", "t2t", "i2it".

    Raises:
        ValueError: when no pair is left.
    """
    sides = [_that_have(items, MODALITIES[letters]) for letters in category.split("2")]
    different = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
    complete = np.isin(different[:, 0], sides[0]) & np.isin(different[:, 1], sides[1])
    relevant = different[complete]
    if not len(relevant):
        raise ValueError(f"None of {len(pairs)} pairs has two different items with what a task of {category} shows.")
    queries = np.unique(relevant[:, 0])
    names = [MODALITIES[letters] for letters in category.split("2")]
    _write_items(items, queries, names[0], folder / FILES["queries"])
    _write_items(items, sides[1], names[1], folder / FILES["corpus"])
    ids = [[items.item_ids[row] for row in column] for column in relevant.T.tolist()]
    table = pa.table({"query-id": ids[0], "corpus-id": ids[1], "score": pa.array([1] * len(relevant), pa.int32())})
    with atomic_write(folder / FILES["qrels"]) as place:
        pq.write_table(table.cast(marked(table.schema)), place)
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {SPLIT}\n    path: {path}\n" for name, path in FILES.items()
    )
    write_text(f"---\nconfigs:\n{configs}---\n<!-- {MARK} -->\nA {category} retrieval task for mteb.\n", folder / CARD)
    lacking = [np.setdiff1d(different[:, side], sides[side]) for side in (0, 1)]
    return WrittenTask(len(sides[1]), len(queries), len(relevant), np.union1d(*lacking).tolist())


def _that_have(items: ItemTable, modalities: Sequence[str]) -> np.ndarray:
    """(m,) ascending positions of the items with all of some modalities."""
    present = items.fields_present()
    nothing = np.zeros(len(items), dtype=bool)
    has = {
        "text": np.any([present.get(field, nothing) for field in TEXT_FIELDS], axis=0),
        "image": present.get("image", nothing),
    }
    return np.flatnonzero(np.all([has[modality] for modality in modalities], axis=0))


def _write_items(items: ItemTable, positions: np.ndarray, modalities: Sequence[str], path: Path) -> None:
    columns: dict[str, Any] = {"id": datasets.Value("string")}
    if "text" in modalities:
        columns |= {"text": datasets.Value("string"), ITEM: datasets.Value("string")}
    if "image" in modalities:
        columns |= {"image": datasets.Image()}
    schema = marked(datasets.Features(columns).arrow_schema)
    rows = _rows(items, tqdm(positions.tolist(), desc=f"Writing {path.parent.name}", unit="item"), modalities)
    with atomic_write(path) as place, pq.ParquetWriter(place, schema) as writer:
        while block := list(islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(block, schema))


def _rows(items: ItemTable, positions: Any, modalities: Sequence[str]) -> Iterator[dict[str, Any]]:
    for position in positions:
        item = items[position]
        row: dict[str, Any] = {"id": item["item_id"]}
        if "text" in modalities:
            fields = {name: item[name] for name in TEXT_FIELDS if name in item}
            row |= {"text": one_line(item), ITEM: json.dumps(fields, ensure_ascii=False)}
        if "image" in modalities:
            row["image"] = published_image(image_sources(item["image"])[0])
        yield row
