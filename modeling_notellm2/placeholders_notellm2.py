"""How a picture stands in the ids of a native connector: as many placeholders as the merger gives tokens, between what the
checkpoint's own processor puts around them.

Nothing of it is known by a family's name. The count is what the model gives for pictures of two shapes; the frame is what
the checkpoint's processor writes for one picture.
"""

from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import logging

from .native_notellm2 import INSTEAD, tokens_of_each
from .pixels_notellm2 import one_picture_each, picture_pixels
from .tokenizing_notellm2 import end_ids, start_ids


logger = logging.get_logger(__name__)

SHAPES = ((448, 448), (224, 448), (448, 336))
"""Width and height of the pictures that are counted."""

# Tokens before and behind a picture: by their names in a config, where a chat template puts them, and in a tokenizer.
OF_CONFIG = (("vision_start_token_id", "vision_end_token_id"), ("image_start_token_id", "image_end_token_id"))
OF_TOKENIZER = (
    (("start_image_token",), ("end_image_token",)),
    (("boi_token",), ("eoi_token",)),
    (("fake_image_token", "global_image_token"), ("fake_image_token",)),
)


def native_placeholders(source: Any, image_processor: Any, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Settings of a processor for a model with a native connector.

    Args:
        source: id or folder of the checkpoint, for its own processor. Without it, or where that needs a package that is
            missing, config and tokenizer say what stands around a picture.
        image_processor: as it will be used.
        model: a [`NoteLLM2Model`] with `connector: native`.

    Returns:
        `num_query_tokens`, `patches_per_token`, `image_prefix_ids`, `image_suffix_ids`, `native_image_token_id`.

    Raises:
        ValueError: if the number of tokens doesn't follow from a picture's size, or the processor writes another number.
    """
    image_token_id = model.config.native_image_token_id
    settings = {"native_image_token_id": image_token_id, **_count(image_processor, model)}
    ids = None if source is None else _own_ids(source, tokenizer, image_token_id)
    prefix, suffix = _frame(ids, image_token_id, str(source)) if ids else ([], [])
    if not prefix and not suffix:
        prefix, suffix = _named_frame(model.config.text_config, tokenizer)
    return settings | {"image_prefix_ids": prefix, "image_suffix_ids": suffix}


def _frame(ids: list[int], image_token_id: int, source: str) -> tuple[list[int], list[int]]:
    """What stands before and behind a picture's placeholders, which stand in one row."""
    places = [at for at, token in enumerate(ids) if token == image_token_id]
    if places != list(range(places[0], places[-1] + 1)):
        raise ValueError(f"the processor of {source} puts other tokens between those of a picture. {INSTEAD}")
    return ids[: places[0]], ids[places[-1] + 1 :]


def _count(image_processor: Any, model: Any) -> dict[str, int | None]:
    """Visual tokens of a picture: one number, or patches for each token; `num_query_tokens` is then that of a square one."""
    name = type(model.language_model).__name__
    pictures = [picture_pixels(image_processor, Image.new("RGB", shape, "gray")) for shape in SHAPES]
    counts: list[int] = []
    patches: list[int] = []
    for picture in pictures:
        inputs = {key: values.to(model.device) for key, values in picture.items()}
        with torch.no_grad():
            counts.append(int(tokens_of_each(model.get_vision_features(**inputs))[0]))
        patches += [int(picture["image_sizes"].prod())] if "image_sizes" in picture else []
    if len(patches) < len(counts):
        if len(set(counts)) > 1:
            raise ValueError(
                f"{name} gives {counts} tokens for pictures that its image processor gives no grid of. {INSTEAD}"
            )
        return {"num_query_tokens": counts[0], "patches_per_token": None}
    shares = {held / count for held, count in zip(patches, counts, strict=True)}
    if len(shares) > 1 or not (share := shares.pop()).is_integer():
        raise ValueError(f"{name} gives {counts} tokens for {patches} patches, not one for as many each. {INSTEAD}")
    return {"num_query_tokens": counts[0], "patches_per_token": int(share)}


def _own_ids(source: Any, tokenizer: Any, image_token_id: int) -> list[int] | None:
    """What the checkpoint's own processor writes for a picture alone; None if there is none that can be asked."""
    try:
        processor = AutoProcessor.from_pretrained(source)
        image_processor = processor.image_processor
    except (OSError, ValueError, ImportError, AttributeError) as error:
        logger.warning("%s has no processor that can be asked what stands around a picture (%s).", source, error)
        return None
    one_picture_each(image_processor)
    reasons = []
    for mark in filter(None, (getattr(processor, name, None) for name in ("image_token", "boi_token"))):
        try:
            ids = processor(text=[mark], images=[[Image.new("RGB", SHAPES[0], "gray")]])["input_ids"][0]
        except Exception as error:  # a family's own, of any kind, for a mark that is not what it replaces
            reasons.append(f"{mark}: {error}")
            continue
        ids = [int(token) for token in ids]
        if image_token_id in ids:
            start, end = start_ids(tokenizer), end_ids(tokenizer)
            ids = ids[len(start) :] if ids[: len(start)] == start else ids
            return ids[: -len(end)] if end and ids[-len(end) :] == end else ids
    logger.warning("The processor of %s doesn't say what stands around a picture (%s).", source, "; ".join(reasons))
    return None


def _named_frame(config: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The same by the names of tokens; empty where none are named."""
    for start, end in OF_CONFIG:
        if getattr(config, start, None) is not None and getattr(config, end, None) is not None:
            return [getattr(config, start)], [getattr(config, end)]
    for before, behind in OF_TOKENIZER:
        if all(getattr(tokenizer, name, None) for name in (*before, *behind)):
            sides = ([getattr(tokenizer, name) for name in names] for names in (before, behind))
            prefix, suffix = (tokenizer.convert_tokens_to_ids(tokens) for tokens in sides)
            return prefix, suffix
    return [], []
