"""From tables and a model to a gallery: what `hub/gallery.py` does, with its options."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig

from hub.catalogue.encoder import ItemEncoder
from hub.pages.gallery import write_gallery
from hub.pages.gallery_items import EmbeddedItems, choose_queries, embed_catalogue, read_partners
from modeling_notellm2 import choose_precision
from training.tables.commands.bounds import AtLeastOne, Seed, check_bounds
from training.tables.commands.files import atomic_writes, write_text
from training.tables.commands.model_folder import loading
from training.tables.commands.options import (
    allow_remote_option,
    device_option,
    dtype_option,
    encoding_option,
    split_option,
)
from training.tables.commands.outputs import Output, claimed
from training.tables.items import load_items


@dataclass
class GalleryArguments:
    """What to ask, among which items."""

    model: str = field(metadata={"help": "Folder or Hub id of a NoteLLM-2 model with its processor."})
    items: str = field(
        metadata={"help": "Item table: Parquet file or folder of them, .jsonl, .csv, image folder, or Hub dataset."}
    )
    output: str = field(metadata={"help": "HTML file to write; an earlier one is replaced."})
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    allow_remote: str | None = allow_remote_option()
    queries: AtLeastOne = field(
        default=12, metadata={"help": "Items drawn to ask with; with --pairs those that have a partner."}
    )
    query_ids: list[str] | None = field(default=None, metadata={"help": "Ids of the items to ask with instead."})
    neighbours: AtLeastOne = field(default=8, metadata={"help": "Neighbours in each row.", "aliases": ["-k"]})
    label_column: str | None = field(default=None, metadata={"help": "Column of the items; equal labels are marked."})
    pairs: str | None = field(default=None, metadata={"help": "Pair table; true partners are marked."})
    title: str = field(default="Nearest neighbours", metadata={"help": "Of the page."})
    batch_size: AtLeastOne = field(default=32, metadata={"help": "Items in a batch."})
    device: str = device_option()
    dtype: str = dtype_option()
    seed: Seed = field(default=0, metadata={"help": "Of the draw of queries."})

    def __post_init__(self) -> None:
        check_bounds(self)


def gallery(arguments: GalleryArguments) -> EmbeddedItems:
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


def make_gallery(arguments: GalleryArguments, page: Path, rejects: Path) -> EmbeddedItems:
    """What `gallery` does, at the places where its files are written."""
    # The encoder opens the pictures.
    items, left_out = load_items(
        arguments.items, arguments.split, False, encoding=arguments.encoding, allow_remote=arguments.allow_remote
    )
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
    queries = choose_queries(catalogue, arguments.query_ids, arguments.queries, arguments.seed, partners)
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
