"""Opening an item table's images in worker processes, and telling contents apart by hash.

A hash is of what an item holds, never of where: the same picture under two names is one, and a picture replaced under
its name is another.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from modeling_notellm2.images_notellm2 import (
    MAX_PIXELS,
    check_regular_file,
    image_sources,
    load_image,
    without_addresses,
)
from modeling_notellm2.prompts_notellm2 import ItemError
from training.tables.remote.pictures import fetch_pictures_of
from training.tables.remote.places import is_web


KEY_BYTES = 16
PER_TASK = 64
"""Items that a worker handles before it answers."""

Item = dict[str, Any]


class _Applied:
    def __init__(self, items: Sequence[Item], function: Callable[[Item], Any]):
        self.items, self.function = items, function

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Any:
        return self.function(self.items[position])

    def __getitems__(self, positions: list[int]) -> list[Any]:
        """Neighbouring rows, which a table reads at once."""
        items = self.items[positions[0] : positions[-1] + 1]
        fetch_pictures_of(items)
        return [self.function(item) for item in items]


def map_items(items: Sequence[Item], function: Callable[[Item], Any], num_workers: int, name: str) -> Iterator[Any]:
    """`function` of every item, in order, computed by `num_workers` processes under a progress bar.

    A table too small to give each of them something to do is computed in this process.
    """
    from torch.utils.data import DataLoader  # not above: who opens no pictures needs no torch

    workers = num_workers if len(items) > num_workers * PER_TASK else 0
    applied: Any = _Applied(items, function)
    loader = DataLoader(applied, batch_size=PER_TASK, num_workers=workers, collate_fn=list)
    with tqdm(desc=name, total=len(items), unit="item") as progress:
        for results in loader:
            yield from results
            progress.update(len(results))


def picture_faults(items: Sequence[Item], num_workers: int = 0) -> Iterator[tuple[int, list[str | None]]]:
    """Position of every item with a picture that can't be read, and for each of its pictures why it can't, or None."""
    for position, faults in enumerate(map_items(items, faults_of_pictures, num_workers, "Opening images")):
        if any(fault is not None for fault in faults):
            yield position, faults


def faults_of_pictures(item: Item) -> list[str | None]:
    """Why each of an item's pictures can't be read; None for one that can."""
    return [_fault(source) for source in image_sources(item.get("image"))]


def _fault(source: Any) -> str | None:
    try:
        encoded = read_encoded(source)
        if isinstance(encoded, bytes):
            with Image.open(io.BytesIO(encoded)) as opened:
                if 0 < opened.width * opened.height <= MAX_PIXELS:
                    opened.draft("RGB", (64, 64))  # JPEG at low resolution: cheap, and still reads the whole file
                load_image(opened)  # to RGB too: pixels may be NaN or in no known range
        else:
            load_image(encoded)
    except Exception as error:  # decoders raise errors of every kind
        return without_addresses(error) or type(error).__name__
    return None


def open_picture(source: Any, processor: Any) -> Image.Image:
    """A picture as a model's processor opens it: JPEGs no larger than it asks for, if it asks.

    Raises:
        ItemError: for a source that is no picture.
    """
    return load_image(source, getattr(processor, "jpeg_side", None))  # a folder's own processor may be older


def first_picture(item: Mapping[str, Any]) -> Image.Image | None:
    """The first of an item's pictures that can be read, to be shown; None without one. Rejects list the others."""
    for source in image_sources(item.get("image")):
        with suppress(ItemError):
            return load_image(source)
    return None


def image_hash(item: Item) -> int:
    """A hash in 0 .. 2^63 - 1 of an item's images in their order, or -1."""
    try:
        keys = [content_key(read_encoded(source)) for source in image_sources(item.get("image"))]
    except ItemError:
        return -1
    if not keys:
        return -1
    return int.from_bytes(blake2b(b"".join(keys), digest_size=8).digest(), "big") >> 1


def read_encoded(source: Any) -> Any:
    """A picture's encoded bytes where it is a file; otherwise what it is.

    Raises:
        ItemError: when the file can't be read.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if not isinstance(source, (str, os.PathLike)) or (isinstance(source, str) and is_web(source)):
        return source
    try:
        check_regular_file(source)
        return Path(source).read_bytes()
    except ItemError:
        raise
    except (OSError, ValueError) as error:
        raise ItemError(f"image can't be read ({error})") from error


def content_key(source: Any) -> bytes:
    """16 bytes that only this picture has: of its encoded bytes, or of an open picture's pixels.

    Raises:
        ItemError: for what is no picture.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return blake2b(source, digest_size=KEY_BYTES).digest()
    image: Image.Image = load_image(source)
    return blake2b(image.tobytes(), digest_size=KEY_BYTES, person=f"{image.width}x{image.height}".encode()).digest()
