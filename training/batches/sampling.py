"""Which pairs stand together in a batch: no item twice, in an order that seed and epoch alone decide."""

from collections import deque
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Sampler

from modeling_notellm2.prompts_notellm2 import FieldLimits
from training.tables.items import ItemTable
from training.tables.pairs import PairTable


CHARACTERS_PER_TOKEN = 2
"""Between Chinese and English; an estimate of length needs no better."""


class DistinctItemsSampler(Sampler[int]):
    """Shuffled pairs, ordered so that no batch holds an item twice, nor a group twice where pairs have groups.

    Every other row of a batch serves as a negative, so a second copy of an item (or of a group, where a group means
    that its members fit together) would be a wrong one. Hard negatives count as items of the batch. An epoch has
    floor(pairs / batch size) batches. A pair that fits into none of them is passed over for this epoch, and its place
    goes to a pair drawn again.

    The shuffled order is walked in blocks of some batches. With `lengths`, a block is sorted by length
    before it is dealt out and its batches are shuffled after, so that a batch pads little and its length tells nothing
    about the next one's. In memory: 4 bytes for each pair, and a block.

    Args:
        pairs: the pairs to order.
        batch_size: pairs that meet in one loss: those of all processes together.
        seed: of the order; the epoch, set by `set_epoch`, changes it too.
        lengths: (items,) integer length of each item, in any unit; none: batches of mixed lengths.

    Raises:
        ValueError: when not even one batch can be filled.
    """

    BLOCK_PAIRS = 65_536
    BLOCK_BATCHES = (4, 50)
    """A block has about this many pairs, but at least and at most this many batches."""
    TRIES = 100
    """Times that as many pairs as a batch has are drawn before it is given up."""

    def __init__(self, pairs: PairTable, batch_size: int, seed: int = 0, lengths: np.ndarray | None = None):
        self.batch_size, self.seed, self.epoch, self.lengths = batch_size, seed, 0, lengths
        self.columns = [np.asarray(pairs.pairs, dtype=np.int32).reshape(-1, 2)]
        if pairs.negatives is not None:
            self.columns.append(np.asarray(pairs.negatives, dtype=np.int32))
        self.groups = None if pairs.groups is None else _group_keys(np.asarray(pairs.groups, dtype=np.int32))
        if len(self) == 0:
            raise ValueError(f"{len(self.columns[0])} pairs don't fill one batch: lower per_device_train_batch_size.")
        reached = len(self._complete([], set(), np.random.default_rng(self.seed)))
        if reached < batch_size:
            raise ValueError(
                f"A batch of {batch_size} pairs without a common item or group can't be filled, only {reached}: lower "
                "per_device_train_batch_size, drop distinct_column, or take fewer hard negatives."
            )

    def __len__(self) -> int:
        return len(self.columns[0]) // self.batch_size * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Change the order; accelerate's data loader calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = np.arange(len(self.columns[0]), dtype=np.int32)
        generator.shuffle(order)
        least, most = self.BLOCK_BATCHES
        size = min(max(self.BLOCK_PAIRS // self.batch_size, least), most) * self.batch_size
        left_over = np.empty(0, dtype=np.int32)
        for start in range(0, len(self), size):
            count = min(size, len(self) - start) // self.batch_size
            # The last block takes the rest of the order too. Of pairs that never fit, only some are tried again.
            end = start + size if start + size < len(self) else len(order)
            block = np.concatenate([left_over[: least * self.batch_size], order[start:end]])
            if self.lengths is not None:
                block = block[np.argsort(self._lengths(block), kind="stable")]
            batches, left_over = self._deal(block, count, generator)
            if self.lengths is not None:
                generator.shuffle(batches)
            for batch in batches:
                yield from batch

    def _deal(
        self, block: np.ndarray, count: int, generator: np.random.Generator
    ) -> tuple[list[list[int]], np.ndarray]:
        """`count` batches from the front of the block, and the pairs that are left."""
        waiting = deque(zip(block.tolist(), self._keys(block), strict=True))
        batches = []
        for _ in range(count):
            batch: list[int] = []
            used: set[int] = set()
            passed_over = []
            while waiting and len(batch) < self.batch_size:
                pair, keys = waiting.popleft()
                if used.isdisjoint(keys):
                    used.update(keys)
                    batch.append(pair)
                else:
                    passed_over.append((pair, keys))
            waiting.extendleft(reversed(passed_over))
            batches.append(self._complete(batch, used, generator))
            if len(batches[-1]) < self.batch_size:
                raise ValueError(
                    f"A batch of {self.batch_size} pairs could not be filled in {self.TRIES} tries: its pairs share too "
                    "many items or groups. Lower per_device_train_batch_size."
                )
        return batches, np.fromiter((pair for pair, _ in waiting), dtype=np.int32, count=len(waiting))

    def _complete(self, batch: list[int], used: set[int], generator: np.random.Generator) -> list[int]:
        """Fill a batch up with pairs drawn from all; short where that fails."""
        batch, used = list(batch), set(used)
        for _ in range(self.TRIES):
            if len(batch) == self.batch_size:
                break
            drawn = generator.integers(len(self.columns[0]), size=self.batch_size)
            for pair, keys in zip(drawn.tolist(), self._keys(drawn), strict=True):
                if len(batch) < self.batch_size and used.isdisjoint(keys):
                    used.update(keys)
                    batch.append(pair)
        return batch

    def _keys(self, chosen: np.ndarray) -> list[list[int]]:
        """What no two pairs of a batch share: item positions, and the group as a negative number."""
        columns = [column[chosen] for column in self.columns]
        if self.groups is not None:
            columns.append(self.groups[chosen, None])
        return np.concatenate(columns, axis=1).tolist()

    def _lengths(self, chosen: np.ndarray) -> np.ndarray:
        """The longest item of each pair."""
        assert self.lengths is not None
        return np.max([self.lengths[column[chosen]].max(1) for column in self.columns], axis=0)


def _group_keys(groups: np.ndarray) -> np.ndarray:
    """(n,) int32 below 0, where no item's position is: one for each group, and one of its own for a pair without (-1)."""
    alone = -2 - groups.max(initial=-1) - np.arange(len(groups), dtype=np.int32)
    return np.where(groups < 0, alone, -1 - groups)


def item_lengths(items: ItemTable, limits: FieldLimits, image_tokens: int) -> np.ndarray:
    """(n,) int32 estimate of each item's tokens, times two: characters within the limits, and slots of images.

    Args:
        limits: as the processor cuts texts (`processor.limits`).
        image_tokens: placeholders of one image (`processor.num_query_tokens`).
    """
    most = {
        "title": limits.max_title_length,
        "content": limits.max_content_length,
        "topics": limits.max_topics * limits.max_topic_length,
    }
    lengths = np.zeros(len(items.table), dtype=np.int32)
    columns = [name for name in (*most, "image") if name in items.table.column_names]
    for start, block in items.table.blocks(columns):
        here = lengths[start : start + len(block)]
        for name in columns:
            column = block[name].combine_chunks()
            if name == "image":
                here += _count(column) * image_tokens * CHARACTERS_PER_TOKEN
            else:
                here += np.minimum(_characters(column), most[name])
    return lengths[items.rows]


def _characters(texts: pa.Array) -> np.ndarray:
    """(n,) int32 characters of each text or list of texts."""
    if pa.types.is_list(texts.type) or pa.types.is_large_list(texts.type):
        texts = pc.binary_join(texts.cast(pa.list_(pa.string())), ",")
    return pc.fill_null(pc.utf8_length(texts.cast(pa.string())), 0).to_numpy(zero_copy_only=False)


def _count(images: pa.Array) -> np.ndarray:
    """(n,) int32 images of each item; null is none."""
    if pa.types.is_list(images.type) or pa.types.is_large_list(images.type):
        return pc.fill_null(pc.list_value_length(images), 0).to_numpy(zero_copy_only=False).astype(np.int32)
    return images.is_valid().to_numpy(zero_copy_only=False).astype(np.int32)
