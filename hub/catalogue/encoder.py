"""From rows of an item table to embeddings: the one encoder that every way of running a catalogue job uses.

Its two halves need different machines: `prepare` reads texts and opens pictures on CPUs, `embed` runs the model. Between
them goes a `PreparedBlock`. A row that can't be used becomes a `Reject`, and its neighbours never notice.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoProcessor

from modeling_notellm2 import ItemError
from modeling_notellm2.images_notellm2 import image_sources, load_image
from modeling_notellm2.pixels_notellm2 import join_pictures
from training.tables.commands.model_folder import loading
from training.tables.items import Item, ItemTable
from training.tables.rejects import Reject, Rejects


@dataclass(frozen=True)
class Place:
    """Where an item stands: its id, the file (or split) of its table, and the row in it, from 0."""

    item_id: str
    file: str
    row: int

    def rejected(self, reason: str) -> Reject:
        """The item, or a picture of it, as left out."""
        return Reject(self.file, self.row, [self.item_id], reason, self.file)


@dataclass(frozen=True)
class PreparedBlock:
    """Usable items of a block of rows, ready for the model, in the order in which they are batched.

    Attributes:
        number: of the block in the table.
        places: n items, in batch order.
        order: position of each of them among the items in table order.
        input_ids: token ids of each, unpadded.
        num_images: of each.
        pictures: what the model takes of the pictures of each batch, in their order; empty for a batch without any.
        rejects: rows left out so far.
    """

    number: int
    places: list[Place]
    order: list[int]
    input_ids: list[list[int]]
    num_images: list[int]
    pictures: list[dict[str, torch.Tensor]]
    rejects: list[Reject]


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
    """

    number: int
    item_ids: list[str]
    embeddings: np.ndarray
    visual_embeddings: np.ndarray | None
    has_image: np.ndarray
    rejects: list[Reject]


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
        self, number: int, items: Iterable[tuple[Place, Item]], known_rejects: Sequence[Reject] = ()
    ) -> PreparedBlock:
        """Texts to token ids, pictures to pixels, and similar items side by side so that batches have little padding.

        Each item goes through the processor alone: an unreadable picture spoils nothing else, and no more than one
        item's pictures are open at their full size. An item goes on with those of its pictures that can be read; one that
        has pictures, and none that can be read, is left out.

        Args:
            number: of the block in the table.
            items: usable items, in table order.
            known_rejects: rows among them that were left out before.
        """
        places, prepared = [], []
        new_rejects: list[Reject] = []
        for place, item in items:
            try:
                opened, faults = _with_open_pictures(item)
                new_rejects += map(place.rejected, faults)
                prepared.append(self.processor(opened, padding=False))
                places.append(place)
            except Exception as error:  # whatever it is, it is listed
                new_rejects.append(place.rejected(_reason(error)))
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
            order,
            [prepared[at]["input_ids"][0] for at in order],
            [prepared[at]["num_images"][0] for at in order],
            [_pictures_of([prepared[at] for at in batch]) for batch in batches],
            rejects,
        )

    def embed(self, block: PreparedBlock) -> EncodedBlock:
        """Runs the model over the block's batches and puts the items back in table order."""
        embeddings, visual = (np.zeros((len(block.places), self.width), np.float32) for _ in range(2))
        first = 0
        for batch in self._batches(block):
            places_now = block.order[first : first + len(batch["input_ids"])]
            embeddings[places_now], visual[places_now] = self._embed_batch(batch)
            first += len(places_now)
        back = np.argsort(block.order)
        finite = np.isfinite(np.concatenate([embeddings, visual], axis=1)).all(axis=1).reshape(-1)
        places = [block.places[at] for at in back]
        lost = [
            place.rejected(f"the model's embedding is not finite in {self.dtype}")
            for place, is_finite in zip(places, finite, strict=True)
            if not is_finite
        ]
        return EncodedBlock(
            block.number,
            [place.item_id for place, is_finite in zip(places, finite, strict=True) if is_finite],
            embeddings[finite],
            visual[finite] if self.visual else None,
            np.array(block.num_images, dtype=np.int64)[back][finite] > 0,
            [*block.rejects, *lost],
        )

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
    for position in items.between(start, stop):
        yield Place(items.item_ids[position], *items.place(position)), items[position]


@dataclass(frozen=True)
class Rows:
    """All rows of a table, as an encoding job goes through them: items, and what is left out.

    Attributes:
        items: the usable rows.
        rejects: the others.
    """

    items: ItemTable
    rejects: Rejects

    def __len__(self) -> int:
        return len(self.items.table)

    def prepare(self, encoder: ItemEncoder, number: int, rows: tuple[int, int]) -> PreparedBlock:
        """A block of rows, ready for the model."""
        return encoder.prepare(number, items_between(self.items, *rows), self.rejects.between(*rows))


def _with_open_pictures(item: Item) -> tuple[Item, list[str]]:
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
            pictures.append(load_image(source))
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
