"""The tables of a run, read and checked. Pairs are positions of items from here on."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from training.tables.items import ItemTable, load_items
from training.tables.pairs import PairTable, load_pairs, trained_share
from training.tables.rejects import Rejects
from training.trainer.arguments import DataArguments


@dataclass(frozen=True)
class RunData:
    """All items, those to evaluate on, and the pairs of both, with every rejected row."""

    items: ItemTable
    train: PairTable
    eval_items: ItemTable
    eval_positions: np.ndarray
    eval_pairs: np.ndarray
    """(n, 2) int32 positions in `eval_items`."""
    labels: list[Any] | None
    rejects: Rejects
    trained_share: float = 0.0
    """Of the pairs to evaluate on: how many are train pairs."""


def load_data(arguments: DataArguments, num_workers: int) -> RunData:
    """Read and check the tables that the arguments name."""
    items, rejects = load_items(
        arguments.items,
        arguments.split,
        arguments.check_images,
        num_workers,
        arguments.encoding,
        arguments.allow_remote,
    )
    train, rejected = load_pairs(
        arguments.train_pairs,
        items,
        distinct_column=arguments.distinct_column,
        weight_column=arguments.weight_column,
        encoding=arguments.encoding,
    )
    rejects += rejected
    positions = np.arange(len(items))
    if arguments.eval_split is not None:
        positions = items.where("split", arguments.eval_split)
    eval_items = items.select(positions)
    pairs = np.empty((0, 2), dtype=np.int32)
    share = 0.0
    if arguments.eval_pairs is not None:
        table, rejected = load_pairs(arguments.eval_pairs, eval_items, encoding=arguments.encoding)
        rejects += rejected
        share = trained_share(positions[table.pairs], train.pairs)
        pairs = table.pairs
    labels = eval_items.column(arguments.label_column) if arguments.label_column else None
    return RunData(items, train, eval_items, positions, pairs, labels, rejects, share)
