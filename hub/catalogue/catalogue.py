"""An encoded catalogue as an index or an export reads it: checked against its manifest first, then batch by batch.

Titles are not in the shards. They come from the item table, whose order the shards kept, so both are walked once side by
side and nothing has to be looked up.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from tqdm.auto import tqdm

from hub.catalogue.shards import EMBEDDING, MANIFEST, VISUAL_EMBEDDING, ShardError, read_manifest, vectors_of
from training.tables.commands.files import atomic_write
from training.tables.commands.hashes import file_sha256
from training.tables.commands.options import allow_remote_option
from training.tables.commands.outputs import Output, check_strangers
from training.tables.items import ItemTable, load_items


READ_ROWS = 65536


@dataclass(frozen=True)
class Batch:
    """Some items of a catalogue.

    Attributes:
        item_ids: n strings.
        vectors: `(n, d)` float32, whatever type they are stored in.
        titles: n strings or nulls; None without an item table.
    """

    item_ids: pa.Array
    vectors: np.ndarray
    titles: pa.Array | None = None

    def filter(self, wanted: pa.Array) -> "Batch":
        """The items for which `wanted`, n booleans, is true."""
        titles = None if self.titles is None else self.titles.filter(wanted)
        return Batch(self.item_ids.filter(wanted), self.vectors[wanted.to_numpy(zero_copy_only=False)], titles)

    def states(self) -> pa.Array:
        """64 bits of each item's id and vector, by which an index or a database tells whether it has them: n uint64."""
        rows = np.ascontiguousarray(self.vectors, dtype=np.float32)
        pairs = zip(self.item_ids.to_pylist(), rows, strict=True)
        return pa.array(
            (xxhash.xxh3_64_intdigest(row.tobytes() + item_id.encode()) for item_id, row in pairs), pa.uint64()
        )

    def metadata(self) -> dict[str, pa.Array]:
        """What is known of the items apart from their vectors, as columns."""
        return {"item_id": self.item_ids} | ({} if self.titles is None else {"title": self.titles})


@dataclass(frozen=True)
class Catalogue:
    """A complete folder of shards whose checksums are right; made by `open`."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "Catalogue":
        """Check a folder that hub/encode.py wrote.

        Raises:
            ShardError: when it is none, is not complete, or a shard is missing, has changed, or is one too many.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise ShardError(f"{folder}: no {MANIFEST}; pass a folder that hub/encode.py wrote.")
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise ShardError(f"{folder}: the encoding job is not finished; start it again with the same options.")
        shards = manifest["shards"]
        there = {path.name for path in folder.glob("shard-*.parquet")}
        faults = [f"{name} is missing" for name in sorted(shards.keys() - there)]
        faults += [f"{name} is not in the manifest" for name in sorted(there - shards.keys())]
        with tqdm(sorted(there & shards.keys()), desc="Checking shards", unit="shard", leave=False) as bar:
            faults += [f"{name} has changed" for name in bar if file_sha256(folder / name) != shards[name]["sha256"]]
        if faults:
            raise ShardError(
                f"{folder} is not what was encoded: {', '.join(faults)}. Run hub/encode.py again to mend it."
            )
        if not manifest["counts"]["items"]:
            raise ShardError(f"{folder}: no item in it.")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest["counts"]["items"]

    @property
    def width(self) -> int:
        return self.manifest["width"]

    def batches(self, column: str = EMBEDDING, items: ItemTable | None = None) -> Iterator[Batch]:
        """Items in table order, with a progress bar over all of them.

        Args:
            column: "embedding", or "visual_embedding", of the items with an image alone.
            items: the item table that was encoded, for titles.

        Raises:
            ShardError: when there is no such column, or an item is not in `items`.
        """
        with tqdm(total=len(self), desc="Reading items", unit="item") as bar:
            titles = None if items is None else _Titles(items)
            for name in sorted(self.manifest["shards"]):
                for batch in self._read(self.folder / name, column):
                    yield Batch(batch.item_ids, batch.vectors, titles.of(batch.item_ids) if titles else None)
                bar.update(self.manifest["shards"][name]["items"])
        if read_manifest(self.folder) != self.manifest:
            raise ShardError(f"{self.folder} was replaced by a new version while it was read; start again.")

    def _read(self, path: Path, column: str) -> Iterator[Batch]:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ShardError(f"{self.folder} has no {column}s; encode with --visual.")
            names = ["item_id", column, *(["has_image"] if column == VISUAL_EMBEDDING else [])]
            for rows in file.iter_batches(READ_ROWS, columns=names):
                rows_with_vector = rows.filter(rows.column("has_image")) if column == VISUAL_EMBEDDING else rows
                vectors = vectors_of(rows_with_vector.column(column), self.manifest["scale"])
                if len(rows_with_vector):
                    yield Batch(rows_with_vector.column("item_id"), vectors)


@dataclass(kw_only=True)
class TitleArguments:
    """Where an index or an export has titles from."""

    items: str | None = field(default=None, metadata={"help": "The item table that was encoded, for titles."})
    split: str | None = field(default=None, metadata={"help": "Its split, as it was encoded."})
    encoding: str | None = field(default=None, metadata={"help": "Its encoding, as it was encoded."})
    allow_remote: str | None = allow_remote_option()

    def table(self) -> ItemTable | None:
        """The item table; None where titles are not wanted.

        Raises:
            TableError: for a table that can't be read.
        """
        if not self.items:
            return None
        return load_items(self.items, self.split, False, encoding=self.encoding, allow_remote=self.allow_remote)[0]


class _Titles:
    """Titles for ids that come in the order of the table, items that were not encoded skipped."""

    def __init__(self, items: ItemTable):
        self.items = items
        self.walk = enumerate(items.item_ids)
        self.column = ["title"] if "title" in items.table.column_names else []

    def of(self, item_ids: pa.Array) -> pa.Array:
        return pa.array([self._title(item_id) for item_id in item_ids.to_pylist()], pa.string())

    def _title(self, item_id: str) -> str | None:
        for position, known in self.walk:
            if known == item_id:
                return self.items.table.row(int(self.items.rows[position]), self.column).get("title")
        source = self.items.table.source
        raise ShardError(f"item_id {item_id!r} is not where it should be in {source}: pass the table that was encoded.")


def rows_of_ids(column: pa.ChunkedArray, item_ids: list[str]) -> list[int | None]:
    """Row of each id in a column; None for an id that is not there. One pass over the column for all of them."""
    matches = pc.index_in(column, value_set=pa.array(item_ids, pa.string()))
    rows = np.flatnonzero(pc.is_valid(matches).to_numpy())
    row_of = {item_ids[match]: row for match, row in zip(matches.take(rows).to_pylist(), rows.tolist(), strict=True)}
    return [row_of.get(item_id) for item_id in item_ids]


def vectors_at(catalogue: Catalogue, column: str, rows: np.ndarray) -> np.ndarray:
    """The vectors of some rows, in the order in which they are named: `(n, d)` float32.

    Args:
        rows: positions among the items that have such a vector, each once.
    """
    order = np.argsort(rows)
    wanted = rows[order]
    vectors = np.zeros((len(rows), catalogue.width), np.float32)
    first = 0
    for batch in catalogue.batches(column):
        here = slice(*np.searchsorted(wanted, (first, first + len(batch.item_ids))))
        vectors[order[here]] = batch.vectors[wanted[here] - first]
        first += len(batch.item_ids)
    return vectors


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `output`.

    Raises:
        FileError: when `output` holds what this program didn't make.
    """
    check_strangers([Output("--output", output)])
    with atomic_write(output) as place:
        place.mkdir()
        yield place
