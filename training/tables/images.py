"""Opening an item table's images in worker processes, and telling contents apart by hash.

A hash is of what an item holds, never of where: the same picture under two names is one, and a picture replaced under
its name is another.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from modeling_notellm2.images_notellm2 import check_regular_file, image_sources, load_image
from modeling_notellm2.prompts_notellm2 import ItemError


KEY_BYTES = 16
PER_TASK = 64
"""Items that a worker handles before it answers."""

Item = dict[str, Any]


class _Applied(Dataset):
    def __init__(self, items: Sequence[Item], function: Callable[[Item], Any]):
        self.items, self.function = items, function

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Any:
        return self.function(self.items[position])

    def __getitems__(self, positions: list[int]) -> list[Any]:
        """Neighbouring rows, which a table reads at once."""
        return [self.function(item) for item in self.items[positions[0] : positions[-1] + 1]]


def map_items(items: Sequence[Item], function: Callable[[Item], Any], num_workers: int, name: str) -> Iterator[Any]:
    """`function` of every item, in order, computed by `num_workers` processes under a progress bar.

    A table too small to give each of them something to do is computed in this process.
    """
    workers = num_workers if len(items) > num_workers * PER_TASK else 0
    loader = DataLoader(_Applied(items, function), batch_size=PER_TASK, num_workers=workers, collate_fn=list)
    with tqdm(desc=name, total=len(items), unit="item") as progress:
        for results in loader:
            yield from results
            progress.update(len(results))


def image_faults(items: Sequence[Item], num_workers: int = 0) -> Iterator[tuple[int, str]]:
    """Position and reason of every item that has an image that can't be read."""
    for position, fault in enumerate(map_items(items, image_fault, num_workers, "Opening images")):
        if fault is not None:
            yield position, fault


def image_fault(item: Item) -> str | None:
    """Why one of an item's images can't be read; None if all can."""
    try:
        for source in map(read_encoded, image_sources(item.get("image"))):
            if isinstance(source, bytes):
                with Image.open(io.BytesIO(source)) as opened:
                    opened.draft("RGB", (64, 64))  # JPEG at low resolution: cheap, and still reads the whole file
                    opened.load()
            else:
                load_image(source)
    except Exception as error:  # decoders raise errors of every kind for bytes that they don't understand
        return str(error) or type(error).__name__
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
    if not isinstance(source, (str, os.PathLike)) or str(source).startswith(("http://", "https://")):
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
