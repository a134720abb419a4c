"""Pair tables as positions in an item table: what training, evaluation and mining of negatives read.

In memory are two positions of 4 bytes for each pair.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from training.tables.items import ItemTable, load_items
from training.tables.reading import Table, open_table
from training.tables.rejects import RejectedRows, Rejects, TableError


logger = logging.get_logger(__name__)
PAIR_IDS = ("query_id", "target_id")


@dataclass(frozen=True)
class PairTable:
    """Pairs as positions in an item table.

    Attributes:
        pairs: (n, 2) int32, query and target.
        groups: (n,) int32 code of each pair's `distinct_column`, if asked for; -1 where it is empty.
        negatives: (n, k) int32 hard negatives of each pair, if the table has columns negative_1 .. negative_k.
        weights: (n,) float32 of each pair's `weight_column`, if asked for; not negative.
    """

    pairs: np.ndarray
    groups: np.ndarray | None = None
    negatives: np.ndarray | None = None
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def members(self) -> np.ndarray:
        """(n, 2 + k) int32: query, target, hard negatives."""
        return self.pairs if self.negatives is None else np.concatenate([self.pairs, self.negatives], axis=1)


@dataclass(frozen=True)
class MatchedPairs:
    """A pair table held against an item table: `pairs` (m, 2) int32, its `rows` (m,) int64, and what was left out."""

    table: Table
    rows: np.ndarray
    pairs: np.ndarray
    rejects: Rejects

    def at(self, chosen: np.ndarray) -> "MatchedPairs":
        """Some of the pairs, by (m,) bool."""
        return replace(self, rows=self.rows[chosen], pairs=self.pairs[chosen])


def pair_positions(source: str, items: ItemTable, encoding: str | None = None) -> np.ndarray:
    """(rows, 2) int32 positions of each row's query and target among `items`; -1 for another item, and for no row.

    Raises:
        TableError: when there is no such table or a column is missing.
    """
    return _positions(open_table(source, None, encoding, items.table.allow_remote), items)


def _positions(table: Table, items: ItemTable) -> np.ndarray:
    table.require(PAIR_IDS)
    positions = np.stack([items.item_ids.positions(table.column(name)) for name in PAIR_IDS], axis=1)
    positions[table.unreadable(PAIR_IDS)[0]] = -1
    return positions


def match_pairs(source: str, items: ItemTable, split: str | None = None, encoding: str | None = None) -> MatchedPairs:
    """Find the members of each pair; pairs whose members are not in `items`, or are one item, are rejected.

    Args:
        source, split, encoding: as of `training.tables.reading.open_table`. What may be fetched of `items` may be of pairs.

    Raises:
        TableError: when a column is missing or no pair is usable.
    """
    table = open_table(source, split, encoding, items.table.allow_remote)
    pairs = _positions(table, items)
    unreadable, rejects = table.unreadable(PAIR_IDS)
    known = pairs >= 0
    reasons = {
        "not among the usable items: query and target": ~known.any(1),
        "not among the usable items: query": ~known[:, 0] & known[:, 1],
        "not among the usable items: target": known[:, 0] & ~known[:, 1],
        "query and target are one item": known.all(1) & (pairs[:, 0] == pairs[:, 1]),
    }
    for reason, wrong in reasons.items():
        rejects += Rejects(RejectedRows(table, np.flatnonzero(wrong & ~unreadable), reason, id_columns=PAIR_IDS))
    usable = known.all(1) & (pairs[:, 0] != pairs[:, 1])
    if not usable.any():
        first = rejects.first()
        raise TableError(
            f"{source}: none of {len(table)} pairs is usable"
            + (f"; the first: {first.reason}. Does it belong to the item table?" if first else ".")
        )
    return MatchedPairs(table, np.flatnonzero(usable), pairs[usable], rejects)


def load_pairs(
    source: str,
    items: ItemTable,
    split: str | None = None,
    distinct_column: str | None = None,
    seed: int = 0,
    encoding: str | None = None,
    weight_column: str | None = None,
) -> tuple[PairTable, Rejects]:
    """Read a pair table, with the hard negatives of its columns negative_1 .. negative_k where it has them.

    A hard negative that is empty or not among the items gives its place to an item drawn from the table's pairs, so
    that all batches have one shape.

    Args:
        source, split, encoding: as of `training.tables.reading.open_table`.
        distinct_column: becomes `PairTable.groups`.
        seed: of the negatives that are drawn.
        weight_column: becomes `PairTable.weights`; a pair without a number of at least 0 there is rejected.

    Raises:
        TableError: when a column is missing or no pair is usable.
    """
    matched = match_pairs(source, items, split, encoding)
    groups = negatives = weights = None
    if weight_column is not None:
        matched, weights = _weighted(matched, weight_column)
    table, rows = matched.table, matched.rows
    if distinct_column is not None:
        table.require([distinct_column])
        values = table.texts(distinct_column).take(pa.array(rows)).combine_chunks()
        groups = pc.fill_null(values.dictionary_encode().indices, -1).to_numpy()
    names = [
        name for number in range(1, len(table.column_names)) if (name := f"negative_{number}") in table.column_names
    ]
    if names:
        negatives = np.stack([items.item_ids.positions(table.column(name))[rows] for name in names], axis=1)
        empty = negatives < 0
        drawn = np.random.default_rng(seed).integers(matched.pairs.size, size=int(empty.sum()))
        negatives[empty] = matched.pairs.reshape(-1)[drawn]
    return PairTable(matched.pairs, groups, negatives, weights), matched.rejects


def _weighted(matched: MatchedPairs, column: str) -> tuple[MatchedPairs, np.ndarray]:
    """The pairs that have a weight, and the weights, (n,) float32.

    Raises:
        TableError: when there is no such column, or none has one above 0.
    """
    table = matched.table
    table.require([column])
    texts = table.texts(column).take(pa.array(matched.rows)).to_pandas()
    weights = pd.to_numeric(texts, errors="coerce").to_numpy(np.float32)
    usable = np.isfinite(weights) & (weights >= 0)
    if not weights[usable].any():
        raise TableError(f"{table.source}: no pair has a weight above 0 in '{column}'; nothing would be trained.")
    reason = f"no weight in '{column}': a number of at least 0 is wanted"
    rejects = matched.rejects
    rejects += Rejects(RejectedRows(table, matched.rows[~usable], reason, id_columns=PAIR_IDS))
    return replace(matched.at(usable), rejects=rejects), weights[usable]


def trained_share(pairs: np.ndarray, train_pairs: np.ndarray) -> float:
    """Share of some pairs that are train pairs, in either direction; says so where there is any.

    Args:
        pairs, train_pairs: (n, 2) and (m, 2) integer positions in one item table; a pair with -1 is none.
    """
    shared = np.isin(_unordered(pairs), _unordered(train_pairs[(train_pairs >= 0).all(1)]))
    if not shared.any():
        return 0.0
    logger.warning(
        f"{shared.mean():.1%} of the pairs to measure on ({shared.sum():,} of {len(pairs):,}) are train pairs: what is "
        "measured on them is memory. Take pairs that training does not see."
    )
    return float(shared.mean())


def _unordered(pairs: np.ndarray) -> np.ndarray:
    """(n,) int64: one number for a pair and its reverse."""
    low, high = np.sort(pairs.astype(np.int64), axis=1).T
    return low << 32 | high


def load_evaluation(
    items: str,
    pairs: str,
    split: str | None = None,
    eval_split: str | None = None,
    encoding: str | None = None,
    num_workers: int = 0,
    allow_remote: str | None = None,
) -> tuple[ItemTable, PairTable, Rejects]:
    """Read what a model is measured on: items, pairs of them, and the rows of both that are left out.

    Args:
        items, pairs, split, encoding, num_workers, allow_remote: as of `load_items` and `load_pairs`.
        eval_split: only items whose column `split` says this count; None: all.

    Raises:
        TableError: when no item or no pair is usable, or no item is of that split.
    """
    table, rejects = load_items(items, split, None, num_workers, encoding, allow_remote)
    if eval_split is not None:
        table = table.select(table.where("split", eval_split))
        if not len(table):
            raise TableError(f"{items}: no item whose column 'split' says '{eval_split}'.")
    pair_table, rejected = load_pairs(pairs, table, encoding=encoding)
    rejects += rejected
    return table, pair_table, rejects
