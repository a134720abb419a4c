"""A page of pictures for people who would rather look than read: items, their nearest neighbours, and why.

    python hub/gallery.py --model PATH --items ITEMS.parquet --output FILE.html [--queries N | --query_ids ID ID] [-k 8]

Below each query stand its neighbours by picture and text together, by the picture alone, by the text alone, and by the
visual embedding of a model with mICL. With --label_column neighbours of the query's category are marked, with --pairs its
true partners. Rows of ITEMS that can't be used are listed in FILE.rejects.jsonl.
"""

import training.tables.own_folder  # noqa: F401  # isort: skip

import dataclasses
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from hub.catalogue.encoder import ItemEncoder, Reject
from hub.catalogue.item_tables import ItemTable, TableRow, open_items
from hub.pages.gallery import View, nearest, write_gallery
from modeling_notellm2 import DTYPES, choose_precision
from modeling_notellm2.rows_notellm2 import BadRow, item_from_row, read_csv_rows, read_json_rows, row_id
from training.tables.bounds import AtLeastOne, check_bounds
from training.tables.commands import DONE, DONE_WITH_REJECTS, command, parse
from training.tables.files import write_text
from training.tables.model_folder import loading


ROWS_PER_BLOCK = 256
TEXT_FIELDS = ("title", "topics", "content")
BOTH, IMAGE, TEXT, VISUAL = "Picture and text", "Picture alone", "Text alone", "Visual embedding"
NOTES = {
    BOTH: ("what the model finds", ""),
    IMAGE: ("all texts left out", "This item has no picture."),
    TEXT: ("all pictures left out", "This item has no text."),
    VISUAL: ("of the pictures, read out before the text", "This item has no picture."),
}


@dataclass
class GalleryArguments:
    """What to ask, among which items."""

    model: str = field(metadata={"help": "Folder or Hub id of a NoteLLM-2 model with its processor."})
    items: str = field(
        metadata={"help": "Item table: Parquet file or folder of them, .jsonl, .csv, image folder, or Hub dataset."}
    )
    output: str = field(metadata={"help": "HTML file to write; an earlier one is replaced."})
    queries: AtLeastOne = field(
        default=12, metadata={"help": "Items drawn to ask with; with --pairs those that have a partner."}
    )
    query_ids: list[str] | None = field(default=None, metadata={"help": "Ids of the items to ask with instead."})
    neighbours: AtLeastOne = field(default=8, metadata={"help": "Neighbours in each row.", "aliases": ["-k"]})
    label_column: str | None = field(
        default=None, metadata={"help": "Column of a .parquet, .jsonl or .csv table; equal labels are marked."}
    )
    pairs: str | None = field(
        default=None, metadata={"help": "Pair table (.parquet, .jsonl, .csv); true partners are marked."}
    )
    title: str = field(default="Nearest neighbours", metadata={"help": "Of the page."})
    batch_size: AtLeastOne = field(default=32, metadata={"help": "Items in a batch."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where the model runs."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the weights; auto: bfloat16 where the machine has it.", "choices": list(DTYPES)},
    )
    seed: int = field(default=0, metadata={"help": "Of the draw of queries."})

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class Catalogue:
    """The usable items of a table and their embeddings.

    Attributes:
        item_ids: n ids, in order of the table.
        rows: position of each in the table.
        views: ways of embedding them.
        rejects: rows left out.
    """

    item_ids: list[str]
    rows: list[int]
    views: list[View]
    rejects: list[Reject]


def embed_catalogue(table: ItemTable, encoder: ItemEncoder) -> Catalogue:
    """Every item whole, without its texts, and without its pictures.

    Raises:
        ValueError: when no row can be used.
    """
    ids: list[str] = []
    rows: list[int] = []
    rejects: list[Reject] = []
    blocks: dict[str, list[tuple[list[str], np.ndarray]]] = defaultdict(list)
    with tqdm(total=len(table), desc="Embedding", unit="row") as bar:
        for start in range(0, len(table), ROWS_PER_BLOCK):
            block = list(table.read(start, min(start + ROWS_PER_BLOCK, len(table))))
            whole = encoder.embed(encoder.prepare(0, block))
            position_of = {_id(row): position for position, row in _positions(table, block) if not row.repeated}
            ids += whole.item_ids
            rows += [position_of[item_id] for item_id in whole.item_ids]
            rejects += whole.rejects
            blocks[BOTH].append((whole.item_ids, whole.embeddings))
            if whole.visual_embeddings is not None:
                seen = [item_id for item_id, has in zip(whole.item_ids, whole.has_image, strict=True) if has]
                blocks[VISUAL].append((seen, whole.visual_embeddings[whole.has_image]))
            usable = set(whole.item_ids)
            for name, left_out in ((IMAGE, TEXT_FIELDS), (TEXT, ("image",))):
                # What has nothing left is rejected here, and then is no item of this view.
                part = encoder.embed(encoder.prepare(0, _without(block, left_out, usable)))
                blocks[name].append((part.item_ids, part.embeddings))
            bar.update(min(ROWS_PER_BLOCK, len(table) - start))
    if not ids:
        raise ValueError(f"{table.source}: no row can be used; the first: {rejects[0].reason}.")
    views = [_view(name, ids, blocks[name]) for name in (BOTH, IMAGE, TEXT, VISUAL) if name in blocks]
    return Catalogue(ids, rows, [view for view in views if view.usable.any()], rejects)


def choose_queries(
    catalogue: Catalogue, arguments: GalleryArguments, partners: Mapping[int, set[int]] | None
) -> list[int]:
    """Positions of the items to ask with.

    Raises:
        ValueError: for an id that is not among the usable items, naming the reason if its row was left out.
    """
    if arguments.query_ids:
        position_of = {item_id: position for position, item_id in enumerate(catalogue.item_ids)}
        reasons = {reject.place.item_id: reject.reason for reject in catalogue.rejects}
        for item_id in arguments.query_ids:
            if item_id not in position_of:
                raise ValueError(f"No usable item {item_id!r}: {reasons.get(item_id, 'the table has no such id')}.")
        return [position_of[item_id] for item_id in arguments.query_ids]
    pool = sorted(partners) if partners else range(len(catalogue.item_ids))
    return random.Random(arguments.seed).sample(pool, min(arguments.queries, len(pool)))


def read_labels(source: str, column: str) -> dict[str, str]:
    """The label of each item that has one, by its id.

    Raises:
        ValueError: for a table of another kind or without the column.
    """
    labels = {row_id(row.get("item_id")): row_id(row.get(column)) for row in _read_columns(source, ["item_id", column])}
    return {item_id: label for item_id, label in labels.items() if label}


def read_partners(source: str, item_ids: list[str]) -> dict[int, set[int]]:
    """True partners of each item, both ways; pairs of other items are passed over.

    Raises:
        ValueError: for a table of another kind, or when no pair is between these items.
    """
    position_of = {item_id: position for position, item_id in enumerate(item_ids)}
    partners: dict[int, set[int]] = defaultdict(set)
    for row in _read_columns(source, ["query_id", "target_id"]):
        query, target = (position_of.get(row_id(row.get(name))) for name in ("query_id", "target_id"))
        if query is not None and target is not None and query != target:
            partners[query].add(target)
            partners[target].add(query)
    if not partners:
        raise ValueError(f"{source}: no pair is between two usable items. Does it belong to the item table?")
    return dict(partners)


def gallery(arguments: GalleryArguments) -> Catalogue:
    """Embeds, searches and writes the page and the list of rows left out.

    Raises:
        ValueError: for tables, ids or numbers that can't be used.
        OSError: for a model or file that can't be read.
    """
    labels = read_labels(arguments.items, arguments.label_column) if arguments.label_column else None
    table = open_items(arguments.items)
    with loading(arguments.model):
        config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=True)
    precision = choose_precision(arguments.dtype, arguments.device)
    print(f"Precision: {precision}")
    encoder = ItemEncoder(
        arguments.model, precision.name, arguments.device, arguments.batch_size, visual=bool(config.micl)
    )
    catalogue = embed_catalogue(table, encoder)
    partners = read_partners(arguments.pairs, catalogue.item_ids) if arguments.pairs else None
    queries = choose_queries(catalogue, arguments, partners)
    output = Path(arguments.output)
    write_gallery(
        output,
        catalogue.item_ids,
        lambda position: _load(table, catalogue.rows[position]),
        catalogue.views,
        queries,
        arguments.neighbours,
        title=arguments.title,
        description=f"{len(queries)} of {len(catalogue.item_ids):,} items with the items that the model finds most "
        "similar, and what it finds when it sees their pictures or their texts alone. Numbers are cosine similarities.",
        labels=None if labels is None else [labels.get(item_id) for item_id in catalogue.item_ids],
        label_name=arguments.label_column or "",
        partners=partners,
        footer=[
            f"Model {arguments.model}, items {arguments.items}.",
            f"{len(catalogue.rejects):,} rows of the table could not be used.",
        ],
    )
    lines = [json.dumps({**dataclasses.asdict(reject.place), "reason": reject.reason}) for reject in catalogue.rejects]
    write_text("".join(f"{line}\n" for line in lines), output.with_suffix(".rejects.jsonl"))
    return catalogue


@command("hub/gallery.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(GalleryArguments, options=options)
    catalogue = gallery(arguments)
    size = Path(arguments.output).stat().st_size / 1e6
    print(f"{arguments.output}: {size:.1f} MB, open it in a browser. {len(catalogue.item_ids):,} items compared.")
    if catalogue.rejects:
        print(f"{len(catalogue.rejects):,} rows left out: {Path(arguments.output).with_suffix('.rejects.jsonl')}")
        return DONE_WITH_REJECTS
    return DONE


def _positions(table: ItemTable, block: list[TableRow]) -> Iterable[tuple[int, TableRow]]:
    """Rows with their positions in the whole table."""
    start_of = {part.name: start for part, start in zip(table.parts, table.starts, strict=False)}
    return ((start_of[row.file] + row.number, row) for row in block)


def _id(row: TableRow) -> str:
    return "" if isinstance(row.raw, BadRow) else row_id(row.raw.get("item_id"))


def _without(block: list[TableRow], fields: Iterable[str], usable: set[str]) -> Iterable[TableRow]:
    """The usable rows of a block, without some fields."""
    for row in block:
        if isinstance(row.raw, dict) and not row.repeated and _id(row) in usable:
            yield dataclasses.replace(row, raw={key: value for key, value in row.raw.items() if key not in fields})


def _view(name: str, ids: list[str], blocks: list[tuple[list[str], np.ndarray]]) -> View:
    position_of = {item_id: position for position, item_id in enumerate(ids)}
    embeddings = np.concatenate([of_block for _, of_block in blocks])
    positions = [position_of[item_id] for of_block, _ in blocks for item_id in of_block]
    everywhere = np.zeros((len(ids), embeddings.shape[1]), dtype=np.float32)
    everywhere[positions] = embeddings
    usable = np.zeros(len(ids), dtype=bool)
    usable[positions] = True
    note, absent = NOTES[name]
    return View(name, note, absent, everywhere, usable)


def _load(table: ItemTable, position: int) -> dict[str, Any]:
    row = next(iter(table.read(position, position + 1)))
    assert isinstance(row.raw, dict)
    return item_from_row(row.raw, row.folder)


def _read_columns(source: str, columns: list[str]) -> Iterable[Mapping[str, Any]]:
    """Rows of a single file with some of its columns; bad rows are passed over, as their items are rejected anyway."""
    path = Path(source)
    readers = {".jsonl": read_json_rows, ".csv": read_csv_rows}
    suffix = path.suffix.lower()
    if suffix == ".parquet" and path.is_file():
        missing = set(columns) - set(pq.read_schema(path).names)
        rows: Iterable[Any] = [] if missing else pq.read_table(path, columns=columns).to_pylist()
    elif suffix in readers and path.is_file():
        rows = [row for row in readers[suffix](path) if isinstance(row, dict)]
        missing = {column for column in columns if not any(column in row for row in rows)}
    else:
        raise ValueError(
            f"{source}: {', '.join(columns)} are read from a .parquet, .jsonl or .csv file; there is none."
        )
    if missing:
        raise ValueError(f"{source}: no column {', '.join(sorted(missing))}.")
    return rows


__all__ = ["Catalogue", "GalleryArguments", "View", "embed_catalogue", "gallery", "nearest", "write_gallery"]

if __name__ == "__main__":
    sys.exit(main())
