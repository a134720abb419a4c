"""A second data set for the experiments: OpenMoji's own drawings with the tags that its authors gave them.

    python -m training.experiments.openmoji --output DIR [--archive openmoji-17.0.0.tgz]

From the npm package `openmoji` (CC BY-SA 4.0: name OpenMoji, openmoji.org, and share alike what you make of the drawings).
It differs from `training.experiments.emoji` in more than its style: it has hundreds of pictures that Unicode doesn't have
(brands, emergencies, parts of user interfaces, ...), and tags. Only what OpenMoji tagged is an item, skin tones aside.
Two items are related if they stand in one subgroup, from which no text is made.
"""

import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import resvg_py

from training.experiments.emoji import (
    WRITTEN,
    EmojiTables,
    Row,
    TableArguments,
    cap_country_flags,
    describe,
    split_and_pair,
    write_tables,
)
from training.tables.commands.handler import DONE, command, parse
from training.tables.commands.outputs import Output, claimed


PACKAGE = "openmoji@17.0.0"
DATA = "package/data/openmoji.json"
DRAWINGS = "package/color/svg"
SIDE = 72
"""Pixels, as Twemoji's."""


@dataclass
class OpenMojiArguments(TableArguments):
    """What to build of OpenMoji."""

    archive: str | None = field(
        default=None, metadata={"help": f"The npm package's file (.tgz); none: `npm pack {PACKAGE}` gets it."}
    )


def build_tables(arguments: OpenMojiArguments) -> EmojiTables:
    """Items with pictures and split, and the pairs of either side. The same seed gives the same tables.

    Raises:
        ValueError: when the archive can't be had or isn't OpenMoji's.
    """
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="openmoji-") as folder:
        files = read_archive(Path(arguments.archive) if arguments.archive else pack(Path(folder)))
    entries = read_entries(files[DATA])
    capped = cap_country_flags(entries, arguments.country_flags, generator)
    items, rejects = [], []
    for entry in capped:
        try:
            items.append(make_item(entry, files))
        except ValueError as error:
            rejects.append({"item_id": entry["hexcode"], "title": entry["annotation"], "reason": str(error)})
    return split_and_pair(items, rejects, len(entries) - len(capped), arguments, generator)


def pack(folder: Path) -> Path:
    """The package's file, from the registry that npm is set to.

    Raises:
        ValueError: without npm, or when npm fails.
    """
    otherwise = "Or get the package's .tgz elsewhere and name it as --archive."
    try:
        done = subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"Getting {PACKAGE} needs npm, which is not installed. {otherwise}") from error
    archives = list(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise ValueError(f"`npm pack {PACKAGE}` failed: {done.stderr.strip() or done.stdout.strip()}\n{otherwise}")
    return archives[0]


def read_archive(path: Path) -> dict[str, bytes]:
    """OpenMoji's data file and coloured drawings, by their name in the archive.

    Raises:
        ValueError: when it can't be read, or holds no data file.
    """
    try:
        with tarfile.open(path) as archive:
            wanted = (m for m in archive if m.isfile() and (m.name == DATA or m.name.startswith(f"{DRAWINGS}/")))
            opened = ((member.name, archive.extractfile(member)) for member in wanted)
            files = {name: file.read() for name, file in opened if file is not None}
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .tgz archive ({error}).") from error
    if DATA not in files:
        raise ValueError(f"{path}: there is no {DATA} in it; expected the npm package {PACKAGE}.")
    return files


def read_entries(content: bytes) -> list[Row]:
    """What OpenMoji tagged, without skin tones; `subcategory` beside its own fields, as `cap_country_flags` reads it."""
    return [
        {**entry, "subcategory": entry["subgroups"]}
        for entry in json.loads(content)
        if entry["openmoji_tags"].strip() and not entry["skintone"]
    ]


def make_item(entry: Row, files: dict[str, bytes]) -> Row:
    """One item: its annotation is the title, its tags beyond that are topics.

    Raises:
        ValueError: without a drawing, or for one that can't be drawn.
    """
    name = f"{DRAWINGS}/{entry['hexcode']}.svg"
    if name not in files:
        raise ValueError("no picture")
    title = entry["annotation"].lower()
    tags = dict.fromkeys(tag.strip().lower() for tag in entry["openmoji_tags"].split(","))
    return {
        "item_id": entry["hexcode"].lower(),
        "title": title,
        "topics": [tag for tag in tags if tag and tag != title],
        "content": None,
        "image": {"bytes": rasterise(files[name]), "path": f"{entry['hexcode']}.png"},
        "category": entry["group"],
        "subcategory": entry["subcategory"],
    }


def rasterise(svg: bytes) -> bytes:
    """A drawing as a PNG of `SIDE` pixels with a transparent background.

    Raises:
        ValueError: for what is no SVG.
    """
    return bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=SIDE, height=SIDE, skip_system_fonts=True))


@command("training.experiments.openmoji")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(OpenMojiArguments, options=options)
    with claimed([Output("--output", Path(arguments.output), WRITTEN)], ()):
        tables = build_tables(arguments)
        write_tables(tables, Path(arguments.output))
    print(f"{describe(tables)}\nTables and rejects.jsonl: {arguments.output}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
