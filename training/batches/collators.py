"""From pairs to the model's inputs, in the data loader's workers.

An image that can't be read doesn't stop a run: its item goes on with its other images, and a pair with an item that has
none left gives its place to another pair of the batch. Both are listed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers.utils import logging

from modeling_notellm2.images_notellm2 import image_sources
from modeling_notellm2.pixels_notellm2 import join_pictures
from modeling_notellm2.prompts_notellm2 import ItemError
from training.batches.false_negatives import TEXT_FIELDS
from training.batches.vision_cache import VisionCache, feature_inputs, open_vision_cache
from training.tables.commands.files import write_text
from training.tables.images import Item, content_key, open_picture, read_encoded
from training.tables.items import ItemTable
from training.tables.pairs import PairTable
from training.tables.rejects import Reject
from training.tables.remote.pictures import fetch_pictures_of


logger = logging.get_logger(__name__)

Picture = dict[str, Tensor] | int
"""What the model takes of a picture, or where its features stand in the cache."""


@dataclass(frozen=True)
class Pair:
    """What the collator gets of a pair: query, target, then its hard negatives.

    Attributes:
        positions: (2 + k,) positions in the item table.
        items: the items themselves; images stay encoded.
        weight: how much it counts in the loss; None: as any other.
    """

    positions: np.ndarray
    items: list[Item]
    weight: float | None = None


class PairDataset(Dataset):
    """Pairs by position, with their items."""

    def __init__(self, items: ItemTable, pairs: PairTable):
        self.items, self.pairs = items, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        positions = self.pairs.pairs[index]
        if self.pairs.negatives is not None:
            positions = np.concatenate([positions, self.pairs.negatives[index]])
        weight = None if self.pairs.weights is None else float(self.pairs.weights[index])
        return Pair(positions, [self.items[position] for position in positions.tolist()], weight)


BLANK = Image.new("RGB", (64, 64))


@dataclass
class UnreadableImages:
    """Lists each item that is met with an image that can't be read, once.

    Attributes:
        rejects: JSON lines file that they are added to; None: they are logged alone.
    """

    rejects: Path | None = None
    listed: set[str] = field(default_factory=set, init=False, repr=False)

    def add(self, item: Item, fault: str) -> None:
        """List an item, with the reason."""
        name = str(item.get("item_id", ""))
        if name in self.listed:
            return
        self.listed.add(name)
        reject = Reject("items, met in a batch", -1, [name], f"unreadable image: {fault}")
        logger.warning("item_id %r: %s", name, reject.reason)
        if self.rejects is not None:
            with self.rejects.open("a", encoding="utf-8") as stream:  # one short write: lines of workers don't mix
                stream.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")


@dataclass
class ItemCollator:
    """Items to the model's inputs, with stored vision features in place of pixels where the cache has them.

    A batch whose images are partly stored has both, and `cached_images` (images,) bool beside them. A batch without images
    has a blank one that belongs to no item, so that processes run all parts of the model in step.

    Attributes:
        processor: the model's.
        features: cache of vision features; None: all pixels.
        dtype: of stored features as they are given out.
        rejects: JSON lines file to which unreadable images are added, each by every worker that meets it; see
            `drop_repeated_lines`.
    """

    processor: Any
    features: VisionCache | None = None
    dtype: torch.dtype = torch.float32
    rejects: Path | None = None
    unreadable: UnreadableImages = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.unreadable = UnreadableImages(self.rejects)

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """The inputs of these items, in their order. One whose only content is an unreadable image has an empty prompt."""
        fetch_pictures_of(items)
        return self.inputs([self.open(item) for item in items])

    def open(self, item: Item) -> tuple[Item, list[Picture]]:
        """The item and its pictures; one that can't be read is left out and listed."""
        sources = image_sources(item.get("image"))
        readable, pictures = [], []
        for source in sources:
            try:
                pictures.append(self._picture(source))
                readable.append(source)
            except ItemError as error:
                self.unreadable.add(item, str(error))
        return ({**item, "image": readable} if "image" in item else item), pictures

    def inputs(self, opened: Sequence[tuple[Item, list[Picture]]]) -> dict[str, Tensor]:
        """The model's inputs for opened items."""
        pictures = [picture for _, of_item in opened for picture in of_item]
        tokens = [self._count_tokens(picture) for picture in pictures]
        items = [item for item, _ in opened]
        inputs = dict(self.processor(items, process_images=False, image_tokens=tokens, return_tensors="pt"))
        stored = [picture for picture in pictures if isinstance(picture, int)]
        pixels = [picture for picture in pictures if not isinstance(picture, int)]
        if stored:
            assert self.features is not None
            given = feature_inputs(self.features.read(stored))
            inputs |= {
                name: values.to(self.dtype) if values.is_floating_point() else values for name, values in given.items()
            }
        if pixels or not pictures:
            inputs |= join_pictures(pixels or [self.processor.process_images([BLANK])])
        if stored and pixels:
            inputs["cached_images"] = torch.tensor([isinstance(picture, int) for picture in pictures])
        return inputs

    def _count_tokens(self, picture: Picture) -> int:
        """Placeholders of one picture."""
        if self.processor.patches_per_token is None or not isinstance(picture, int):
            return self.processor.count_tokens(picture)
        assert self.features is not None
        return self.features.count_tokens(picture)

    def _picture(self, source: Any) -> Picture:
        if self.features is None:
            return self.processor.process_images([open_picture(source, self.processor)])
        encoded = read_encoded(source)
        stored = self.features.find(content_key(encoded))
        return self.processor.process_images([open_picture(encoded, self.processor)]) if stored is None else stored


@dataclass
class PairCollator:
    """Pairs to one batch of items as the loss reads it: all queries, all targets, then all hard negatives.

    Beside the model's inputs a batch has `item_index` (rows,) int64, positions in the item table, and `num_pairs` (int).
    A pair with an item whose images all can't be read gives its place to another pair of the batch, which then stands in it
    twice; the loss masks such copies by `item_index`.

    Attributes:
        collate_items: makes the inputs.
        image_dropout, text_dropout: probability that an item that has both loses its images, or its texts.
        seed: with the batch's items it decides which items lose something, so a resumed run decides alike.

    Raises:
        ValueError: for what is not a probability, or a sum above 1 together.
    """

    collate_items: ItemCollator
    image_dropout: float = 0.0
    text_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.image_dropout, self.text_dropout) < 0 or self.image_dropout + self.text_dropout > 1:
            raise ValueError(
                f"image_dropout {self.image_dropout} and text_dropout {self.text_dropout} must be probabilities whose "
                "sum is at most 1."
            )

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """The batch.

        Raises:
            ItemError: when not one pair of the batch is usable.
        """
        opened = [[self.collate_items.open(item) for item in pair.items] for pair in pairs]
        usable = [
            number
            for number, (pair, members) in enumerate(zip(pairs, opened, strict=True))
            if all(map(_is_usable, pair.items, members))
        ]
        if not usable:
            ids = ", ".join(str(item.get("item_id")) for pair in pairs for item in pair.items)
            raise ItemError(f"No pair of the batch has two items whose images can be read; its items: {ids[:500]}")
        numbers = [n if n in set(usable) else usable[n % len(usable)] for n in range(len(pairs))]
        positions = np.stack([pairs[number].positions for number in numbers]).T.reshape(-1).astype(np.int64)
        rows = [opened[number][member] for member in range(len(pairs[0].items)) for number in numbers]
        inputs = self.collate_items.inputs(self._drop(rows, positions))
        batch = {**inputs, "item_index": torch.from_numpy(positions), "num_pairs": len(pairs)}
        if pairs[0].weight is not None:
            batch["pair_weight"] = torch.tensor([pairs[number].weight for number in numbers])
        return batch

    def _drop(self, rows: list[tuple[Item, list[Picture]]], positions: np.ndarray) -> list[tuple[Item, list[Picture]]]:
        """Modality dropout; an item never loses both."""
        if not (self.image_dropout or self.text_dropout):
            return rows
        drawn = np.random.default_rng([self.seed, *positions.tolist()]).random(len(rows))
        return [self._drop_one(item, pictures, chance) for (item, pictures), chance in zip(rows, drawn, strict=True)]

    def _drop_one(self, item: Item, pictures: list[Picture], chance: float) -> tuple[Item, list[Picture]]:
        if not pictures or not _has_text(item):
            return item, pictures
        if chance < self.image_dropout:
            return {key: value for key, value in item.items() if key != "image"}, []
        if chance < self.image_dropout + self.text_dropout:
            return {key: value for key, value in item.items() if key not in TEXT_FIELDS}, pictures
        return item, pictures


def cache_vision_features(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    root: Path | None = None,
    limit_gb: float = 50.0,
    batch_size: int | None = None,
    num_workers: int = 0,
    dtype: torch.dtype = torch.float32,
) -> VisionCache:
    """The model's vision cache, filled with the items' images; arguments as of `open_vision_cache` and its `fill`."""
    cache = open_vision_cache(model, processor, root, dtype)
    cache.fill(model, processor, items, limit_gb, batch_size, num_workers)
    return cache


def _has_text(item: Item) -> bool:
    return any(item.get(name) for name in TEXT_FIELDS)


def _is_usable(item: Item, opened: tuple[Item, list[Picture]]) -> bool:
    """Whether an item has what it says: one whose only image can't be read is no item, though it may have a text."""
    readable, pictures = opened
    return bool(pictures) or (_has_text(readable) and not image_sources(item.get("image")))


def drop_repeated_lines(path: Path) -> int:
    """Leave each line of a file once, where it stands first, and return how many there are; 0 without the file."""
    if not path.is_file():
        return 0
    lines = dict.fromkeys(path.read_text(encoding="utf-8").splitlines())
    write_text("".join(f"{line}\n" for line in lines), path)
    return len(lines)


__all__ = [
    "ItemCollator",
    "Pair",
    "PairCollator",
    "PairDataset",
    "UnreadableImages",
    "cache_vision_features",
    "drop_repeated_lines",
]
