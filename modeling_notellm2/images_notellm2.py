"""Opening an item's pictures, in whatever form a catalogue holds them, as upright RGB images. Needs PIL alone.

A picture comes from a stranger: it is a regular file or bytes, has a bounded number of pixels and a bounded aspect
ratio, and whatever its decoder raises is an `ItemError`.
"""

import io
import os
import re
import stat
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .prompts_notellm2 import ItemError
from .texts_notellm2 import is_missing


MAX_PIXELS = 178_956_970
"""Pixels of the largest picture that is opened: PIL's own limit, also where a program has lifted that one."""

MAX_ASPECT = 20
"""Longest to shortest side. Image processors scale the shortest side up; one of a single pixel would cost gigabytes."""

OVERSHOOT = 0.25
"""How far beyond their range float pixels may lie, as parts of it: interpolation leaves such, and they are clipped."""


def image_sources(image: Any) -> list[Any]:
    """The pictures of one item as a list: none for None, several for a list or tuple (None in it is skipped)."""
    if isinstance(image, (list, tuple)):
        return [source for source in image if not _is_absent(source)]
    return [] if _is_absent(image) else [image]


def is_nan(image: Any) -> bool:
    """Whether an item's image is the NaN, NaT or NA with which data frames fill a gap, or a list of nothing but such."""
    if isinstance(image, (list, tuple)):
        return bool(image) and all(map(is_nan, image))
    return image is not None and not isinstance(image, Image.Image) and is_missing(image)


def load_image(source: Any, jpeg_side: int | None = None) -> Image.Image:
    """Opens one picture: EXIF rotation applied, any mode to RGB, transparency onto white.

    Of a picture longer than 20 times its shortest side the middle is taken.

    Args:
        source: PIL image, path of a regular file, encoded bytes, `datasets`' `{"bytes", "path"}` dict, or a numpy array
            `(h, w)`, `(h, w, c)` or `(c, h, w)` with 1, 3 or 4 channels: bool (False is black, True white), integers
            from 0 to 255, uint16 from 0 to 65535, or floats from 0 to 1. Float pixels up to a quarter of the range
            beyond it are clipped.
        jpeg_side: an encoded JPEG is decoded at a half, a quarter or an eighth of its size where both sides keep at least
            this many pixels, which a decoder does several times as fast; None: always whole.

    Raises:
        ItemError: for a source that is missing, unreadable, truncated, too large or of another kind, or has NaN pixels.
    """
    try:
        image = _open(source)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ItemError(f"image has {width} x {height} pixels; at most {MAX_PIXELS:,} in all are read")
        if not width * height:
            raise ItemError(f"image has {width} x {height} pixels, which is none")
        if jpeg_side is not None and image is not source:
            image.draft(None, (jpeg_side, jpeg_side))  # JPEG's decoder alone can
        image.load()
        return to_rgb(ImageOps.exif_transpose(_middle(image)))
    except ItemError:
        raise
    except FileNotFoundError as error:
        raise ItemError(f"image file {str(error.filename)[:300]} does not exist") from error
    except Exception as error:  # decoders raise errors of every kind for bytes that they don't understand
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ItemError(f"image can't be read ({kind}{without_addresses(error)[:300]})") from error


def without_addresses(error: Exception) -> str:
    """An error's text without what differs from run to run: PIL names bytes by where they lie in memory."""
    return re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", str(error))


def check_regular_file(path: str | os.PathLike) -> None:
    """Refuses what isn't a regular file: a FIFO or a device would be read for ever.

    Raises:
        ItemError: for a folder, FIFO, socket or device.
        OSError: for a path that leads nowhere.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ItemError(f"image {os.fspath(path)!r} is not a regular file")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB: transparency is laid onto white, 16-bit and float grey values are scaled to 8 bits.

    Mode I holds 0 to 255, or 0 to 65535 where a value exceeds 255; I;16 always the latter. Mode F holds 0 to 1, 0 to 255
    or 0 to 65535: the first range that its largest value exceeds by no more than a quarter.

    Raises:
        ItemError: for pixels that are NaN or in none of these ranges.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "I":
        values = np.asarray(image)
        tops = (255,) if values.max() <= 255 else (65535,)
        return Image.fromarray(_scaled(values, tops, overshoot=0)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_scaled(np.asarray(image), (1, 255, 65535))).convert("RGB")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _middle(image: Image.Image) -> Image.Image:
    """A picture's middle, no longer than `MAX_ASPECT` times its shortest side, as a centre crop would take it."""
    width, height = image.size
    new_width, new_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    if (new_width, new_height) == (width, height):
        return image
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


def _is_absent(source: Any) -> bool:
    if source is None or is_nan(source) or (isinstance(source, str) and not source.strip()):
        return True
    return isinstance(source, Mapping) and not _is_foreign(source) and not _held(source)


def _is_foreign(source: Mapping[str, Any]) -> bool:
    """Whether a dict has entries, and neither of those that hold a picture."""
    return bool(source) and source.keys().isdisjoint({"bytes", "path"})


def _held(source: Mapping[str, Any]) -> bool:
    return source.get("bytes") is not None or bool(source.get("path"))


def _open(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Mapping):
        if _is_foreign(source):
            raise ItemError(f"image is a dict of {', '.join(map(str, source))[:80]}; expected one of bytes and path")
        if not isinstance(source.get("bytes"), (bytes, bytearray, memoryview, NoneType)):
            raise ItemError(f"image has bytes that are a {type(source['bytes']).__name__}")
        source = source.get("bytes") or source.get("path") or b""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(source))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ItemError(f"image {source[:80]} is a web address; download it and pass the file or its bytes")
    if isinstance(source, (str, os.PathLike)):
        check_regular_file(source)
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
    if array.dtype.kind == "b":
        array = array * np.uint8(255)
    elif array.dtype.kind == "f":
        array = _scaled(array, (1,))
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype.kind not in "iu":
        raise ItemError(f"image array has dtype {array.dtype}; expected bool, integers or floats")
    elif array.min() < 0 or array.max() > 255:
        raise ItemError("image array of integers must have values from 0 to 255 (or dtype uint16, 0 to 65535)")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


def _scaled(values: np.ndarray, tops: Sequence[int], overshoot: float = OVERSHOOT) -> np.ndarray:
    """Values of the first range 0 to `top` that holds them, scaled to 0 to 255 and rounded: uint8."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low + high):
        raise ItemError("image has pixels that are NaN or infinite")
    top = next((top for top in tops if high <= top * (1 + overshoot)), tops[-1])
    if low < -top * overshoot or high > top * (1 + overshoot):
        ranges = " or ".join(f"0 to {top}" for top in tops)
        hint = "; for 0 to 255 use dtype uint8" if tops == (1,) else ""
        raise ItemError(f"image has values from {low:g} to {high:g}; expected {ranges}{hint}")
    scaled = np.clip(values, 0, top).astype(np.float64 if values.dtype == np.float64 else np.float32)
    return (scaled * (255 / top)).round().astype(np.uint8)
