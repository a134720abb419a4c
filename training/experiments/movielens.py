"""A real log: MovieLens-100K as item table, interaction log and mined pairs with a time split.

    python -m training.experiments.movielens --output DIR

The package `recbole` carries its 100,000 ratings of 1,682 films by 943 people (September 1997 to April 1998), with titles,
years and genres. A rating, high or low, is an interaction. People rated most of their films within an hour, in the order
in which the site showed them, so the pairs are symmetric. Beside the tables stand what popularity and co-occurrence reach
on the test pairs, which a model that reads the texts is measured against.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from training.experiments.log_baselines import log_embeddings, measure_embeddings
from training.experiments.tables import write_rows
from training.mine import show
from training.mining.cooccurrence import MiningArguments
from training.mining.mining import Mined, mine
from training.tables.commands.files import write_json
from training.tables.commands.handler import DONE, command, parse, plain_console
from training.tables.commands.outputs import GENERATOR, Output, claimed


ITEM_FEATURES = datasets.Features(
    {
        "item_id": datasets.Value("string"),
        "title": datasets.Value("string"),
        "topics": datasets.List(datasets.Value("string")),
        "content": datasets.Value("string"),
    }
)
LOG_FEATURES = datasets.Features(
    {"user_id": datasets.Value("string"), "item_id": datasets.Value("string"), "timestamp": datasets.Value("int64")}
)
WRITTEN = (
    *("items.parquet", "log.parquet", "train_pairs.parquet", "train_pairs.rejects.jsonl"),
    *("test_pairs.parquet", "baselines.json"),
)
UNKNOWN = ("unknown", "unkonwn")
"""The file's words for a missing title, year or genre."""

Row = dict[str, Any]


@dataclass
class MovieLensArguments:
    """Where to, and which pairs."""

    output: str = field(metadata={"help": "Folder for the tables; those of an earlier run are replaced."})
    test_share: float = field(default=0.2, metadata={"help": "Share of the ratings, the latest, that is test."})
    min_users: int = field(default=3, metadata={"help": "Pairs of fewer people are dropped."})
    popularity_cap: float = field(
        default=0.2, metadata={"help": "Films that more than this share of the people rated form no pairs."}
    )
    top_targets: int = field(default=10, metadata={"help": "Targets of each film."})

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ValueError(f"--test_share is {self.test_share}; it must lie between 0 and 1.")


def read_items() -> list[Row]:
    """Films: title, genres as topics, year as content. The one film without title, year and genre stays, empty."""
    items = []
    for item_id, title, year, genres in _read_fields("ml-100k.item"):
        items.append(
            {
                "item_id": item_id,
                "title": None if title in UNKNOWN else title,
                "topics": [genre for genre in genres.split() if genre not in UNKNOWN],
                "content": None if year in UNKNOWN else year,
            }
        )
    return items


def read_log() -> list[Row]:
    """The ratings as interactions, in order of time; at one time in that of the file."""
    log = [
        {"user_id": user, "item_id": item, "timestamp": int(float(time))}
        for user, item, _, time in _read_fields("ml-100k.inter")
    ]
    return sorted(log, key=lambda row: row["timestamp"])


def prepare(arguments: MovieLensArguments) -> tuple[Mined, MiningArguments, dict[str, dict[str, float]]]:
    """Write every table and the baselines' metrics.

    Returns:
        The counts of mining, its options, and the baselines' metrics by name.

    Raises:
        MiningError: when no pair is left.
    """
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    items, log = read_items(), read_log()
    write_rows(items, ITEM_FEATURES, folder / "items.parquet")
    write_rows(log, LOG_FEATURES, folder / "log.parquet")
    split_time = log[round((1 - arguments.test_share) * len(log))]["timestamp"]
    mining = MiningArguments(
        interactions=str(folder / "log.parquet"),
        output=str(folder / "train_pairs.parquet"),
        test_output=str(folder / "test_pairs.parquet"),
        split_time=str(split_time),
        symmetric=True,
        min_users=arguments.min_users,
        popularity_cap=arguments.popularity_cap,
        top_targets=arguments.top_targets,
    )
    mined = mine(mining)
    train = [(row["user_id"], row["item_id"]) for row in log if row["timestamp"] < split_time]
    ids = [item["item_id"] for item in items]
    table = pq.read_table(folder / "test_pairs.parquet", columns=["query_id", "target_id"])
    pairs = list(zip(*table.to_pydict().values(), strict=True))
    metrics = measure_embeddings(log_embeddings(train, ids), ids, pairs)
    write_json(GENERATOR | metrics, folder / "baselines.json")
    return mined, mining, metrics


def show_baselines(metrics: dict[str, dict[str, float]], console: Console) -> None:
    """A line for each."""
    counts = metrics["random"]
    table = Table(title=f"{counts['queries']} queries among {counts['candidates']} candidates")
    shown = [name for name in counts if name.startswith("recall@")]
    for column in ("known from the train side", *shown):
        table.add_column(column, justify="left" if column not in shown else "right")
    for name, values in metrics.items():
        table.add_row(name, *(f"{values[column]:.3f}" for column in shown))
    console.print(table)


@command("training.experiments.movielens")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(MovieLensArguments, options=options)
    with claimed([Output("--output", Path(arguments.output), WRITTEN)], ()):
        mined, mining, metrics = prepare(arguments)
    show(mined, mining)
    show_baselines(metrics, plain_console())
    print(f"Tables and baselines.json: {arguments.output}")
    return DONE


def _read_fields(name: str) -> list[list[str]]:
    """The lines of one of the package's tab-separated files, without its header."""
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "MovieLens-100K comes with the package recbole: pip install --no-deps recbole", name="recbole"
        )
    path = Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k" / name
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]


if __name__ == "__main__":
    sys.exit(main())
