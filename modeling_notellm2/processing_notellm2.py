"""Items to model inputs: prompts by the published rules, safe tokenization of users' texts, pictures to pixels."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin

from .backbones_notellm2 import item_tokens
from .images_notellm2 import image_sources, is_nan, load_image
from .items_notellm2 import as_batch, as_item, naming
from .pixels_notellm2 import (
    join_pictures,
    keeps_sizes,
    load_image_processor,
    no_backend_notice,
    one_picture_each,
    picture_pixels,
)
from .placeholders_notellm2 import native_placeholders
from .prompts_notellm2 import (
    WORDINGS,
    FieldLimits,
    ItemError,
    ItemText,
    Piece,
    Slot,
    build_pieces,
    item_text,
    join_pieces,
    split_slots,
)
from .tokenizing_notellm2 import cut, encode, pad, start_ids


Item = Mapping[str, Any] | str | Image.Image

NATIVE_PIXELS = 512 * 512
"""Pixels of the largest picture for encoders that take pictures of any size; some 1,300 patches of 14 x 14."""


class NoteLLM2Processor(ProcessorMixin):
    r"""
    Turns items into what [`NoteLLM2Model`] takes.

    An item is a dict of `item_id`, `title`, `topics`, `content`, `image` (all optional), a string (its content), or a PIL
    image or path (its picture). What users wrote is always text: `<IMG>` or `<|im_start|>` in a title is tokenized as
    plain characters.

    Args:
        image_processor: any image processor of transformers.
        tokenizer: the LLM's tokenizer; <IMG> and <IMG_EMB> are added to it if it lacks them.
        num_query_tokens (`int`): placeholders for each image; the model's own number.
        micl, early_fusion (`bool`): the model's variant, which decides the prompt.
        prompt_language (`str`): "zh", the published wording, or "en".
        max_title_length, max_content_length, max_topic_length (`int`): limits in characters.
        max_topics (`int`): topics kept of each item.
        max_title_tokens, max_topics_tokens, max_content_tokens (`int`, *optional*): limits in tokens, after the others.
            The frame of the prompt is never cut.
        max_pixels (`int`, *optional*): a larger picture is scaled down to this many pixels before the image processor
            sees it, which bounds the tokens of encoders that take pictures of any size.
        jpeg_side (`int`, *optional*): JPEGs (files and bytes) are decoded at a half, a quarter or an eighth of their size
            where both sides keep at least this many pixels; twice the encoder's picture is enough. Left out: always whole.
        native_image_token_id, patches_per_token (`int`, *optional*), image_prefix_ids, image_suffix_ids (`list[int]`,
            *optional*): of a native connector: its own placeholder in place of <IMG>; patches of a picture that become one
            token (left out: each picture has `num_query_tokens`); and the ids around a picture's placeholders.

    Example:

    ```python
    >>> from transformers import AutoProcessor

    >>> processor = AutoProcessor.from_pretrained("runs/demo/model", trust_remote_code=True)
    >>> inputs = processor([{"title": "red panda", "image": "panda.png"}, "a text alone"], return_tensors="pt")
    ```
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        num_query_tokens: int = 16,
        micl: bool = True,
        early_fusion: bool = True,
        prompt_language: str = "zh",
        max_title_length: int = 20,
        max_content_length: int = 80,
        max_topics: int = 10,
        max_topic_length: int = 16,
        max_title_tokens: int | None = None,
        max_topics_tokens: int | None = None,
        max_content_tokens: int | None = None,
        max_pixels: int | None = None,
        jpeg_side: int | None = None,
        native_image_token_id: int | None = None,
        patches_per_token: int | None = None,
        image_prefix_ids: list[int] | None = None,
        image_suffix_ids: list[int] | None = None,
        chat_template: str | None = None,
    ):
        if prompt_language not in WORDINGS:
            raise ValueError(f"prompt_language is {prompt_language!r}; expected one of {', '.join(WORDINGS)}.")
        if jpeg_side is not None and jpeg_side < 1:
            raise ValueError(f"jpeg_side is {jpeg_side}; expected at least 1, or None for whole pictures.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.num_query_tokens = num_query_tokens
        self.micl = micl
        self.early_fusion = early_fusion
        self.prompt_language = prompt_language
        self.max_title_length = max_title_length
        self.max_content_length = max_content_length
        self.max_topics = max_topics
        self.max_topic_length = max_topic_length
        self.max_title_tokens = max_title_tokens
        self.max_topics_tokens = max_topics_tokens
        self.max_content_tokens = max_content_tokens
        self.max_pixels = max_pixels
        self.jpeg_side = jpeg_side
        self.native_image_token_id = native_image_token_id
        self.patches_per_token = patches_per_token
        self.image_prefix_ids = image_prefix_ids
        self.image_suffix_ids = image_suffix_ids
        self._item_tokens = item_tokens(tokenizer, native_image_token_id)
        self._start_ids = start_ids(tokenizer)  # once: so that no thread changes how another one's texts are read

    @classmethod
    def from_vision_text_pretrained(
        cls, image_processor: Any, tokenizer: Any, model: Any = None, **settings: Any
    ) -> "NoteLLM2Processor":
        """A processor for a model joined by [`NoteLLM2Model.from_vision_text_pretrained`].

        Args:
            image_processor, tokenizer: ready objects, or the ids or folders that the model's halves came from.
            model: its variant and number of query tokens are taken over, and it is prepared (see `prepare_model`).
            settings: of this class. `max_pixels` starts at 512 * 512 where the image processor keeps pictures' sizes.

        Raises:
            ValueError: for an image processor that gives no `pixel_values` of one picture.
            ImportError: naming the package that the image processor needs.
        """
        source = image_processor if isinstance(image_processor, (str, os.PathLike)) else None
        if source is not None:
            image_processor = load_image_processor(image_processor)
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        one_picture_each(image_processor)
        if model is not None:
            if model.config.connector == "native":
                settings = native_placeholders(source, image_processor, tokenizer, model) | settings
                model.config.num_query_tokens = settings["num_query_tokens"]
            names = ("num_query_tokens", "micl", "early_fusion")
            settings = {**{name: getattr(model.config, name) for name in names}, **settings}
        if keeps_sizes(image_processor):
            settings = {"max_pixels": NATIVE_PIXELS, **settings}
        processor = cls(image_processor, tokenizer, **settings)
        if model is not None:
            processor.prepare_model(model)
        return processor

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "NoteLLM2Processor":
        """As for any processor; that pictures go through PIL is no news."""
        with no_backend_notice():
            return super().from_pretrained(*args, **kwargs)

    def prepare_model(self, model: Any) -> None:
        """Gives a freshly joined model the ids of <IMG> and <IMG_EMB> and embedding rows; once, before training.

        The tokenizer takes over the side of padding that the model's LLM needs, where it needs one.
        """
        ids = (self.image_token_id, self.visual_embedding_token_id)
        if ids != (model.config.image_token_id, model.config.visual_embedding_token_id):
            model.set_item_tokens(self._item_tokens)
        if model.config.padding_side is not None:
            self.tokenizer.padding_side = model.config.padding_side

    @property
    def image_token_id(self) -> int:
        """Id of <IMG>, which stands `num_query_tokens` times for each image."""
        return self._item_tokens.image_id

    @property
    def visual_embedding_token_id(self) -> int:
        """Id of <IMG_EMB>; the visual embedding is read before it."""
        return self._item_tokens.visual_embedding_id

    @property
    def limits(self) -> FieldLimits:
        """The limits on an item's fields, together."""
        return FieldLimits(**{field.name: getattr(self, field.name) for field in fields(FieldLimits)})

    @property
    def prompt_mode(self) -> str:
        """The prompt of an item with an image: "micl", "basic" or "late_only"."""
        return ("micl" if self.micl else "basic") if self.early_fusion else "late_only"

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "num_images", "pixel_values", "image_sizes"]

    def build_prompt(self, item: Item) -> str:
        """The prompt of one item as text, each image as one <IMG>. For people: the model is fed from `__call__`."""
        return join_pieces(self._pieces(as_item(item)))

    def __call__(
        self,
        items: Item | Sequence[Item] | None = None,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        process_images: bool = True,
        image_tokens: Sequence[int] | None = None,
        prefix: str | None = None,
        return_tensors: str | None = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> BatchFeature:
        """
        Args:
            items: one item or a list of items.
            images, text: instead of items, ready prompts in which <IMG> and <IMG_EMB> do stand for slots, and the images
                in order (or a list of lists, one for each prompt).
            process_images (`bool`): False leaves out `pixel_values` and opens no image; the slots stay. For features
                computed before. Where a native connector gives pictures of different sizes different numbers of tokens,
                they are opened to be counted, unless `image_tokens` says how many.
            image_tokens (*optional*): placeholders of each image, in order.
            prefix (`str`, *optional*): an instruction put before the prompt of each item. Always text: it can't hold slots.
            return_tensors (`str`, *optional*): "pt" or "np"; lists if left out.
            padding, padding_side, max_length, pad_to_multiple_of: as for tokenizers. `max_length` pads, never cuts.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` `(n, length)` int64, `num_images` `(n,)` int64 and,
            if there is any image, `pixel_values` `(images, channels, height, width)`. Of no item, empty ones.

        Raises:
            ItemError: for an item that can't be used, naming its row and item_id.
            ValueError: if ready prompts and images don't match.
        """
        if (items is None) == (text is None):
            raise ValueError("Pass either items, or text= (with images= where its prompts have <IMG>).")
        if items is not None:
            if images is not None:
                raise ValueError("images= goes with text=; an item has its own `image`.")
            rows, sources = self._read_items(items)
        else:
            rows, sources = self._read_prompts(text, images)
        if prefix:
            rows = [[prefix, *row] for row in rows]
        pictures: list[dict[str, torch.Tensor]] = []
        if process_images or (self.patches_per_token and image_tokens is None):
            pictures = self._pictures(sources)
        if image_tokens is None:
            slots = sum(row.count(Slot.IMAGE) for row in rows)
            image_tokens = [self.count_tokens(part) for part in pictures] or [self.num_query_tokens] * slots
        data: dict[str, Any] = self._tokenize(rows, image_tokens, padding, padding_side, max_length, pad_to_multiple_of)
        data["num_images"] = [len(of_row) for of_row, _ in sources]
        if return_tensors is not None and not rows:  # empty lists would become floats
            data = {"num_images": np.zeros(0, np.int64)} | {
                name: np.zeros((0, 0), np.int64) for name in ("input_ids", "attention_mask")
            }
        if process_images and pictures:
            data |= join_pictures(pictures)
        return BatchFeature(data, tensor_type=return_tensors)

    def _read_items(self, items: Any) -> tuple[list[list[Piece]], list[tuple[list[Any], str]]]:
        """Pieces of each item, and its image sources with the words that name the item in errors."""
        batch = as_batch(items)
        rows, sources = [], []
        for number, raw in enumerate(batch):
            item_id = raw.get("item_id") if isinstance(raw, Mapping) else None
            where = f"row {number}" + ("" if item_id is None else f" (item_id {item_id!r:.80})")
            with naming(where):
                item = as_item(raw)
                rows.append(self._pieces(item))
                if is_nan(item.get("image")) and self.item_text(item) == ItemText("", "", ""):
                    raise ItemError("its image is NaN and it has no text: nothing to embed")
            sources.append((image_sources(item.get("image")), where))
        return rows, sources

    def _read_prompts(self, text: Any, images: Any) -> tuple[list[list[Piece]], list[tuple[list[Any], str]]]:
        """Ready prompts, and the images dealt out to them by their slots."""
        prompts = [text] if isinstance(text, str) else list(text)
        rows = [split_slots(prompt) for prompt in prompts]
        given = image_sources(images)
        if any(isinstance(of_row, (list, tuple)) for of_row in given):
            if len(given) != len(rows):
                raise ValueError(f"{len(given)} lists of images for {len(rows)} prompts; pass one list for each.")
            dealt = [image_sources(of_row) for of_row in given]
        elif not self.early_fusion:
            if given and len(given) != len(rows):
                raise ValueError(f"{len(given)} images for {len(rows)} prompts; pass one each, or a list of lists.")
            dealt = [[image] for image in given] or [[] for _ in rows]
        else:
            rest = iter(given)
            dealt = [[image for _ in range(row.count(Slot.IMAGE)) for image in _next(rest)] for row in rows]
            if len(given) != sum(row.count(Slot.IMAGE) for row in rows):
                slots = [row.count(Slot.IMAGE) for row in rows]
                raise ValueError(f"{len(given)} images for prompts with {slots} <IMG> slots; their numbers must agree.")
        for number, (row, of_row) in enumerate(zip(rows, dealt, strict=True)):
            if self.early_fusion and row.count(Slot.IMAGE) != len(of_row):
                raise ValueError(f"row {number}: {row.count(Slot.IMAGE)} <IMG> slots but {len(of_row)} images.")
        return rows, [(of_row, f"row {number}") for number, of_row in enumerate(dealt)]

    def item_text(self, item: Mapping[str, Any]) -> ItemText:
        """Title, topics and content of an item as they stand in its prompt: cleaned and cut."""
        return item_text(item, WORDINGS[self.prompt_language], self.limits, partial(cut, self.tokenizer))

    def _pieces(self, item: Mapping[str, Any]) -> list[Piece]:
        images = len(image_sources(item.get("image")))
        return build_pieces(self.item_text(item), images, self.prompt_mode, WORDINGS[self.prompt_language])

    def _tokenize(
        self,
        rows: list[list[Piece]],
        image_tokens: Sequence[int],
        padding: bool | str,
        padding_side: str | None,
        max_length: int | None,
        pad_to_multiple_of: int | None,
    ) -> dict[str, list[list[int]]]:
        """Ids of each row. Texts between slots are tokenized apart, so that only slots give slots' ids."""
        texts = [piece for row in rows for piece in row if isinstance(piece, str)]
        encoded = iter(encode(self.tokenizer, texts)["input_ids"] if texts else [])
        prefix, suffix = self.image_prefix_ids or [], self.image_suffix_ids or []
        images = iter([*prefix, *[self.image_token_id] * count, *suffix] for count in image_tokens)
        reserved = {self.image_token_id, self.visual_embedding_token_id}
        input_ids = []
        for number, row in enumerate(rows):
            ids = list(self._start_ids)
            for piece in row:
                if piece is Slot.IMAGE:
                    ids.extend(next(images))
                    continue
                part = [self.visual_embedding_token_id] if isinstance(piece, Slot) else next(encoded)
                if isinstance(piece, str) and not reserved.isdisjoint(part):
                    raise ItemError(
                        f"row {number}: {type(self.tokenizer).__name__} turns the text {piece[:60]!r} into the id of <IMG> or "
                        "<IMG_EMB>; use a tokenizer that honours split_special_tokens."
                    )
                ids.extend(part)
            input_ids.append(ids)
        return pad(self.tokenizer, input_ids, padding, padding_side, max_length, pad_to_multiple_of)

    def process_images(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """What the model takes of opened pictures (`images_notellm2.load_image`), each processed alone.

        Returns:
            `pixel_values` and, where the pictures' sizes or patches differ, `image_sizes`; see `__call__`.

        Raises:
            ItemError: for a picture that the image processor refuses.
            ValueError: for an image processor that gives no pixels.
        """
        return join_pictures([picture_pixels(self.image_processor, image, self.max_pixels) for image in images])

    def count_tokens(self, picture: Mapping[str, torch.Tensor]) -> int:
        """Placeholders of one processed picture (`process_images`)."""
        if self.patches_per_token is None:
            return self.num_query_tokens
        return int(picture["image_sizes"].prod()) // self.patches_per_token

    def _pictures(self, sources: list[tuple[list[Any], str]]) -> list[dict[str, torch.Tensor]]:
        """Each picture of the batch, of which one is open at a time."""
        pictures: list[dict[str, torch.Tensor]] = []
        for of_row, where in sources:
            with naming(where):
                pictures.extend(self.process_images([load_image(source, self.jpeg_side)]) for source in of_row)
        return pictures


def _next(iterator: Iterator[Any]) -> list[Any]:
    return [image for image in [next(iterator, None)] if image is not None]


__all__ = ["NoteLLM2Processor", "as_item"]
