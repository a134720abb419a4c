"""From one opened picture to what a vision encoder takes, by any image processor; and such pictures side by side.

Every picture is processed alone, so that no picture's pixels depend on its neighbours in a batch. What image processors say
beside the pixels (grids, masks, positions) says one thing: how much of a padded row is picture. It travels as
`image_sizes` `(images, k)`, from which `vision_notellm2` makes each encoder's own inputs.
"""

import contextlib
import logging as python_logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor

from .prompts_notellm2 import ItemError
from .towers_notellm2 import MISSING_PACKAGE


VISION_INPUTS = ("pixel_values", "image_sizes")
"""The model's inputs that hold pictures; each has a row for every image of the batch."""

# Options of image processors that cut a picture into several. A Q-Former reads one picture whole.
SPLITTING = ("do_image_splitting", "do_pan_and_scan", "crop_to_patches")
NO_PIXELS = (
    "%s gives %s for a picture; `pixel_values` of one picture, as (channels, height, width) or as patches with their grid, "
    "are expected. Use the image processor of a vision encoder such as CLIP, SigLIP or DINOv2."
)


def one_picture_each(image_processor: Any) -> None:
    """Turns off what cuts pictures into tiles, in place."""
    for name in SPLITTING:
        if getattr(image_processor, name, False):
            setattr(image_processor, name, False)


def keeps_sizes(image_processor: Any) -> bool:
    """Whether pictures of different shapes come out with different sizes or numbers of patches.

    Raises:
        ValueError: for an image processor that gives no pixels of one picture.
    """
    pictures = [Image.new("RGB", size) for size in ((448, 448), (224, 448))]
    square, tall = (picture_pixels(image_processor, picture) for picture in pictures)
    sizes = [part.get("image_sizes", torch.tensor(part["pixel_values"].shape)).tolist() for part in (square, tall)]
    return sizes[0] != sizes[1] and square["pixel_values"].dim() < 5


def picture_pixels(image_processor: Any, image: Image.Image, max_pixels: int | None = None) -> dict[str, torch.Tensor]:
    """What an image processor makes of one RGB picture.

    Args:
        max_pixels: a larger picture is first scaled down to this many pixels; None: it is not.

    Returns:
        `pixel_values` `(1, channels, height, width)`; or `(1, patches, values)`, or `(1, tiles, channels, height, width)`,
        with `image_sizes` `(1, k)` int64: the patches' grid (time, height, width or height, width), or the layout of the
        tiles and their number.

    Raises:
        ItemError: for a picture that the image processor refuses.
        ValueError: for an image processor that gives something else.
    """
    if max_pixels is not None and image.width * image.height > max_pixels:
        scale = (max_pixels / (image.width * image.height)) ** 0.5
        size = (max(int(image.width * scale), 1), max(int(image.height * scale), 1))
        image = image.resize(size, Image.Resampling.BICUBIC)
    name = type(image_processor).__name__
    try:
        given = image_processor(images=[image], return_tensors="pt")
    except Exception as error:
        raise ItemError(f"{name} refuses an image of {image.width} x {image.height} pixels ({error})") from error
    if isinstance(given, torch.Tensor):
        given = {"pixel_values": given}
    pixels = given.get("pixel_values")
    if isinstance(pixels, list) and len(pixels) == 1:  # where pictures differ in size, some give lists
        pixels = torch.as_tensor(pixels[0]).unsqueeze(0)
    if not isinstance(pixels, torch.Tensor):
        raise ValueError(NO_PIXELS % (name, ", ".join(given) or "nothing"))
    for key in ("image_grid_thw", "spatial_shapes"):
        if key in given:
            pixels = pixels if pixels.dim() == 3 else pixels.unsqueeze(0)
            return {"pixel_values": pixels, "image_sizes": given[key].long().reshape(1, -1)}
    if "image_position_ids" in given:  # (x, y) of each patch, row by row; -1 for padding
        counts = given["image_position_ids"].amax(-2).flip(-1) + 1
        return {"pixel_values": pixels[:, : int(counts.prod())], "image_sizes": counts.long()}
    if "aspect_ratio_ids" in given:
        sizes = torch.cat([given["aspect_ratio_ids"], given["aspect_ratio_mask"].sum(-1)], dim=-1)
        return {"pixel_values": pixels[:, 0], "image_sizes": sizes.long()}
    if pixels.dim() == 5 and pixels.shape[1] == 1:
        pixels = pixels[:, 0]
    if pixels.dim() != 4 or len(pixels) != 1:
        raise ValueError(NO_PIXELS % (name, f"pixel_values of shape {tuple(pixels.shape)}"))
    mask = given.get("pixel_mask", given.get("pixel_attention_mask"))
    if isinstance(mask, torch.Tensor) and mask.shape[-2:] == pixels.shape[-2:]:
        held = mask.reshape(mask.shape[-2:]).bool()
        pixels = pixels[:, :, : int(held.any(1).sum()), : int(held.any(0).sum())]
    return {"pixel_values": pixels}


def join_pictures(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pictures of several calls in one batch, in their order.

    Args:
        parts: each with `pixel_values` `(m, ...)` and perhaps `image_sizes` `(m, k)`.

    Returns:
        `pixel_values` `(images, ...)`, padded with zeros behind and below to the largest of each side; `image_sizes`
        `(images, k)` where parts have it or pictures differ in size.
    """
    pixels = [part["pixel_values"] for part in parts]
    shape = [max(sides) for sides in zip(*(values.shape[1:] for values in pixels), strict=True)]
    joined = {"pixel_values": torch.cat([_padded(values, shape) for values in pixels])}
    if any("image_sizes" in part or list(part["pixel_values"].shape[1:]) != shape for part in parts):
        joined["image_sizes"] = torch.cat([_sizes(part) for part in parts])
    return joined


def _padded(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    gaps = [gap for side, most in zip(values.shape[1:], shape, strict=True) for gap in (most - side, 0)]
    return F.pad(values, gaps[::-1]) if any(gaps) else values


def _sizes(part: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """As given, or height and width of pictures that have no padding."""
    pixels = part["pixel_values"]
    return part["image_sizes"] if "image_sizes" in part else torch.tensor([pixels.shape[-2:]] * len(pixels))


def load_image_processor(source: str | os.PathLike) -> Any:
    """An image processor by its id or folder.

    Raises:
        ImportError: naming the package that it needs.
    """
    try:
        with no_backend_notice():
            return AutoImageProcessor.from_pretrained(source)
    except (ImportError, ValueError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and "Missing optional dependencies" not in text:
            raise
        raise ImportError(MISSING_PACKAGE % (source, text)) from error


@contextlib.contextmanager
def no_backend_notice() -> Iterator[None]:
    """Keeps back transformers' notice that torchvision is missing: PIL is as good here, and expected."""

    def other(record: python_logging.LogRecord) -> bool:
        return "backend" not in record.getMessage() and "orchvision" not in record.getMessage()

    names = ("transformers.models.auto.image_processing_auto", "transformers.image_processing_base")
    loggers = [python_logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(other)
