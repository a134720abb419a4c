"""Nearest neighbours over an encoded catalogue: builds a FAISS index, searches it, exports vectors for other databases.

    python hub/index.py --embeddings DIR --output INDEX
    python hub/index.py update --index INDEX --embeddings DIR
    python hub/index.py search --index INDEX --id ID -k 20              (or --item ITEM.json)
    python hub/index.py export --embeddings DIR --format lancedb --output FOLDER    (--since EARLIER: what has changed)

    Index.load("INDEX").search(["some-id"], k=20)                       (or an array of vectors)

INDEX gets index.faiss, ids.arrow (`item_id`, and `title` with --items) and index.json; the first two are mapped into
memory, not read.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from hub.catalogue.catalogue import TitleArguments
from hub.neighbours.building import BuildArguments, build
from hub.neighbours.exports import FORMATS, export
from hub.neighbours.index import Index
from hub.neighbours.updating import UpdateArguments, update
from modeling_notellm2 import DTYPES
from training.tables.commands.bounds import AtLeastOne, check_bounds
from training.tables.commands.handler import DONE, OptionError, command, parse, plain_console
from training.tables.commands.options import allow_remote_option


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
        metadata={
            "help": "With --item: type of the model's weights; auto: as the index was encoded.",
            "choices": list(DTYPES),
        },
    )
    allow_remote: str | None = allow_remote_option()

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass
class ExportArguments(TitleArguments):
    """What to export, and for which database."""

    embeddings: str = field(metadata={"help": "Folder that hub/encode.py wrote."})
    output: str = field(metadata={"help": "Folder to write. An earlier export there is replaced."})
    format: str = field(metadata={"help": "The database that shall load it.", "choices": list(FORMATS)})
    since: str | None = field(
        default=None,
        metadata={"help": "An earlier export: only what a database that has loaded it must insert and delete."},
    )


def search(arguments: SearchArguments) -> Table:
    """The neighbours of an item as a table to print."""
    if (arguments.id is None) == (arguments.item is None):
        raise OptionError("Pass either --id or --item.")
    index = Index.load(arguments.index)
    if arguments.id is not None:
        queries: np.ndarray | list[str] = [arguments.id]
    else:
        from hub.neighbours.queries import encode_item  # with torch, which a search by id does without

        queries = encode_item(
            Path(arguments.item or ""), index, arguments.model, arguments.dtype, arguments.allow_remote
        )
    name = arguments.id or arguments.item
    table = Table(title=Text(f"Nearest to {name} of {len(index):,} items"), title_justify="left")
    for column in ("#", "score", "item_id", "title"):
        table.add_column(column, justify="right" if column in ("#", "score") else "left", overflow="fold")
    for number, near in enumerate(index.search(queries, arguments.k)[0], 1):
        table.add_row(str(number), f"{near.score:.4f}", printable(near.item_id), printable(near.title or ""))
    return table


def printable(text: str) -> Text:
    """A catalogue's text as it is, but for characters that would steer the terminal."""
    return Text("".join(character if character.isprintable() else " " for character in text))


def write(arguments: BuildArguments | UpdateArguments | ExportArguments) -> None:
    """Build, update or export, and say what was written."""
    if isinstance(arguments, ExportArguments):
        counts = export(
            arguments.embeddings,
            arguments.format,
            arguments.output,
            arguments.items,
            arguments.split,
            arguments.encoding,
            arguments.since,
            arguments.allow_remote,
        )
        deleted = f", {counts.deleted:,} to delete" if arguments.since else ""
        print(f"{arguments.output}: {counts.written:,} items for {arguments.format}{deleted}")
        return
    if isinstance(arguments, UpdateArguments):
        settings, place = update(arguments), arguments.index
        changes = f", {settings['added']:,} added, {settings['dropped']:,} dropped"
    else:
        settings, place, changes = build(arguments), arguments.output, ""
    print(f"{place}: {settings['items']:,} items, {settings['kind']}, {settings['width']} dimensions{changes}")


@command("hub/index.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    given = sys.argv[1:] if options is None else list(options)
    arguments_of = {
        "build": BuildArguments,
        "update": UpdateArguments,
        "search": SearchArguments,
        "export": ExportArguments,
    }
    verb = given.pop(0) if given and given[0] in arguments_of else "build"
    (arguments,) = parse(arguments_of[verb], options=given, prog=f"hub/index.py {verb}")
    if verb == "search":
        plain_console().print(search(arguments))
        return DONE
    write(arguments)
    return DONE


__all__ = [
    "BuildArguments",
    "ExportArguments",
    "Index",
    "SearchArguments",
    "UpdateArguments",
    "build",
    "main",
    "search",
    "update",
]

if __name__ == "__main__":
    sys.exit(main())
