"""From rows of an item table to embeddings: the one encoder that every way of running a catalogue job uses.

Its two halves need different machines: `prepare` reads texts and opens pictures on CPUs, `embed` runs the model. Between
them goes a `PreparedBlock`. A row that can't be used becomes a `Reject`, and its neighbours never notice.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoProcessor

from hub.catalogue.earlier import Earlier, Known, content_hash
from modeling_notellm2 import ItemError
from modeling_notellm2.images_notellm2 import image_sources
from modeling_notellm2.pixels_notellm2 import join_pictures
from training.tables.commands.model_folder import loading
from training.tables.images import open_picture
from training.tables.items import Item, ItemTable
from training.tables.rejects import Reject, Rejects


@dataclass(frozen=True)
class Place:
    """Where an item stands: its id, the file (or split) of its table, and the row in it, from 0.

    `content` is the hash of what it holds, where that is to be stored.
    """

    item_id: str
    file: str
    row: int
    content: bytes | None = None

    def rejected(self, reason: str) -> Reject:
        """The item, or a picture of it, as left out."""
        return Reject(self.file, self.row, [self.item_id], reason, self.file)


@dataclass(frozen=True)
class CopiedItem:
    """An item that holds what it held in an earlier version: its place, and what was known."""

    place: Place
    known: Known


@dataclass(frozen=True)
class PreparedBlock:
    """Usable items of a block of rows, ready for the model, in the order in which they are batched.

    Attributes:
        number: of the block in the table.
        places: n items, in batch order.
        order: position of each of them among the items in table order, copied ones counted.
        input_ids: token ids of each, unpadded.
        num_images: of each.
        pictures: what the model takes of the pictures of each batch, in their order; empty for a batch without any.
        rejects: rows left out so far.
        copied: items whose vectors are known from an earlier version, by their position among the items in table order.
    """

    number: int
    places: list[Place]
    order: list[int]
    input_ids: list[list[int]]
    num_images: list[int]
    pictures: list[dict[str, torch.Tensor]]
    rejects: list[Reject]
    copied: dict[int, CopiedItem] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedBlock:
    """Embeddings of a block of rows, in table order.

    Attributes:
        number: of the block in the table.
        item_ids: n ids.
        embeddings: `(n, d)` float32, L2-normalised.
        visual_embeddings: `(n, d)` float32, zeros where there is no image; None if not asked for.
        has_image: `(n,)` bool.
        rejects: rows left out.
        contents: n hashes of what the items hold; none where they are not stored.
        copied: how many of them were taken from an earlier version.
    """

    number: int
    item_ids: list[str]
    embeddings: np.ndarray
    visual_embeddings: np.ndarray | None
    has_image: np.ndarray
    rejects: list[Reject]
    contents: list[bytes | None] = field(default_factory=list)
    copied: int = 0


@dataclass(frozen=True)
class ItemEncoder:
    """A model with its processor, each loaded in the process that first needs it.

    Args:
        model_path: folder with model and processor.
        dtype: of the weights: float32, bfloat16 or float16.
        device: as torch names it.
        batch_size: items in a batch.
        visual: give visual embeddings too; needs a model with mICL.
        compile: run the model through `torch.compile`.
    """

    model_path: str
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 32
    visual: bool = False
    compile: bool = False

    @cached_property
    def processor(self) -> Any:
        with loading(self.model_path):
            return AutoProcessor.from_pretrained(self.model_path, trust_remote_code=True)

    @cached_property
    def model(self) -> Any:
        with loading(self.model_path):
            model = AutoModel.from_pretrained(self.model_path, trust_remote_code=True, dtype=getattr(torch, self.dtype))
        model = model.eval().to(self.device)
        return torch.compile(model, dynamic=True) if self.compile else model

    def prepare(
        self,
        number: int,
        items: Iterable[tuple[Place, Item]],
        known_rejects: Sequence[Reject] = (),
        earlier: Earlier | None = None,
    ) -> PreparedBlock:
        """Texts to token ids, pictures to pixels, and similar items side by side so that batches have little padding.

        Each item goes through the processor alone: an unreadable picture spoils nothing else, and no more than one
        item's pictures are open at their full size. An item goes on with those of its pictures that can be read; one that
        has pictures, and none that can be read, is left out.

        Args:
            number: of the block in the table.
            items: usable items, in table order.
            known_rejects: rows among them that were left out before.
            earlier: version of the catalogue from which vectors of unchanged items are taken.
        """
        places, prepared = [], []
        positions: list[int] = []
        copied: dict[int, CopiedItem] = {}
        new_rejects: list[Reject] = []
        for place, item in items:
            known = earlier.find(place.item_id, place.content) if earlier and place.content else None
            if known:
                copied[len(positions) + len(copied)] = CopiedItem(place, known)
                continue
            try:
                opened, faults = _with_open_pictures(item, self.processor)
                new_rejects += map(place.rejected, faults)
                prepared.append(self.processor(opened, padding=False))
            except Exception as error:  # whatever it is, it is listed
                new_rejects.append(place.rejected(_reason(error)))
                continue
            positions.append(len(positions) + len(copied))
            places.append(replace(place, content=None) if faults else place)  # the next version lists its faults again
        rejects = (
            sorted([*known_rejects, *new_rejects], key=lambda reject: reject.row)
            if new_rejects
            else list(known_rejects)
        )
        sizes = [(inputs["num_images"][0], len(inputs["input_ids"][0])) for inputs in prepared]
        order = sorted(range(len(places)), key=lambda at: (sizes[at], at))
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        return PreparedBlock(
            number,
            [places[at] for at in order],
            [positions[at] for at in order],
            [prepared[at]["input_ids"][0] for at in order],
            [prepared[at]["num_images"][0] for at in order],
            [_pictures_of([prepared[at] for at in batch]) for batch in batches],
            rejects,
            copied,
        )

    def embed(self, block: PreparedBlock) -> EncodedBlock:
        """Runs the model over the block's batches and puts all items back in table order."""
        count = len(block.places) + len(block.copied)
        embeddings, visual = (np.zeros((count, self._width_of(block)), np.float32) for _ in range(2))
        first = 0
        for batch in self._batches(block):
            places_now = block.order[first : first + len(batch["input_ids"])]
            embeddings[places_now], visual[places_now] = self._embed_batch(batch)
            first += len(places_now)
        for at, item in block.copied.items():
            embeddings[at] = item.known.embedding
            if item.known.visual_embedding is not None:
                visual[at] = item.known.visual_embedding
        finite = np.isfinite(np.concatenate([embeddings, visual], axis=1)).all(axis=1).reshape(-1)
        fresh = zip(block.places, np.array(block.num_images) > 0, strict=True)
        of_position = dict(zip(block.order, fresh, strict=True))
        of_position |= {at: (item.place, item.known.has_image) for at, item in block.copied.items()}
        in_order = [of_position[at] for at in range(count)]
        usable = [entry for entry, is_finite in zip(in_order, finite, strict=True) if is_finite]
        lost = [
            place.rejected(f"the model's embedding is not finite in {self.dtype}")
            for (place, _), is_finite in zip(in_order, finite, strict=True)
            if not is_finite
        ]
        return EncodedBlock(
            block.number,
            [place.item_id for place, _ in usable],
            embeddings[finite],
            visual[finite] if self.visual else None,
            np.array([has_image for _, has_image in usable], dtype=bool),
            [*block.rejects, *lost],
            [place.content for place, _ in usable],
            len(block.copied),
        )

    def _width_of(self, block: PreparedBlock) -> int:
        """Of the embeddings; the model is not loaded for a block that is copied as a whole."""
        if block.places or not block.copied:
            return self.width
        return len(next(iter(block.copied.values())).known.embedding)

    @property
    def width(self) -> int:
        """Of the embeddings."""
        config = self.model.config
        return config.embedding_dim or config.text_width

    def _batches(self, block: PreparedBlock) -> Iterator[dict[str, torch.Tensor]]:
        tokenizer = self.processor.tokenizer
        padding = {"batch_first": True, "padding_side": tokenizer.padding_side}
        starts = range(0, len(block.places), self.batch_size)
        for first, pictures in zip(starts, block.pictures, strict=True):
            ids = [torch.tensor(of_item) for of_item in block.input_ids[first : first + self.batch_size]]
            counts = block.num_images[first : first + self.batch_size]
            yield {
                **pictures,
                "input_ids": pad_sequence(ids, padding_value=tokenizer.pad_token_id or 0, **padding),
                "attention_mask": pad_sequence([torch.ones_like(of_item) for of_item in ids], **padding),
                "num_images": torch.tensor(counts),
            }

    @torch.inference_mode()
    def _embed_batch(self, batch: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Multimodal and visual embeddings, `(n, d)` float32 both; the latter zeros if not asked for."""
        output = self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()})
        embeddings = output.embeddings.float().cpu().numpy()
        return embeddings, output.visual_embeddings.float().cpu().numpy() if self.visual else np.zeros_like(embeddings)


def items_between(items: ItemTable, start: int, stop: int) -> Iterator[tuple[Place, Item]]:
    """The items of some rows of their table, with their places."""
    positions = items.between(start, stop)
    items.fetch_pictures(positions)
    for position in positions:
        yield Place(items.item_ids[position], *items.place(position)), items[position]


@dataclass(frozen=True)
class Rows:
    """All rows of a table, as an encoding job goes through them: items, and what is left out.

    Attributes:
        items: the usable rows.
        rejects: the others.
        earlier: version from which vectors of unchanged items are taken.
    """

    items: ItemTable
    rejects: Rejects
    earlier: Earlier | None = None

    def __len__(self) -> int:
        return len(self.items.table)

    def prepare(self, encoder: ItemEncoder, number: int, rows: tuple[int, int]) -> PreparedBlock:
        """A block of rows, ready for the model."""
        items = ((replace(place, content=content_hash(item)), item) for place, item in items_between(self.items, *rows))
        return encoder.prepare(number, items, self.rejects.between(*rows), self.earlier)


def _with_open_pictures(item: Item, processor: Any) -> tuple[Item, list[str]]:
    """The item without its id, which rejects name, its readable pictures opened; and why others can't be.

    Raises:
        ItemError: when it has nothing, or pictures of which none can be read.
    """
    content = {name: value for name, value in item.items() if name != "item_id"}
    if not content:
        raise ItemError("neither text nor image")
    pictures, faults = [], []
    for source in image_sources(content.get("image")):
        try:
            pictures.append(open_picture(source, processor))
        except ItemError as error:
            faults.append(_reason(error))
    if faults and not pictures:
        raise ItemError(faults[0])
    return (content | {"image": pictures} if pictures else content), faults


def _pictures_of(prepared: list[Any]) -> dict[str, torch.Tensor]:
    """The model's inputs of all pictures of these items, side by side."""
    with_pictures = [of_item for of_item in prepared if "pixel_values" in of_item]
    return join_pictures(with_pictures) if with_pictures else {}


def _reason(error: Exception) -> str:
    """An error in one line of valid Unicode, the same in every run.

    The processor saw the item as row 0 of a batch, which tells nobody anything; addresses of objects change.
    """
    text = re.sub(r" (object )?at 0x[0-9a-f]+", "", " ".join(str(error).split()).removeprefix("row 0: "))
    text = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
    return text.encode("utf-8", "replace").decode()
