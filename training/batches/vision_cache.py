"""A cache on disk of what a frozen vision encoder makes of each picture, so that later epochs neither decode nor run it.

One folder for each encoder with its preprocessing, in it safetensors files of some hundred pictures: `keys` (hash of the
picture's content), `hidden_states` (tokens, width) of all of them with the `ends` of each, and `pooler_output`, in 16
bits: bfloat16 where the encoder ran in that, else float16. They are mapped, so all workers of a machine share one copy. A
picture that has changed, another encoder or another precision has another key and never gets stale features.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from modeling_notellm2.images_notellm2 import image_sources
from modeling_notellm2.pixels_notellm2 import join_pictures
from modeling_notellm2.prompts_notellm2 import ItemError
from modeling_notellm2.vision_features_notellm2 import VisionFeatures, join_features
from training.tables.commands.files import atomic_write
from training.tables.images import KEY_BYTES, Item, content_key, map_items, open_picture, read_encoded


logger = logging.get_logger(__name__)

FORMAT = 2
FILE_BYTES = 256 * 2**20
CPU_BATCH, GPU_BATCH = 4, 32
"""Pictures that the encoder takes at once: a CPU's cache holds few, and 32 of them cost it three times as much each."""
LARGEST = torch.finfo(torch.float16).max
KIND = f"S{KEY_BYTES}"


@dataclass
class VisionCache:
    """Stored vision features, found by a picture's content.

    Args:
        folder: of one encoder, preprocessing and precision; see `open_vision_cache`.
        dtype: in which the encoder computes what is stored here.

    Attributes:
        keys: (images,) sorted 16-byte keys of what is stored, and for each its `file` and `row` there.
        size: bytes on disk.
    """

    folder: Path
    dtype: torch.dtype = torch.float32
    files: list[Path] = field(init=False)
    keys: np.ndarray = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.reload()

    def reload(self) -> None:
        """Take note of all files in the folder; one that can't be read is left out with a warning."""
        self.files, keys, places, self.size = [], [], [], 0
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="np") as opened:
                    stored = opened.get_tensor("keys")
            except (SafetensorError, OSError) as error:
                logger.warning("%s is not used (%s); delete it, and its pictures are cached anew.", path, error)
                continue
            keys.append(np.ascontiguousarray(stored).view(KIND).reshape(-1))
            places.append(np.stack([np.full(len(stored), len(self.files)), np.arange(len(stored))], axis=1))
            self.files.append(path)
            self.size += path.stat().st_size
        together = np.concatenate(keys) if keys else np.empty(0, dtype=KIND)
        self.keys, first = np.unique(together, return_index=True)
        self.places = np.concatenate(places)[first] if keys else np.empty((0, 2), dtype=np.int64)
        self._opened: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a started worker maps the files itself

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: bytes) -> int | None:
        """Where a picture's features stand, for `read`; None if they are not stored."""
        wanted = np.array(key, dtype=KIND)
        at = int(np.searchsorted(self.keys, wanted))
        return at if at < len(self.keys) and self.keys[at] == wanted else None

    def read(self, stored: Sequence[int]) -> VisionFeatures:
        """Features of one picture or more that were found, in 16 bits; padded where their numbers of tokens differ."""
        return join_features([self._row(*self.places[at].tolist()) for at in stored])

    def _row(self, file: int, row: int) -> VisionFeatures:
        if file not in self._opened:
            opened = safe_open(self.files[file], framework="pt")
            self._opened[file] = opened, [0, *opened.get_tensor("ends").tolist()]
        opened, ends = self._opened[file]
        hidden, pooled = (opened.get_slice(name) for name in ("hidden_states", "pooler_output"))
        grids = opened.get_slice("grids")[row : row + 1] if "grids" in opened.keys() else None  # noqa: SIM118
        return VisionFeatures(hidden[ends[row] : ends[row + 1]].unsqueeze(0), pooled[row : row + 1], grids=grids)

    def count_tokens(self, stored: int) -> int:
        """Tokens of a picture that was found."""
        return self._row(*self.places[stored].tolist()).last_hidden_state.shape[1]

    def summary(self, item: Item) -> Tensor:
        """(width,) float32: the mean summary feature of an item's images; zeros without one.

        Raises:
            ValueError: when one of them is not stored.
        """
        places = [self.find(content_key(read_encoded(source))) for source in image_sources(item.get("image"))]
        stored = [place for place in places if place is not None]
        if len(stored) < len(places):
            raise ValueError(
                f"item_id {item.get('item_id')!r}: its image is not in {self.folder}; raise vision_cache_gb."
            )
        if not stored:
            return torch.zeros(self.read([0]).pooler_output.shape[-1])
        return self.read(stored).pooler_output.float().mean(0)

    def fill(
        self,
        model: Any,
        processor: Any,
        items: Sequence[Item],
        limit_gb: float = 50.0,
        batch_size: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Store what is missing of the items' images, until the folder would exceed `limit_gb` (10^9 bytes).

        What was stored when a run was killed is found again. Unreadable images are passed over: the collator lists them.
        """
        limit = limit_gb * 1e9
        size = batch_size or (CPU_BATCH if model.device.type == "cpu" else GPU_BATCH)
        for part in model.vision_parts:
            part.eval()
        features = partial(_features, model, self.dtype)
        prepare = partial(_prepare, self, processor)
        waiting: dict[bytes, dict[str, Tensor]] = {}
        done: set[bytes] = set()
        block = _Block(self.folder)
        for of_item in map_items(items, prepare, num_workers, "Vision features"):
            waiting |= {key: pixels for key, pixels in of_item if key not in done}
            if len(waiting) < size:
                continue
            done |= waiting.keys()
            block.add(list(waiting), *features(list(waiting.values())))
            waiting = {}
            if self.size + block.written + block.waiting >= limit:
                break
            if block.waiting >= FILE_BYTES:
                block.write()
        if waiting and self.size + block.written + block.waiting < limit:
            block.add(list(waiting), *features(list(waiting.values())))
        block.cut(int(limit - self.size - block.written))
        block.write()
        self.reload()


class _Block:
    """Features that wait to be written as one file."""

    def __init__(self, folder: Path):
        self.folder, self.written = folder, 0
        self._clear()

    def _clear(self) -> None:
        self.waiting = 0
        self.keys: list[bytes] = []
        self.hidden: list[Tensor] = []
        self.pooled: list[Tensor] = []
        self.grids: list[Tensor] = []

    def add(self, keys: list[bytes], hidden: list[Tensor], pooled: Tensor, grids: Tensor | None) -> None:
        before = len(self.keys)
        self.keys += keys
        self.hidden += hidden
        self.pooled += pooled.unbind()
        self.grids += [] if grids is None else grids.unbind()
        self.waiting += sum(map(self._bytes_of, range(before, len(self.keys))))

    def cut(self, most: int) -> None:
        """Let go of what exceeds a number of bytes."""
        sizes = np.cumsum([self._bytes_of(row) for row in range(len(self.keys))])
        keep = int(np.searchsorted(sizes, most, side="right"))
        del self.keys[keep:], self.hidden[keep:], self.pooled[keep:], self.grids[keep:]

    def write(self) -> None:
        """Write the part whole or not at all; its name is the first key's, so that processes never write one file."""
        if not self.keys:
            return
        path = self.folder / f"{self.keys[0].hex()}.safetensors"
        keys = torch.frombuffer(bytearray(b"".join(self.keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
        tensors = {
            "keys": keys,
            "hidden_states": torch.cat(self.hidden),
            "ends": torch.tensor([len(hidden) for hidden in self.hidden]).cumsum(0),
            "pooler_output": torch.stack(self.pooled),
        }
        if self.grids:
            tensors["grids"] = torch.stack(self.grids)
        with atomic_write(path) as place:
            save_file(tensors, place)
        self.written += path.stat().st_size
        self._clear()

    def _bytes_of(self, row: int) -> int:
        return KEY_BYTES + self.hidden[row].nbytes + self.pooled[row].nbytes


def open_vision_cache(
    model: Any, processor: Any, root: Path | None = None, dtype: torch.dtype = torch.float32
) -> VisionCache:
    """The cache of a model's vision encoder with its preprocessing.

    Args:
        root: folder of all caches; None: `notellm2_vision` in `datasets`' cache.
        dtype: in which the encoder computes (autocast; its weights stay what they are).

    Raises:
        ValueError: when the encoder is trained, so that its features would go stale.
    """
    if not model.config.freeze_vision:
        raise ValueError("A cache of vision features needs a frozen vision encoder (freeze_vision: true).")
    root = root or Path(datasets.config.HF_DATASETS_CACHE) / "notellm2_vision"
    folder = root / encoder_key(model, processor, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    return VisionCache(folder, dtype)


def encoder_key(model: Any, processor: Any, dtype: torch.dtype = torch.float32) -> str:
    """A hash of all that decides a picture's features besides the picture: weights, layer, types, preprocessing."""
    digest = blake2b(digest_size=KEY_BYTES)
    preprocessing = processor.image_processor.to_dict()
    config = model.config
    of_model = [config.vision_config.to_dict(), config.vision_feature_layer, config.vision_summary]
    if config.connector == "native":
        of_model.append(config.text_config.to_dict())
    settings = [FORMAT, *of_model, str(dtype), preprocessing, processor.max_pixels]
    if getattr(processor, "jpeg_side", None) is not None:  # without it, caches of before go on
        settings.append(processor.jpeg_side)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(pair for part in model.vision_parts for pair in part.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def feature_inputs(features: VisionFeatures) -> dict[str, Tensor]:
    """Vision features under the names by which the model's forward takes them back."""
    inputs = {"vision_hidden_states": features.last_hidden_state, "vision_pooler_output": features.pooler_output}
    if features.attention_mask is not None:
        inputs["vision_attention_mask"] = features.attention_mask
    if features.grids is not None:
        inputs["vision_grids"] = features.grids
    return inputs


def _prepare(cache: VisionCache, processor: Any, item: Item) -> list[tuple[bytes, dict[str, Tensor]]]:
    """Key and pixels of those images of an item that are not stored and can be read; runs in a worker."""
    unseen = []
    for source in image_sources(item.get("image")):
        try:
            encoded = read_encoded(source)
            key = content_key(encoded)
            if cache.find(key) is None:
                unseen.append((key, processor.process_images([open_picture(encoded, processor)])))
        except ItemError:
            continue
    return unseen


@torch.no_grad()
def _features(
    model: Any, dtype: torch.dtype, pictures: list[dict[str, Tensor]]
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Tokens (tokens, width) of each picture without padding, summary features (m, width), in 16 bits on the CPU, and grids."""
    inputs = {name: values.to(model.device) for name, values in join_pictures(pictures).items()}
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        features = model.get_vision_features(**inputs)
    hidden, pooled = features.last_hidden_state, features.pooler_output
    grids = None if features.grids is None else features.grids.cpu()
    if dtype != torch.bfloat16:
        dtype, hidden, pooled = torch.float16, hidden.clamp(-LARGEST, LARGEST), pooled.clamp(-LARGEST, LARGEST)
    hidden, pooled = hidden.to("cpu", dtype).contiguous(), pooled.to("cpu", dtype).contiguous()
    if features.attention_mask is None:
        return list(hidden.unbind()), pooled, grids
    rows = zip(hidden, features.attention_mask.cpu(), strict=True)
    return [row[held.bool()] for row, held in rows], pooled, grids
