"""From pair tables to batches: which pairs stand together, and how they become the model's inputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from training.data import ItemTable, PairTable


Item = dict[str, Any]


class PairDataset(Dataset):
    """(query item, target item) by position; images stay encoded until the collator's processor opens them."""

    def __init__(self, items: ItemTable, pairs: PairTable):
        self.items, self.pairs = items, pairs.pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Item, Item]:
        query, target = self.pairs[index]
        return self.items[query], self.items[target]


class DistinctItemsSampler(Sampler[int]):
    """Shuffled pairs, ordered so that no batch holds an item twice, nor a group twice where pairs have groups.

    Every other row of a batch serves as a negative, so a second copy of an item (or of a group, where a group means
    that its members fit together) would be a wrong one. An epoch has floor(pairs / batch size) batches. A pair that
    fits into none of them is passed over for this epoch, and its place goes to a pair drawn again.

    Args:
        pairs: the pairs to order.
        batch_size: pairs in a batch.
        seed: of the order; the epoch, set by `set_epoch`, changes it too.

    Raises:
        ValueError: when not even one batch can be filled.
    """

    LOOKAHEAD = 50
    """How many batches' worth of pairs are tried for one batch: bounds the time on skewed tables."""

    def __init__(self, pairs: PairTable, batch_size: int, seed: int = 0):
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.keys = np.array(pairs.pairs, dtype=np.int64).reshape(-1, 2)
        if pairs.groups is not None:
            first = self.keys.max() + 1
            groups = np.unique(pairs.groups, return_inverse=True)[1]
            self.keys = np.column_stack([self.keys, groups + first])
        if len(self) == 0:
            raise ValueError(f"{len(self.keys)} pairs don't fill one batch: lower per_device_train_batch_size.")
        reached = max(len(self._fill(order, [])[0]) for order in self._orders(8))
        if reached < batch_size:
            raise ValueError(
                f"A batch of {batch_size} pairs without a common item or group can't be filled, only {reached}: lower "
                "per_device_train_batch_size, or drop distinct_column."
            )

    def _orders(self, count: int) -> Iterator[list[int]]:
        generator = np.random.default_rng(self.seed)
        return (generator.permutation(len(self.keys)).tolist() for _ in range(count))

    def __len__(self) -> int:
        return len(self.keys) // self.batch_size * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Change the order; accelerate's data loader calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        waiting = generator.permutation(len(self.keys)).tolist()
        for _ in range(len(self) // self.batch_size):
            batch, waiting = self._fill(waiting, [])
            while len(batch) < self.batch_size:
                batch, _ = self._fill(generator.permutation(len(self.keys)).tolist(), batch)
            yield from batch

    def _fill(self, waiting: list[int], batch: list[int]) -> tuple[list[int], list[int]]:
        """Add pairs from the front to `batch` where they share no key; returns the batch and those still waiting."""
        used = {key for pair in batch for key in self.keys[pair].tolist()}
        batch, passed_over = list(batch), []
        tried = 0
        for pair in waiting[: self.LOOKAHEAD * self.batch_size]:
            if len(batch) == self.batch_size:
                break
            tried += 1
            keys = self.keys[pair].tolist()
            if used.isdisjoint(keys):
                used.update(keys)
                batch.append(pair)
            else:
                passed_over.append(pair)
        return batch, passed_over + waiting[tried:]


@dataclass(frozen=True)
class VisionFeatures:
    """Output of a frozen vision encoder for every image of an item table, kept in memory.

    Attributes:
        hidden_states: (images, tokens, width) float16 or the encoder's own half precision.
        pooler_output: (images, width).
        rows: item id to the first and the one-past-last row of its images.
    """

    hidden_states: Tensor
    pooler_output: Tensor
    rows: dict[str, tuple[int, int]]

    def summary(self, item_id: str) -> Tensor:
        """(width,) float32: the mean summary feature of an item's images; zeros without one."""
        first, end = self.rows[item_id]
        return self.pooler_output[first:end].float().sum(0) / max(end - first, 1)

    def of(self, items: Sequence[Item], dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's `vision_hidden_states` and `vision_pooler_output` for these items, in their order.

        An item without the field `image` gets none, even if the table has its picture.
        """
        rows = [row for item in items if item.get("image") is not None for row in range(*self.rows[item["item_id"]])]
        if not rows:
            return {}
        return {
            "vision_hidden_states": self.hidden_states[rows].to(dtype),
            "vision_pooler_output": self.pooler_output[rows].to(dtype),
        }


@torch.no_grad()
def cache_vision_features(model: Any, processor: Any, items: ItemTable, batch_size: int = 32) -> VisionFeatures | None:
    """Run the frozen vision encoder once over all images; None when no item has one.

    Stored in half precision: 16-bit rounding of a feature is far below what training moves, and halves the memory.
    """
    hidden, pooled, rows, total = [], [], {}, 0
    model.eval()
    for start in tqdm(range(0, len(items), batch_size), desc="Vision features", unit="batch"):
        batch = [items[i] for i in range(start, min(start + batch_size, len(items)))]
        inputs = processor(
            [{k: item[k] for k in ("item_id", "image") if k in item} for item in batch], return_tensors="pt"
        )
        for item, count in zip(batch, inputs["num_images"].tolist(), strict=True):
            rows[item["item_id"]] = (total, total + count)
            total += count
        if "pixel_values" in inputs:
            features = model.get_vision_features(inputs["pixel_values"].to(model.device, model.dtype))
            hidden.append(_half(features.last_hidden_state))
            pooled.append(_half(features.pooler_output))
    if not hidden:
        return None
    return VisionFeatures(torch.cat(hidden), torch.cat(pooled), rows)


def _half(features: Tensor) -> Tensor:
    return features.to("cpu", features.dtype if features.dtype == torch.bfloat16 else torch.float16)


@dataclass
class ItemCollator:
    """Items to the model's inputs: through the processor, with stored vision features in place of pixels if given."""

    processor: Any
    features: VisionFeatures | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        if self.features is None:
            return dict(self.processor(list(items), return_tensors="pt"))
        inputs = self.processor(list(items), process_images=False, return_tensors="pt")
        return {**inputs, **self.features.of(items, self.dtype)}


@dataclass
class PairCollator:
    """Pairs to one batch of items as the loss reads it: all first members, then all second members."""

    collate_items: ItemCollator

    def __call__(self, pairs: Sequence[tuple[Item, Item]]) -> dict[str, Tensor]:
        return self.collate_items([query for query, _ in pairs] + [target for _, target in pairs])
