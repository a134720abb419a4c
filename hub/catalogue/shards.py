"""The folder that an encoding job writes and an index reads: Parquet shards, manifest.json, rejects.parquet.

A shard holds the items of a fixed range of table rows. It is written beside its place and renamed, with the rows that
were left out in the same file, so at any moment a shard is there as a whole or not at all. The manifest says from the
start what the job is and at the end that it is complete.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.tables.commands.files import atomic_write, write_json
from training.tables.commands.handler import about
from training.tables.commands.hashes import file_sha256
from training.tables.commands.outputs import LOCK, locked
from training.tables.rejects import Reject


if TYPE_CHECKING:  # who reads a catalogue needs no torch
    from hub.catalogue.encoder import EncodedBlock


EMBEDDING, VISUAL_EMBEDDING, CONTENT_HASH = "embedding", "visual_embedding", "content_hash"
"""Columns of a shard."""
MANIFEST = "manifest.json"
REJECTS = "rejects.parquet"
INT8_SCALE = 127
"""An int8 embedding is `round(127 * x)`; `x` is between -1 and 1, as embeddings have length 1."""

ARROW_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}
REJECTS_SCHEMA = pa.schema({"item_id": pa.string(), "file": pa.string(), "row": pa.int64(), "reason": pa.string()})


class ShardError(ValueError):
    """A folder of shards that can't be written to, or can't be relied on; the message says which file and why."""


@dataclass(frozen=True)
class Plan:
    """How table rows are cut into blocks, the unit of work, and shards, the unit of writing. Sizes are in rows."""

    rows: int
    rows_per_block: int
    rows_per_shard: int

    def __post_init__(self) -> None:
        if self.rows_per_block < 1 or self.rows_per_shard % self.rows_per_block:
            raise ValueError(
                f"rows_per_shard ({self.rows_per_shard}) must be a multiple of rows_per_block ({self.rows_per_block})."
            )

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def block_range(self, number: int) -> tuple[int, int]:
        """First row of a block and the row behind its last."""
        return number * self.rows_per_block, min((number + 1) * self.rows_per_block, self.rows)

    def shard_of(self, block: int) -> int:
        return block * self.rows_per_block // self.rows_per_shard

    def blocks_of(self, shard: int) -> range:
        """Numbers of a shard's blocks."""
        per_shard = self.rows_per_shard // self.rows_per_block
        return range(shard * per_shard, min((shard + 1) * per_shard, -(-self.rows // self.rows_per_block)))

    def rows_of(self, shard: int) -> int:
        return min((shard + 1) * self.rows_per_shard, self.rows) - shard * self.rows_per_shard


@dataclass
class ShardWriter:
    """Gathers encoded blocks, in whatever order they come, into shards.

    Args:
        folder: where they go.
        plan: of the table.
        embedding_type: float32, float16 or int8.
        done: shards that are there already.
    """

    folder: Path
    plan: Plan
    embedding_type: str
    done: set[int]
    _waiting: dict[int, dict[int, "EncodedBlock"]] = field(default_factory=dict)

    def pending_blocks(self) -> list[int]:
        """Blocks of the shards that are not there, in table order."""
        missing = (shard for shard in range(self.plan.shards) if shard not in self.done)
        return [block for shard in missing for block in self.plan.blocks_of(shard)]

    def add(self, block: "EncodedBlock") -> None:
        """Keeps a block until its shard is whole, then writes the shard."""
        shard = self.plan.shard_of(block.number)
        blocks = self._waiting.setdefault(shard, {})
        blocks[block.number] = block
        if len(blocks) == len(self.plan.blocks_of(shard)):
            table = _shard_table([blocks[number] for number in sorted(blocks)], self.embedding_type)
            write_parquet(table, self.folder / shard_name(shard))
            self.done.add(shard)
            del self._waiting[shard]


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


@contextlib.contextmanager
def open_job(folder: Path, job: Mapping[str, Any], plan: Plan) -> Iterator[set[int]]:
    """Takes a folder for a job: a new one, or what an earlier start of the same job left.

    Args:
        job: everything that decides what the shards hold, as nested dicts that JSON can hold.

    Yields:
        The shards that are there and good.

    Raises:
        FileError: when another process is writing into the folder.
        ShardError: when it holds another job (naming every difference), or is not empty and none of ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, folder):
        manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
        if manifest is None:
            strangers = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
            if strangers:
                raise ShardError(f"{folder} is no folder of this command: it has {', '.join(strangers[:5])}.")
            write_json({"complete": False, "job": job}, folder / MANIFEST)
        else:
            changed = differences(manifest["job"], job)
            if changed:
                raise ShardError(
                    f"{folder} holds another job; choose another --output, or start that one again. "
                    f"What differs: {'; '.join(changed)}."
                )
        checksums = {name: shard["sha256"] for name, shard in (manifest or {}).get("shards", {}).items()}
        yield {shard for shard in range(plan.shards) if _is_good(folder / shard_name(shard), checksums)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json says of a job: "complete" and "job", and "shards" once it is complete.

    Raises:
        FileError: for one that was edited or damaged.
    """
    with about(folder / MANIFEST, "It was edited or damaged: encode into another folder."):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        missing = [name for name in ("complete", "job") if name not in manifest]
        if missing or (manifest["complete"] and "shards" not in manifest):
            raise ValueError(f"no entry {' and '.join(missing) or 'shards'}")
        return manifest


def close_job(
    folder: Path, job: Mapping[str, Any], plan: Plan, empty_lines: int, made_with: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes rejects.parquet and the complete manifest, which is returned. All shards must be there."""
    shards: dict[str, dict[str, Any]] = {}
    with atomic_write(folder / REJECTS) as place, pq.ParquetWriter(place, REJECTS_SCHEMA) as writer:
        for shard in range(plan.shards):
            path = folder / shard_name(shard)
            with pq.ParquetFile(path) as file:
                items, metadata = file.metadata.num_rows, file.schema_arrow.metadata
            rejects = json.loads(metadata[b"rejects"])
            if rejects:
                writer.write_table(pa.Table.from_pylist(rejects, REJECTS_SCHEMA))
            shards[path.name] = {
                "items": items,
                "rejects": len(rejects),
                "width": int(metadata[b"width"]),
                "copied": int(metadata.get(b"copied", 0)),
                "sha256": file_sha256(path),
            }
    counts = {what: sum(shard[what] for shard in shards.values()) for what in ("items", "rejects")}
    copied = sum(shard.pop("copied") for shard in shards.values())
    manifest = {
        "complete": True,
        "job": job,
        "width": max((shard.pop("width") for shard in shards.values()), default=0),
        "scale": INT8_SCALE if job["settings"]["embedding_type"] == "int8" else 1,
        "counts": {"rows": plan.rows, **counts, "copied": copied, "empty_lines": empty_lines},
        "made_with": made_with,
        "shards": shards,
    }
    write_json(manifest, folder / MANIFEST)
    return manifest


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table whole or not at all. The same table gives the same bytes."""
    with atomic_write(path) as place:
        pq.write_table(table, place, compression="zstd", use_dictionary=False)


def read_rejects(folder: Path, most: int) -> list[Reject]:
    """The first `most` rows that a job left out."""
    rows = next(pq.ParquetFile(folder / REJECTS).iter_batches(most), None)
    return (
        [Reject(row["file"], row["row"], [row["item_id"]], row["reason"], row["file"]) for row in rows.to_pylist()]
        if rows
        else []
    )


def embeddings_array(values: np.ndarray, embedding_type: str) -> pa.FixedSizeListArray:
    """`(n, d)` float32 as a fixed-size list of a type of `ARROW_TYPES`."""
    if embedding_type == "int8":
        values = np.rint(values * INT8_SCALE).clip(-INT8_SCALE, INT8_SCALE)
    flat = pa.array(values.astype(embedding_type).reshape(-1), ARROW_TYPES[embedding_type])
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def vectors_of(column: pa.FixedSizeListArray, scale: int) -> np.ndarray:
    """What `embeddings_array` has stored: `(n, d)` float32.

    Args:
        scale: what stored numbers are divided by, as the manifest says.
    """
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(len(column), column.type.list_size) / np.float32(scale)


def _shard_table(blocks: "list[EncodedBlock]", embedding_type: str) -> pa.Table:
    embeddings = np.concatenate([block.embeddings for block in blocks])
    columns = {
        "item_id": pa.array([item_id for block in blocks for item_id in block.item_ids], pa.string()),
        EMBEDDING: embeddings_array(embeddings, embedding_type),
    }
    contents = [content for block in blocks for content in block.contents]
    visual = [block.visual_embeddings for block in blocks if block.visual_embeddings is not None]
    if visual:
        columns[VISUAL_EMBEDDING] = embeddings_array(np.concatenate(visual), embedding_type)
        columns["has_image"] = pa.array(np.concatenate([block.has_image for block in blocks]))
    columns[CONTENT_HASH] = pa.array(contents, pa.binary(16))
    rejects = [
        {"item_id": "".join(reject.ids), "file": reject.file, "row": reject.row, "reason": reject.reason}
        for block in blocks
        for reject in block.rejects
    ]
    return pa.table(columns).replace_schema_metadata(
        {
            "width": str(embeddings.shape[1]),
            "rejects": json.dumps(rejects),
            "copied": str(sum(block.copied for block in blocks)),
        }
    )


def _is_good(path: Path, checksums: Mapping[str, str]) -> bool:
    """There, and what the manifest says it is once that says anything."""
    return path.is_file() and checksums.get(path.name) in (None, file_sha256(path))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Entries of two nested dicts that are not equal; where model and table were found does not matter."""
    changed = []
    for key in sorted({*old, *new} - {"source", "revision"}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            changed += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            changed.append(f"{prefix}{key} was {_short(before)}, now {_short(now)}")
    return changed


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:12]}..."
