"""A page of pictures for people who would rather look than read: items, their nearest neighbours, and why.

    python hub/gallery.py --model PATH --items ITEMS.parquet --output FILE.html [--queries N | --query_ids ID ID] [-k 8]

Below each query stand its neighbours by picture and text together, by the picture alone, by the text alone, and by the
visual embedding of a model with mICL. With --label_column neighbours of the query's category are marked, with --pairs its
true partners. Rows of ITEMS that can't be used are listed in FILE.rejects.jsonl.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from hub.catalogue.encoder import ItemEncoder, Place, items_between
from hub.pages.gallery import GalleryView, nearest, write_gallery
from modeling_notellm2 import DTYPES, choose_precision
from training.tables.commands.bounds import AtLeastOne, check_bounds
from training.tables.commands.files import atomic_writes, write_text
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS, command, parse
from training.tables.commands.model_folder import loading
from training.tables.commands.outputs import Output, claimed
from training.tables.items import Item, ItemTable, load_items
from training.tables.pairs import pair_positions
from training.tables.rejects import Reject


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
    split: str | None = field(default=None, metadata={"help": "Split of a data set or folder; none: all."})
    encoding: str | None = field(
        default=None,
        metadata={"help": "Of CSV and JSON lines tables, e.g. gbk or latin-1; none: UTF-8, or as their mark says."},
    )
    queries: AtLeastOne = field(
        default=12, metadata={"help": "Items drawn to ask with; with --pairs those that have a partner."}
    )
    query_ids: list[str] | None = field(default=None, metadata={"help": "Ids of the items to ask with instead."})
    neighbours: AtLeastOne = field(default=8, metadata={"help": "Neighbours in each row.", "aliases": ["-k"]})
    label_column: str | None = field(default=None, metadata={"help": "Column of the items; equal labels are marked."})
    pairs: str | None = field(default=None, metadata={"help": "Pair table; true partners are marked."})
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
        positions: of each among the table's items.
        views: ways of embedding them.
        rejects: rows left out.
    """

    item_ids: list[str]
    positions: list[int]
    views: list[GalleryView]
    rejects: list[Reject]


def embed_catalogue(items: ItemTable, encoder: ItemEncoder) -> Catalogue:
    """Every item whole, without its texts, and without its pictures.

    Raises:
        ValueError: when no item can be used.
    """
    ids: list[str] = []
    rejects: list[Reject] = []
    blocks: dict[str, list[tuple[list[str], np.ndarray]]] = defaultdict(list)
    rows = len(items.table)
    with tqdm(total=rows, desc="Embedding", unit="row") as bar:
        for start in range(0, rows, ROWS_PER_BLOCK):
            block = list(items_between(items, start, min(start + ROWS_PER_BLOCK, rows)))
            whole = encoder.embed(encoder.prepare(0, block))
            ids += whole.item_ids
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
            bar.update(min(ROWS_PER_BLOCK, rows - start))
    if not ids:
        raise ValueError(f"{items.table.source}: no row can be used; the first: {rejects[0].reason}.")
    views = [_view(name, ids, blocks[name]) for name in (BOTH, IMAGE, TEXT, VISUAL) if name in blocks]
    positions = items.item_ids.positions(pa.array(ids, pa.string())).tolist()
    return Catalogue(ids, positions, [view for view in views if view.usable.any()], rejects)


def choose_queries(
    catalogue: Catalogue, arguments: GalleryArguments, partners: Mapping[int, set[int]] | None
) -> list[int]:
    """Positions of the items to ask with.

    Raises:
        ValueError: for an id that is not among the usable items, naming the reason if its row was left out.
    """
    if arguments.query_ids:
        position_of = {item_id: position for position, item_id in enumerate(catalogue.item_ids)}
        reasons = {"".join(reject.ids): reject.reason for reject in catalogue.rejects}
        for item_id in arguments.query_ids:
            if item_id not in position_of:
                raise ValueError(f"No usable item {item_id!r}: {reasons.get(item_id, 'the table has no such id')}.")
        return [position_of[item_id] for item_id in arguments.query_ids]
    pool = sorted(partners) if partners else range(len(catalogue.item_ids))
    return random.Random(arguments.seed).sample(pool, min(arguments.queries, len(pool)))


def read_partners(source: str, items: ItemTable, encoding: str | None = None) -> dict[int, set[int]]:
    """True partners of each item by position, both ways; pairs of other items are passed over.

    Raises:
        TableError: when the table can't be read or lacks query_id or target_id.
        ValueError: when no pair is between these items.
    """
    pairs = pair_positions(source, items, encoding)
    partners: dict[int, set[int]] = defaultdict(set)
    for query, target in pairs[(pairs >= 0).all(1) & (pairs[:, 0] != pairs[:, 1])].tolist():
        partners[query].add(target)
        partners[target].add(query)
    if not partners:
        raise ValueError(f"{source}: no pair is between two usable items. Does it belong to the item table?")
    return dict(partners)


def gallery(arguments: GalleryArguments) -> Catalogue:
    """Embeds, searches and writes the page and the list of rows left out.

    Raises:
        ValueError: for tables, ids or numbers that can't be used, or outputs that can't be written to.
        OSError: for a model or file that can't be read.
    """
    output = Path(arguments.output)
    places = [Output("--output", output), Output("--output", output.with_suffix(".rejects.jsonl"))]
    with (
        claimed(places, (arguments.model, arguments.items, arguments.pairs)),
        atomic_writes(*(place.path for place in places)) as (page, rejects),
    ):
        return make_gallery(arguments, page, rejects)


def make_gallery(arguments: GalleryArguments, page: Path, rejects: Path) -> Catalogue:
    """What `gallery` does, at the places where its files are written."""
    # The encoder opens the pictures.
    items, left_out = load_items(arguments.items, arguments.split, check_images=False, encoding=arguments.encoding)
    if arguments.label_column:
        items.table.require([arguments.label_column])
    with loading(arguments.model):
        config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=True)
    precision = choose_precision(arguments.dtype, arguments.device)
    print(f"Precision: {precision}")
    encoder = ItemEncoder(
        arguments.model, precision.name, arguments.device, arguments.batch_size, visual=bool(config.micl)
    )
    catalogue = embed_catalogue(items, encoder)
    catalogue.rejects[:0] = left_out
    items = items.select(catalogue.positions)
    labels = items.column(arguments.label_column) if arguments.label_column else None
    partners = read_partners(arguments.pairs, items, arguments.encoding) if arguments.pairs else None
    queries = choose_queries(catalogue, arguments, partners)
    write_gallery(
        page,
        catalogue.item_ids,
        lambda position: items[position],
        catalogue.views,
        queries,
        arguments.neighbours,
        title=arguments.title,
        description=f"{len(queries)} of {len(catalogue.item_ids):,} items with the items that the model finds most "
        "similar, and what it finds when it sees their pictures or their texts alone. Numbers are cosine similarities.",
        labels=labels,
        label_name=arguments.label_column or "",
        partners=partners,
        footer=[
            f"Model {arguments.model}, items {arguments.items}.",
            f"{len(catalogue.rejects):,} rows of the table could not be used.",
        ],
    )
    lines = [
        {"item_id": "".join(reject.ids), "file": reject.file, "row": reject.row, "reason": reject.reason}
        for reject in sorted(catalogue.rejects, key=lambda reject: (reject.file, reject.row))
    ]
    write_text("".join(f"{json.dumps(line)}\n" for line in lines), rejects)
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


def _without(block: list[tuple[Place, Item]], fields: Iterable[str], usable: set[str]) -> Iterator[tuple[Place, Item]]:
    """The usable items of a block, without some fields."""
    for place, item in block:
        if place.item_id in usable:
            yield place, {name: value for name, value in item.items() if name not in fields}


def _view(name: str, ids: list[str], blocks: list[tuple[list[str], np.ndarray]]) -> GalleryView:
    position_of = {item_id: position for position, item_id in enumerate(ids)}
    embeddings = np.concatenate([of_block for _, of_block in blocks])
    positions = [position_of[item_id] for of_block, _ in blocks for item_id in of_block]
    everywhere = np.zeros((len(ids), embeddings.shape[1]), dtype=np.float32)
    everywhere[positions] = embeddings
    usable = np.zeros(len(ids), dtype=bool)
    usable[positions] = True
    note, absent = NOTES[name]
    return GalleryView(name, note, absent, everywhere, usable)


__all__ = ["Catalogue", "GalleryArguments", "GalleryView", "embed_catalogue", "gallery", "nearest", "write_gallery"]

if __name__ == "__main__":
    sys.exit(main())
