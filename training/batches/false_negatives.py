"""Which in-batch items are not negatives: known positives from the whole pair table, and items that look or read the same.

Every other item of a batch serves as a negative. Some of them are not: another target of the same query, the same item
drawn twice, the same picture or text under another id. They are found here as sparse (row, column) indices, and the loss
leaves them out.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm.auto import tqdm

from training.tables.images import image_hash, map_items
from training.tables.items import ItemTable
from training.tables.pairs import PairTable


TEXT_FIELDS = ("title", "topics", "content")
MOST_ALIKE = 512
"""More rows of one batch than this with one picture or text share a placeholder, not an item."""
ENTRIES = 4_000_000
"""Known positives looked up at once: bounds the memory."""


class KnownPositives:
    """Partners of each item in a pair table, in both directions: compressed sparse rows of 8 bytes an entry.

    Args:
        pairs: (n, 2) integer positions of items.
        num_items: items of the table.
    """

    def __init__(self, pairs: np.ndarray, num_items: int):
        self.num_items = num_items
        keys = np.empty(2 * len(pairs), dtype=np.int64)
        for half, (source, target) in zip(np.split(keys, 2), ((0, 1), (1, 0)), strict=True):
            np.multiply(pairs[:, source], num_items, out=half, dtype=np.int64)
            half += pairs[:, target]
        keys.sort()
        self.keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
        self.starts = np.searchsorted(self.keys, np.arange(num_items + 1, dtype=np.int64) * num_items)

    def contains(self, items: np.ndarray, partners: np.ndarray) -> np.ndarray:
        """Whether each (item, partner) is a known pair, in either direction: bool, shaped as the arguments broadcast."""
        wanted = np.asarray(items, dtype=np.int64) * self.num_items + partners
        if not len(self.keys):
            return np.zeros(wanted.shape, dtype=bool)
        places = np.searchsorted(self.keys, wanted)
        return self.keys[np.minimum(places, len(self.keys) - 1)] == wanted

    def partners(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row in `items` and position of every partner of theirs: two (entries,) int64."""
        counts = self.starts[items + 1] - self.starts[items]
        rows = np.repeat(np.arange(len(items)), counts)
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        return rows, self.keys[self.starts[items][rows] + within] - items[rows] * self.num_items


@dataclass
class FalseNegatives:
    """Finds the entries of a batch's similarity matrix that are no negatives. The same batch gives the same entries.

    Attributes:
        positives: known pairs to leave out; None: none.
        image_hashes, text_hashes: (items,) int64, equal for items that are not each other's negatives, -1 for none; None:
            not looked at. See `image_hashes` and `text_hashes` of this module.
    """

    positives: KnownPositives | None = None
    image_hashes: np.ndarray | None = None
    text_hashes: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        items: ItemTable,
        pairs: PairTable,
        known_positives: bool = True,
        same_image: bool = True,
        same_text: bool = True,
        num_workers: int = 0,
    ) -> "FalseNegatives":
        """All that is needed to find them among `items`; each kind can be left out. Hashing images reads every file."""
        return cls(
            KnownPositives(pairs.pairs, len(items)) if known_positives else None,
            image_hashes(items, num_workers) if same_image else None,
            text_hashes(items) if same_text else None,
        )

    def __call__(self, item_index: Tensor) -> tuple[Tensor, Tensor]:
        """Entries that are no negatives, besides the diagonal: the same item, a known positive, the same picture or text.

        A row's partner is a known positive and so among them; the loss keeps it.

        Args:
            item_index: (M,) int64 positions in the item table of the rows of the whole (gathered) batch.

        Returns:
            rows and columns, (entries,) int64 each, on the device of `item_index`; an entry may stand there several times.
        """
        items = item_index.cpu().numpy()
        labels = [items, *(hashes[items] for hashes in (self.image_hashes, self.text_hashes) if hashes is not None)]
        keys = [_alike(values) for values in labels]
        if self.positives is not None:
            keys += self._known(items)
        return _entries(keys, item_index)

    def known(self, item_index: Tensor) -> tuple[Tensor, Tensor]:
        """The known positives among those entries; arguments and result as of a call."""
        return _entries([np.empty(0, np.int64), *self._known(item_index.cpu().numpy())], item_index)

    def _known(self, items: np.ndarray) -> list[np.ndarray]:
        """Entries of known positives, a bounded number of the table's at a time."""
        assert self.positives is not None
        different, of_row = np.unique(items, return_inverse=True)
        by_item = np.argsort(of_row, kind="stable")
        copies = np.bincount(of_row)
        first = copies.cumsum() - copies
        place = np.full(self.positives.num_items, -1, dtype=np.int32)
        place[different] = np.arange(len(different))
        degree = self.positives.starts[different + 1] - self.positives.starts[different]
        blocks = np.flatnonzero(np.diff(degree.cumsum() // ENTRIES, prepend=0))
        entries = []
        for block in np.split(np.arange(len(different)), blocks):
            source, partner = self.positives.partners(different[block])
            target = place[partner]
            source, target = block[source[target >= 0]], target[target >= 0]
            # Items of a batch are distinct but for replaced pairs and hard negatives: then every copy has the entry.
            count = copies[source] * copies[target]
            pair = np.repeat(np.arange(len(source)), count)
            within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
            row, column = np.divmod(within, copies[target][pair])
            entries.append(by_item[first[source][pair] + row] * len(items) + by_item[first[target][pair] + column])
        return entries


def _entries(keys: list[np.ndarray], item_index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of keys (row * M + column), on the device of `item_index` (M,)."""
    rows, columns = np.divmod(np.concatenate(keys), max(len(item_index), 1))
    return torch.from_numpy(rows).to(item_index.device), torch.from_numpy(columns).to(item_index.device)


def _alike(labels: np.ndarray) -> np.ndarray:
    """Keys (row * M + column) of all ordered pairs of different rows with one label; -1 is no label.

    A label of more than `MOST_ALIKE` rows is a placeholder ("no picture yet"), and its rows stay negatives.
    """
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    entries = [np.empty(0, dtype=np.int64)]
    for start, count in zip(starts[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        if count <= MOST_ALIKE:
            rows = order[start : start + count]
            pairs = rows[:, None] * len(labels) + rows
            entries.append(pairs[~np.eye(count, dtype=bool)])
    return np.concatenate(entries)


def image_hashes(items: ItemTable, num_workers: int = 0) -> np.ndarray:
    """(n,) int64 hash of each item's images, equal for equal ones; -1 for an item without a readable image."""
    if "image" not in items.table.column_names:
        return np.full(len(items), -1, dtype=np.int64)
    hashes = map_items(items, image_hash, num_workers, "Hashing images")
    return np.fromiter(hashes, dtype=np.int64, count=len(items))


def text_hashes(items: ItemTable) -> np.ndarray:
    """(n,) int64 hash of each item's title, topics and content, equal for equal ones; -1 for an item without text."""
    hashes = np.full(len(items.table), -1, dtype=np.int64)
    columns = [name for name in TEXT_FIELDS if name in items.table.column_names]
    for start, block in tqdm(items.table.blocks(columns) if columns else (), desc="Hashing texts", unit="block"):
        combined = np.zeros(len(block), dtype=np.uint64)
        filled = np.zeros(len(block), dtype=bool)
        for name in columns:
            texts = _as_text(block[name].combine_chunks())
            filled |= pc.greater(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
            hashed = pd.util.hash_array(texts.to_numpy(zero_copy_only=False), categorize=False)
            combined = combined * np.uint64(0x9E3779B97F4A7C15) + hashed
        hashes[start : start + len(block)][filled] = (combined[filled] >> np.uint64(1)).astype(np.int64)
    return hashes[items.rows]


def _as_text(column: pa.Array) -> pa.Array:
    """Texts without surrounding blanks; a list's joined, null as empty."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.binary_join(column.cast(pa.list_(pa.string())), "\x1f")
    return pc.fill_null(pc.utf8_trim_whitespace(column.cast(pa.string())), "")
