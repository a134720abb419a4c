"""What an earlier version of a catalogue knows: the vector of each item, for those that still hold what they held then.

An item is the same when what the model reads of it is: its texts and the bytes of its pictures, wherever they lie. That is
`content_hash`, which stands beside each vector in the shards.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from hub.catalogue.shards import CONTENT_HASH, EMBEDDING, VISUAL_EMBEDDING, ShardError, vectors_of
from modeling_notellm2.images_notellm2 import check_regular_file, image_sources
from training.tables.commands.hashes import file_xxh3
from training.tables.items import Item


READ_FIELDS = ("title", "topics", "content")


@dataclass(frozen=True)
class Known:
    """What an earlier version has of an item: `embedding` `(d,)` float32, `visual_embedding` the same or None, `has_image`."""

    embedding: np.ndarray
    visual_embedding: np.ndarray | None
    has_image: bool


@dataclass(frozen=True)
class Earlier:
    """An earlier version, made by `open`. It is small enough to be sent to workers: 16 bytes for each item.

    Attributes:
        folder: of its shards.
        shards: their names and SHA-256.
        starts: first row of each, and the number of all rows.
        keys: of all rows, sorted uint64.
        rows: the row of each key.
        scale: what stored numbers are divided by.
    """

    folder: Path
    shards: list[tuple[str, str]]
    starts: list[int]
    keys: np.ndarray
    rows: np.ndarray
    scale: int

    @classmethod
    def open(cls, folder: Path, manifest: Mapping[str, Any]) -> "Earlier":
        """Reads the ids and contents of a whole catalogue.

        Raises:
            ShardError: for one of an older program, which wrote no contents.
        """
        names, starts, keys = sorted(manifest["shards"]), [0], []
        for name in names:
            with pq.ParquetFile(folder / name) as file:
                if CONTENT_HASH not in file.schema_arrow.names:
                    raise ShardError("the earlier version doesn't say what its items held")
                columns = file.read(["item_id", CONTENT_HASH]).to_pydict()
            pairs = zip(columns["item_id"], columns[CONTENT_HASH], strict=True)
            keys.append(np.fromiter((_key(item_id, content or b"") for item_id, content in pairs), np.uint64))
            starts.append(starts[-1] + len(keys[-1]))
        all_keys = np.concatenate(keys) if keys else np.empty(0, np.uint64)
        order = np.argsort(all_keys)
        shards = [(name, manifest["shards"][name]["sha256"]) for name in names]
        return cls(folder, shards, starts, all_keys[order], order, manifest["scale"])

    def find(self, item_id: str, content: bytes) -> Known | None:
        """The vectors of an item, if it was there with this very content."""
        key = np.uint64(_key(item_id, content))
        first = int(np.searchsorted(self.keys, key))
        if first == len(self.keys) or self.keys[first] != key:
            return None
        row = int(self.rows[first])
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        name, sha256 = self.shards[shard]
        table, at = _shard(self.folder / name, sha256), row - self.starts[shard]
        if table["item_id"][at].as_py() != item_id or table[CONTENT_HASH][at].as_py() != content:
            return None
        with_visual = VISUAL_EMBEDDING in table.column_names
        return Known(
            self._vector(table, EMBEDDING, at),
            self._vector(table, VISUAL_EMBEDDING, at) if with_visual else None,
            with_visual and table["has_image"][at].as_py(),
        )

    def _vector(self, table: pa.Table, column: str, row: int) -> np.ndarray:
        return vectors_of(table[column].chunk(0).slice(row, 1), self.scale)[0]


def content_hash(item: Item) -> bytes | None:
    """XXH3 of 128 bits of what the model reads of an item, without its id.

    None when a picture can't be read, or is no path and no bytes, as tables have them.
    """
    texts = json.dumps([item.get(name) for name in READ_FIELDS])  # in ASCII, whatever they are
    digest = xxhash.xxh3_128(texts.encode())
    sources = image_sources(item.get("image"))
    if not all(isinstance(source, (bytes, str, os.PathLike)) for source in sources):
        return None
    try:
        for source in sources:
            digest.update(_picture_hash(source))
    except (OSError, ValueError):  # the encoder meets it again, and says where
        return None
    return digest.digest()


def _picture_hash(source: bytes | str | os.PathLike[str]) -> bytes:
    if isinstance(source, bytes):
        return xxhash.xxh3_128_digest(source)
    check_regular_file(source)
    return bytes.fromhex(file_xxh3(Path(source)))


def _key(item_id: str, content: bytes) -> int:
    """64 bits, of which two items may have the same; `find` looks whether the item is the one."""
    return xxhash.xxh3_64_intdigest(content + item_id.encode())


@lru_cache(maxsize=4)
def _shard(path: Path, sha256: str) -> pa.Table:
    """The columns of a shard, each in one piece. An update goes through the earlier version about in its order.

    Args:
        sha256: of the file, as another version may stand at its path later on.
    """
    with pq.ParquetFile(path) as file:
        return file.read().combine_chunks()
