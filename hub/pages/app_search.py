"""What the app searches with: a model for queries, indexes over an encoded catalogue, and the table with its pictures.

A catalogue that nobody has encoded yet is encoded and indexed first, into a cache folder, by the code of `hub/encode.py` and
`hub/index.py`: killed and started again it goes on where it was.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from huggingface_hub.constants import HF_HOME

from hub.catalogue.catalogue import rows_of_ids
from hub.catalogue.encoder import ItemEncoder, Place
from hub.catalogue.encoding import EncodeArguments, describe_job, describe_model, encode, find_model, model_changes
from hub.neighbours.building import BuildArguments, build
from hub.neighbours.index import Index
from modeling_notellm2 import choose_precision
from modeling_notellm2.texts_notellm2 import CellError
from training.tables.columns import item_of
from training.tables.items import ItemTable, load_items


COMPARE_ALL = 10_000
"""Up to this many items all are compared; above, the nearest by either embedding are, `CANDIDATES` at least of each."""
CANDIDATES = 500


class QueryError(ValueError):
    """A query that can't be embedded; the message is for the person who made it."""


@dataclass(frozen=True)
class Query:
    """An embedded item: `(d,)` float32 of unit length both; `visual` is None without a picture or without mICL."""

    embedding: np.ndarray
    visual: np.ndarray | None


@dataclass(frozen=True)
class Hit:
    """An item that was found.

    Attributes:
        score: `weight * multimodal + (1 - weight) * visual`, by which hits are ordered.
        multimodal, visual: cosine similarities; `visual` is 0 for an item without a picture, None if it wasn't compared.
    """

    item_id: str
    score: float
    multimodal: float
    visual: float | None


@dataclass(frozen=True)
class ItemSearch:
    """Queries over a catalogue; made by `open_search`.

    Attributes:
        encoder: of queries, with the model that encoded the catalogue.
        index, visual_index: over multimodal and visual embeddings; the latter None without mICL.
        items: of the catalogue.
        positions: `(n,)` integer, place in `items` of each row of `index`.
    """

    encoder: ItemEncoder
    index: Index
    visual_index: Index | None
    items: ItemTable
    positions: np.ndarray

    def embed(self, item: Mapping[str, Any]) -> Query:
        """Embeds an item of any of `title`, `topics`, `content`, `image` (bytes, or a list of them).

        Raises:
            QueryError: for an item with nothing in it, or with a picture that can't be read.
        """
        try:
            query = item_of(item, Path())
        except CellError as error:
            raise QueryError(str(error)) from error
        block = self.encoder.embed(self.encoder.prepare(0, [(Place("query", "query", 0), query)]))
        if not block.item_ids:
            raise QueryError(block.rejects[0].reason)
        visual = block.visual_embeddings
        return Query(block.embeddings[0], visual[0] if visual is not None and block.has_image[0] else None)

    def search(self, query: Query, weight: float, k: int, leave_out: str | None = None) -> list[Hit]:
        """The `k` items with the highest score, best first; of equal ones the earlier in the catalogue.

        Args:
            weight: of the multimodal similarity, 0 to 1. A query without a visual embedding is searched with 1.
            leave_out: id of an item that is not to be found, such as the query itself.
        """
        many = len(self.positions) if len(self.positions) <= COMPARE_ALL else max(CANDIDATES, 20 * k)
        lists = [self.index.search(query.embedding[None], many)[0]]
        visual_index = self.visual_index
        if visual_index is not None and query.visual is not None:
            lists += [visual_index.search(query.visual[None], many)[0]]
        ids = list({near.item_id for nearest in lists for near in nearest} - {leave_out})
        multimodal, rows = _similarities(self.index, query.embedding, ids)
        if visual_index is None or query.visual is None:
            visual, score = None, multimodal
        else:
            visual, _ = _similarities(visual_index, query.visual, ids)
            score = weight * multimodal + (1 - weight) * visual
        best = np.lexsort((rows, -score))[:k]
        return [
            Hit(ids[at], float(score[at]), float(multimodal[at]), None if visual is None else float(visual[at]))
            for at in best
        ]

    def item(self, item_id: str) -> dict[str, Any]:
        """An item of the catalogue as its table has it, pictures included.

        Raises:
            QueryError: for an id that is not in the index.
        """
        row = rows_of_ids(self.index.ids["item_id"], [item_id])[0]
        if row is None:
            raise QueryError(f"There is no item {item_id!r} in this index.")
        return self.items[int(self.positions[row])]

    def sample(self, count: int, seed: int = 0) -> list[str]:
        """Ids of some items, always the same."""
        total = len(self.positions)
        rows = sorted(random.Random(seed).sample(range(total), min(count, total)))
        return self.index.ids["item_id"].take(pa.array(rows)).to_pylist()


def open_search(
    model: str,
    items: str,
    index: str | None = None,
    visual_index: str | None = None,
    *,
    split: str | None = None,
    encoding: str | None = None,
    allow_remote: str | None = None,
    cache: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> ItemSearch:
    """Opens a catalogue for queries, encoded and indexed first where no index is given.

    Args:
        model: folder or Hub id.
        items: the item table.
        index, visual_index: folders that `hub/index.py` wrote, the second with `--visual`.
        split, encoding, allow_remote: of the item table.
        cache: folder for what is built; None: a folder of the user's cache.
        device, dtype: for queries and encoding.

    Raises:
        ValueError: for a model, table or index that can't be used, or that don't belong together.
    """
    loaded, _ = load_items(items, split, False, encoding=encoding, allow_remote=allow_remote)
    folder = find_model(model, None)
    precision = choose_precision(dtype, device)
    print(f"Precision: {precision}")
    if index is None:
        places = build_indexes(folder, loaded, items, split, encoding, cache, device, precision.name)
    else:
        places = index, visual_index
        check_indexes(folder, {"embedding": index, "visual_embedding": visual_index})
    opened, opened_visual = (None if place is None else Index.load(place) for place in places)
    assert opened is not None
    encoder = ItemEncoder(str(folder), precision.name, device, visual=opened_visual is not None)
    _ = encoder.processor, encoder.model  # loaded before the first query
    return ItemSearch(encoder, opened, opened_visual, loaded, positions_of_ids(opened.ids["item_id"], loaded))


def check_indexes(model: Path, places: Mapping[str, str | None]) -> None:
    """Refuses indexes of another model, or of other embeddings than those that `places` says.

    Raises:
        ValueError: naming the index and what differs.
    """
    files = describe_model(model)
    for embedding, place in places.items():
        if place is None:
            continue
        settings = Index.load(place).settings
        if changed := model_changes(settings["model"]["files"], files):
            raise ValueError(f"{place} was made with another model than {model}: {', '.join(changed)} differs.")
        if settings["embedding"] != embedding:
            raise ValueError(f"{place} holds {settings['embedding']}s; expected {embedding}s.")


def build_indexes(
    model: Path,
    loaded: ItemTable,
    items: str,
    split: str | None,
    encoding: str | None,
    cache: str | None,
    device: str,
    dtype: str,
) -> tuple[str, str | None]:
    """Encodes and indexes a catalogue unless that was done before; folders of the multimodal and the visual index."""
    has_visual = bool(json.loads((model / "config.json").read_text(encoding="utf-8")).get("micl", True))
    arguments = EncodeArguments(
        str(model), items, "", split=split, encoding=encoding, visual=has_visual, device=device, dtype=dtype
    )
    arguments.allow_remote = loaded.table.allow_remote
    job = json.dumps(_without_places(describe_job(arguments, model, loaded.table)), sort_keys=True)
    folder = Path(cache or Path(HF_HOME) / "notellm2-app") / hashlib.sha256(job.encode()).hexdigest()[:16]
    arguments.output = str(folder / "vectors")
    index, visual = folder / "index", folder / "visual_index" if has_visual else None
    if not index.is_dir() or (visual is not None and not visual.is_dir()):
        manifest = encode(arguments)
        print(
            f"{arguments.output}: {manifest['counts']['items']:,} items, {manifest['counts']['rejects']:,} rows left out"
        )
        build(BuildArguments(arguments.output, str(index)))
        if visual is not None:
            build(BuildArguments(arguments.output, str(visual), visual=True))
    return str(index), None if visual is None else str(visual)


def positions_of_ids(ids: pa.ChunkedArray, items: ItemTable) -> np.ndarray:
    """Place of each indexed item among the table's items, `(n,)` int32.

    Raises:
        ValueError: when the index is not of this table.
    """
    positions = items.item_ids.positions(ids)
    lost = np.flatnonzero(positions < 0)
    if len(lost):
        item_id = ids[int(lost[0])].as_py()
        raise ValueError(f"item_id {item_id!r} of the index is not where it should be in {items.table.source}.")
    return positions


def _similarities(index: Index, query: np.ndarray, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Dot product of the query with the vector of each id, 0 for one that the index lacks, and its row (there, -1)."""
    rows = np.array(
        [-1 if row is None else row for row in rows_of_ids(index.ids["item_id"], list(ids))], dtype=np.int64
    )
    scores = np.zeros(len(rows))
    there = rows >= 0
    if there.any():
        scores[there] = index.faiss_index.reconstruct_batch(rows[there]) @ query
    return scores, rows


def _without_places(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job's description without where model and table were found."""
    return {
        key: _without_places(value) if isinstance(value, Mapping) else value
        for key, value in job.items()
        if key not in ("source", "revision")
    }
