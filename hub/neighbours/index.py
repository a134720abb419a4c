"""An index on the disk: FAISS's part of it, the ids of its rows, and how it is searched.

Vectors and ids are mapped into memory, not read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hub.catalogue.catalogue import rows_of_ids
from training.tables.commands.handler import about
from training.tables.commands.hashes import changes, file_xxh3


INDEX_FILE, IDS_FILE, RECORD = "index.faiss", "ids.arrow", "index.json"
HASHED = (INDEX_FILE, IDS_FILE)
"""Rows of one are rows of the other, so both are held against their hashes."""

Queries = np.ndarray | Sequence[np.ndarray] | Sequence[Sequence[float]] | Sequence[str]


@dataclass(frozen=True)
class Neighbour:
    """An item that was found. `score` is the inner product, of unit vectors the cosine."""

    item_id: str
    score: float
    title: str | None


@dataclass(frozen=True)
class Index:
    """An index on the disk; made by `load`.

    Attributes:
        settings: what index.json holds: kind, metric, width, items, embedding, parameters, model, dtype, hashes.
        faiss_index: the index itself.
        ids: `item_id`, `state` and perhaps `title` of each of its rows. A row without an id is of an item that an update
            has dropped or moved: it is found by nobody.
    """

    settings: dict[str, Any]
    faiss_index: Any
    ids: pa.Table

    @classmethod
    def load(cls, path: str | Path) -> "Index":
        """Map an index into memory, after its files were read once to check them.

        Raises:
            ValueError: when the folder is none, or its files don't belong together.
        """
        path = Path(path)
        missing = [name for name in (RECORD, *HASHED) if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{path} is no index: {', '.join(missing)} is missing. hub/index.py builds one.")
        with about(path, "A file in it was edited or damaged, or is of another index: build the index again."):
            settings = json.loads((path / RECORD).read_text(encoding="utf-8"))
            if changed := changes({name: settings["hashes"][name] for name in HASHED}, path):
                raise ValueError(" and ".join(changed))
            faiss_index = faiss.read_index(str(path / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
            ids = pa.ipc.open_file(pa.memory_map(str(path / IDS_FILE))).read_all()
        return cls(settings, faiss_index, ids)

    def search(self, queries: Queries, k: int = 20) -> list[list[Neighbour]]:
        """The nearest items of each query, best first.

        Args:
            queries: vectors `(n, d)` of unit length (an array, a tensor, or a list of vectors), or ids of items in the
                index, each of which is left out of its own result. An approximate kind may find fewer than `k`.
            k: neighbours of each.

        Raises:
            ValueError: for vectors of another width or not finite, for unknown ids, or for k below 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1.")
        if isinstance(queries, str):
            raise ValueError("ids are a list; pass [id] for one of them.")
        if not len(queries):
            return []
        if not all(isinstance(query, str) for query in queries):
            vectors = _vectors(queries)
            return self._search(vectors, [None] * len(vectors), k)
        rows = self._rows([str(query) for query in queries])
        return self._search(np.stack([self.faiss_index.reconstruct(row) for row in rows]), rows, k)

    @property
    def width(self) -> int:
        """Of the vectors."""
        return self.settings["width"]

    def __len__(self) -> int:
        return self.settings["items"]

    @cached_property
    def _living(self) -> Any:
        """FAISS's parameters that pass over dropped rows; None where there are none."""
        ids = self.ids.column("item_id")
        if not ids.null_count:
            return None
        mask = np.packbits(pc.is_valid(ids).to_numpy(), bitorder="little")
        library: Any = faiss  # whose stubs don't know these
        selected = library.IDSelectorBitmap(mask)
        if self.settings["kind"] == "hnsw":
            return library.SearchParametersHNSW(sel=selected, efSearch=self.faiss_index.hnsw.efSearch)
        return library.SearchParametersIVF(sel=selected, nprobe=self.faiss_index.nprobe)

    def _search(self, vectors: np.ndarray, own_rows: Sequence[int | None], k: int) -> list[list[Neighbour]]:
        if vectors.ndim != 2 or vectors.shape[1] != self.width or not np.isfinite(vectors).all():
            raise ValueError(f"Queries of shape {vectors.shape}; expected finite vectors (n, {self.width}).")
        most = min(k + 1, len(self.ids))
        queries = np.ascontiguousarray(vectors, dtype=np.float32)
        scores, rows = self.faiss_index.search(queries, most, params=self._living)
        results = []
        for row_scores, own, nearest in zip(scores.tolist(), own_rows, rows.tolist(), strict=True):
            others = [(row, score) for row, score in zip(nearest, row_scores, strict=True) if row not in (-1, own)][:k]
            described = self.ids.take(pa.array([row for row, _ in others], pa.int64())).to_pylist()
            results.append(
                [
                    Neighbour(item["item_id"], score, item.get("title"))
                    for item, (_, score) in zip(described, others, strict=True)
                ]
            )
        return results

    def _rows(self, item_ids: list[str]) -> list[int]:
        rows = rows_of_ids(self.ids.column("item_id"), item_ids)
        unknown = [item_id for item_id, row in zip(item_ids, rows, strict=True) if row is None]
        if unknown:
            raise ValueError(
                f"Not in the index: {', '.join(unknown[:5])}. Was it left out when encoding (rejects.parquet)?"
            )
        return [row for row in rows if row is not None]


def _vectors(queries: Any) -> np.ndarray:
    """An array of what should be vectors.

    Raises:
        ValueError: for anything else: ids and vectors mixed, ids that are no text, vectors of several widths.
    """
    try:
        return np.asarray(queries, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Queries are vectors of one width, or ids, which are texts ({error}).") from error


def hashes_of(folder: Path) -> dict[str, str]:
    """What index.json says of the other files."""
    return {name: file_xxh3(folder / name) for name in HASHED}
