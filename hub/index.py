"""Nearest neighbours over an encoded catalogue: builds a FAISS index, searches it, exports vectors for other databases.

    python hub/index.py --embeddings DIR --output INDEX
    python hub/index.py search --index INDEX --id ID -k 20              (or --item ITEM.json)
    python hub/index.py export --embeddings DIR --format lancedb --output FOLDER

    Index.load("INDEX").search(["some-id"], k=20)                       (or an array of vectors)

INDEX gets index.faiss, ids.arrow (`item_id`, and `title` with --items) and index.json; the first two are mapped into
memory, not read.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from rich.table import Table
from rich.text import Text

from hub.catalogue.catalogue import EMBEDDING, VISUAL_EMBEDDING, Catalogue, new_folder
from hub.catalogue.encoder import ItemEncoder, Place
from hub.catalogue.exports import FORMATS, export
from hub.catalogue.index import IDS_FILE, INDEX_FILE, RECORD, Index, choose_parameters, hashes_of, make_index, sample
from hub.encode import describe_model, find_model, model_changes
from modeling_notellm2 import DTYPES, choose_precision
from training.tables.columns import item_of
from training.tables.commands.bounds import AtLeastOne, check_bounds
from training.tables.commands.files import write_json
from training.tables.commands.handler import DONE, OptionError, command, parse, plain_console
from training.tables.commands.outputs import Output, claimed
from training.tables.items import load_items
from training.tables.texts import CellError


@dataclass
class BuildArguments:
    """What to index, and how."""

    embeddings: str = field(metadata={"help": "Folder that hub/encode.py wrote."})
    output: str = field(metadata={"help": "Folder to write. An earlier index there is replaced."})
    kind: str = field(
        default="flat",
        metadata={
            "help": "flat: exact. hnsw: a graph, approximate, fast, larger than flat. ivf_pq: clusters and codes, "
            "approximate, 8 times smaller than flat.",
            "choices": ["flat", "hnsw", "ivf_pq"],
        },
    )
    visual: bool = field(default=False, metadata={"help": "Index the visual embeddings, of items with an image."})
    items: str | None = field(default=None, metadata={"help": "The item table that was encoded, for titles."})
    split: str | None = field(default=None, metadata={"help": "Its split, as it was encoded."})
    encoding: str | None = field(default=None, metadata={"help": "Its encoding, as it was encoded."})


@dataclass
class SearchArguments:
    """What to look for."""

    index: str = field(metadata={"help": "Folder of an index."})
    id: str | None = field(default=None, metadata={"help": "An item of the index; it is left out of its own result."})
    item: str | None = field(
        default=None, metadata={"help": "JSON file of an item; its image path starts at the file's folder."}
    )
    k: AtLeastOne = field(default=20, metadata={"help": "Number of neighbours.", "aliases": ["-k"]})
    model: str | None = field(
        default=None, metadata={"help": "With --item: where the model is now; none: where it was when encoding."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "With --item: type of the model's weights; auto: as the machine.", "choices": list(DTYPES)},
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass
class ExportArguments:
    """What to export, and for which database."""

    embeddings: str = field(metadata={"help": "Folder that hub/encode.py wrote."})
    output: str = field(metadata={"help": "Folder to write. An earlier export there is replaced."})
    format: str = field(metadata={"help": "The database that shall load it.", "choices": list(FORMATS)})
    items: str | None = field(default=None, metadata={"help": "The item table that was encoded, for titles."})
    split: str | None = field(default=None, metadata={"help": "Its split, as it was encoded."})
    encoding: str | None = field(default=None, metadata={"help": "Its encoding, as it was encoded."})


def build(arguments: BuildArguments) -> dict[str, Any]:
    """Build an index; returns what index.json holds.

    Raises:
        ValueError: for embeddings or an item table that can't be relied on, too few items for the kind, or an output that
            can't be written to.
    """
    with claimed([Output("--output", Path(arguments.output))], (arguments.embeddings, arguments.items)):
        return build_from(Catalogue.open(arguments.embeddings), arguments)


def build_from(catalogue: Catalogue, arguments: BuildArguments) -> dict[str, Any]:
    """What `build` does, of an encoded catalogue."""
    table = None
    if arguments.items:
        table, _ = load_items(arguments.items, arguments.split, check_images=False, encoding=arguments.encoding)
    column = VISUAL_EMBEDDING if arguments.visual else EMBEDDING
    count = len(catalogue)
    if arguments.visual:
        count = sum(len(batch.item_ids) for batch in catalogue.batches(column))
    parameters = choose_parameters(arguments.kind, count, catalogue.width)
    with new_folder(Path(arguments.output), RECORD) as folder:
        index = make_index(arguments.kind, catalogue.width, parameters)
        if not index.is_trained:
            index.train(sample(catalogue, column, count, parameters["training_items"]))
        schema = pa.schema({"item_id": pa.string()} | ({"title": pa.string()} if table else {}))
        with pa.OSFile(str(folder / IDS_FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as ids:
            for batch in catalogue.batches(column, table):
                index.add(batch.vectors)
                ids.write_batch(pa.record_batch(batch.metadata(), schema))
        if arguments.kind == "ivf_pq":
            index.make_direct_map()  # so that an id can be searched
        faiss.write_index(index, str(folder / INDEX_FILE))
        settings = {
            "kind": arguments.kind,
            "metric": "inner_product",
            "width": catalogue.width,
            "items": index.ntotal,
            "embedding": column,
            "parameters": parameters,
            "model": catalogue.manifest["job"]["model"],
            "hashes": hashes_of(folder),
            "faiss": faiss.__version__,
        }
        write_json(settings, folder / RECORD)
    return settings


def encode_item(path: Path, index: Index, model: str | None, dtype: str = "auto") -> np.ndarray:
    """Vector `(1, d)` of an item in a JSON file, by the model that encoded the index.

    Raises:
        ValueError: for a file that holds no item, an item that can't be encoded, or another model.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: an item is a JSON object, this is a {type(raw).__name__}.")
    known = index.settings["model"]
    folder = find_model(model or known["source"], None if model else known["revision"])
    if changed := model_changes(known["files"], describe_model(folder)):
        raise ValueError(f"{folder} is not the model of this index: {', '.join(changed)} differs.")
    visual = index.settings["embedding"] == VISUAL_EMBEDDING
    encoder = ItemEncoder(str(folder), choose_precision(dtype).name, visual=visual)
    try:
        item = item_of(raw, path.parent)
    except CellError as error:
        raise ValueError(f"{path}: {error}.") from error
    block = encoder.embed(encoder.prepare(0, [(Place(item["item_id"] or path.stem, path.name, 0), item)]))
    if not block.item_ids:
        raise ValueError(f"{path}: {block.rejects[0].reason}.")
    if visual and not block.has_image[0]:
        raise ValueError(f"{path}: this index holds visual embeddings and the item has no image.")
    chosen = block.visual_embeddings if visual else block.embeddings
    assert chosen is not None
    return chosen


def search(arguments: SearchArguments) -> Table:
    """The neighbours of an item as a table to print."""
    if (arguments.id is None) == (arguments.item is None):
        raise OptionError("Pass either --id or --item.")
    index = Index.load(arguments.index)
    if arguments.id is not None:
        queries: np.ndarray | list[str] = [arguments.id]
    else:
        queries = encode_item(Path(arguments.item or ""), index, arguments.model, arguments.dtype)
    name = arguments.id or arguments.item
    table = Table(title=Text(f"Nearest to {name} of {len(index.ids):,} items"), title_justify="left")
    for column in ("#", "score", "item_id", "title"):
        table.add_column(column, justify="right" if column in ("#", "score") else "left", overflow="fold")
    for number, near in enumerate(index.search(queries, arguments.k)[0], 1):
        table.add_row(str(number), f"{near.score:.4f}", printable(near.item_id), printable(near.title or ""))
    return table


def printable(text: str) -> Text:
    """A catalogue's text as it is, but for characters that would steer the terminal."""
    return Text("".join(character if character.isprintable() else " " for character in text))


def write(arguments: BuildArguments | ExportArguments) -> None:
    """Build or export, and say what was written."""
    if isinstance(arguments, ExportArguments):
        count = export(
            arguments.embeddings,
            arguments.format,
            arguments.output,
            arguments.items,
            arguments.split,
            arguments.encoding,
        )
        print(f"{arguments.output}: {count:,} items for {arguments.format}")
    else:
        settings = build(arguments)
        print(f"{arguments.output}: {settings['items']:,} items, {settings['kind']}, {settings['width']} dimensions")


@command("hub/index.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    given = sys.argv[1:] if options is None else list(options)
    arguments_of = {"build": BuildArguments, "search": SearchArguments, "export": ExportArguments}
    verb = given.pop(0) if given and given[0] in ("search", "export") else "build"
    (arguments,) = parse(arguments_of[verb], options=given, prog=f"hub/index.py {verb}")
    if verb == "search":
        plain_console().print(search(arguments))
        return DONE
    write(arguments)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
