"""Opening an item's pictures, in whatever form a catalogue holds them, as upright RGB images. Needs PIL alone."""

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .prompts_notellm2 import ItemError


def image_sources(image: Any) -> list[Any]:
    """The pictures of one item as a list: none for None, several for a list or tuple (None in it is skipped)."""
    if isinstance(image, (list, tuple)):
        return [source for source in image if not _is_absent(source)]
    return [] if _is_absent(image) else [image]


def load_image(source: Any) -> Image.Image:
    """Opens one picture: EXIF rotation applied, any mode to RGB, transparency onto white.

    Args:
        source: PIL image, path, encoded bytes, `datasets`' `{"bytes", "path"}` dict, or a numpy array `(h, w)`,
            `(h, w, c)` or `(c, h, w)` of uint8, of floats in 0..1, or of 16-bit integers.

    Raises:
        ItemError: for a source that is missing, unreadable, truncated or of another kind.
    """
    try:
        image = _open(source)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except ItemError:
        raise
    except FileNotFoundError as error:
        raise ItemError(f"image file {error.filename} does not exist") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ItemError(f"image can't be read ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB: transparency is laid onto white, 16-bit and float grey values are scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = 1.0 if values.max(initial=0) <= 1 else 255.0 if values.max() <= 255 else 65535.0
        return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _is_absent(source: Any) -> bool:
    if source is None or (isinstance(source, float) and np.isnan(source)) or (isinstance(source, str) and not source):
        return True
    return isinstance(source, Mapping) and not source.get("bytes") and not source.get("path")


def _open(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(source))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ItemError(f"image {source[:80]} is a web address; download it and pass the file or its bytes")
    if isinstance(source, (str, os.PathLike)):
        return Image.open(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    raise ItemError(
        f"image is a {type(source).__name__}; expected a PIL image, path, bytes, a dict of bytes/path, or a numpy array"
    )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ItemError(
            f"image array has shape {array.shape}; expected (h, w), (h, w, c) or (c, h, w) with 1, 3 or 4 c"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ItemError("image array of floats must have values from 0 to 1 (for 0 to 255 use dtype uint8)")
        array = (array * 255).round()
    elif array.dtype == np.uint16:
        array = array >> 8
    elif array.min() < 0 or array.max() > 255:
        raise ItemError("image array of integers must have values from 0 to 255")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
