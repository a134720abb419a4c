"""Builds an index over an encoded catalogue, with sizes that fit the data."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from hub.catalogue.catalogue import Catalogue, TitleArguments, new_folder, vectors_at
from hub.catalogue.shards import EMBEDDING, VISUAL_EMBEDDING
from hub.neighbours.index import IDS_FILE, INDEX_FILE, RECORD, hashes_of
from training.tables.commands.files import write_json
from training.tables.commands.outputs import Output, claimed
from training.tables.items import ItemTable


PQ_BITS = 8
POINTS_PER_CENTROID = 39
"""k-means of FAISS wants at least this many training vectors for each centroid."""


@dataclass
class BuildArguments(TitleArguments):
    """What to index, and how."""

    embeddings: str = field(metadata={"help": "Folder that hub/encode.py wrote."})
    output: str = field(metadata={"help": "Folder to write. An earlier index there is replaced."})
    kind: str = field(
        default="flat",
        metadata={
            "help": "flat: exact. hnsw: a graph, approximate, fast, larger than flat. ivf_pq: clusters and codes, "
            "approximate, 8 times smaller than flat.",
            "choices": ["flat", "hnsw", "ivf_pq"],
        },
    )
    visual: bool = field(default=False, metadata={"help": "Index the visual embeddings, of items with an image."})


def build(arguments: BuildArguments) -> dict[str, Any]:
    """Build an index; returns what index.json holds.

    Raises:
        ValueError: for embeddings or an item table that can't be relied on, too few items for the kind, or an output that
            can't be written to.
    """
    with claimed([Output("--output", Path(arguments.output))], (arguments.embeddings, arguments.items)):
        column = VISUAL_EMBEDDING if arguments.visual else EMBEDDING
        catalogue = Catalogue.open(arguments.embeddings)
        return build_from(catalogue, column, arguments.table(), arguments.kind, Path(arguments.output))


def build_from(catalogue: Catalogue, column: str, table: ItemTable | None, kind: str, output: Path) -> dict[str, Any]:
    """What `build` does, of an encoded catalogue.

    Args:
        column: "embedding" or "visual_embedding".
        table: the item table that was encoded, for titles.
        kind: of `BuildArguments`.
        output: folder to write.
    """
    count = len(catalogue)
    if column == VISUAL_EMBEDDING:
        count = sum(len(batch.item_ids) for batch in catalogue.batches(column))
    parameters = choose_parameters(kind, count, catalogue.width)
    with new_folder(output) as folder:
        index = make_index(kind, catalogue.width, parameters)
        if not index.is_trained:
            index.train(sample(catalogue, column, count, parameters["training_items"]))
        with pa.OSFile(str(folder / IDS_FILE), "wb") as sink, pa.ipc.new_file(sink, ids_schema(table)) as ids:
            for batch in catalogue.batches(column, table):
                index.add(batch.vectors)
                ids.write_batch(pa.record_batch(batch.metadata() | {"state": batch.states()}, ids_schema(table)))
        if kind == "ivf_pq":
            index.make_direct_map()  # so that an id can be searched
        made = {"kind": kind, "embedding": column, "parameters": parameters, "items": index.ntotal}
        return write_index(index, folder, made, catalogue)


def ids_schema(table: ItemTable | None) -> pa.Schema:
    """Of ids.arrow; titles are there where an item table is."""
    titles = {} if table is None else {"title": pa.string()}
    return pa.schema({"item_id": pa.string()} | titles | {"state": pa.uint64()})


def write_index(index: Any, folder: Path, made: dict[str, Any], catalogue: Catalogue) -> dict[str, Any]:
    """Write FAISS's part and the record of an index whose ids are there; returns what index.json holds.

    Args:
        made: kind, embedding, parameters and items.
    """
    with (folder / INDEX_FILE).open("wb") as stream:  # by its name FAISS would only print that the disk is full
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))  # type: ignore[attr-defined]  # not in its stubs
    settings = {
        "kind": made["kind"],
        "metric": "inner_product",
        "width": catalogue.width,
        "items": made["items"],
        "embedding": made["embedding"],
        "parameters": made["parameters"],
        "model": catalogue.manifest["job"]["model"],
        "dtype": catalogue.manifest["job"]["settings"]["dtype"],
        "hashes": hashes_of(folder),
        "faiss": faiss.__version__,
    }
    write_json(settings, folder / RECORD)
    return settings


def choose_parameters(kind: str, count: int, width: int) -> dict[str, int]:
    """Sizes that fit the data, by FAISS' guidelines.

    hnsw: 32 links of each item (64 on the lowest level), 200 candidates while building, 128 while searching. ivf_pq:
    nlist = 4 sqrt(count) clusters, of which an eighth (at least 16) is searched, codes of one byte for each 2 dimensions
    or the next more that divide the width; trained on 64 items for each cluster.

    Raises:
        ValueError: for too few items or a width that can't be divided.
    """
    if kind == "flat":
        return {}
    if kind == "hnsw":
        return {"links": 32, "candidates_building": 200, "candidates_searching": 128}
    least = POINTS_PER_CENTROID * 2**PQ_BITS
    if count < least:
        raise ValueError(f"ivf_pq is trained on at least {least:,} items and there are {count:,}; take flat or hnsw.")
    codes = max(number for number in range(1, width // 2 + 1) if width % number == 0)
    if codes == 1:
        raise ValueError(
            f"ivf_pq cuts vectors into equal parts and {width} dimensions can't be cut; take flat or hnsw."
        )
    nlist = min(round(4 * math.sqrt(count)), count // POINTS_PER_CENTROID)
    return {
        "nlist": nlist,
        "nprobe": min(nlist, max(16, nlist // 8)),
        "code_bytes": codes,
        "training_items": min(count, max(64 * nlist, 64 * 2**PQ_BITS)),
    }


def make_index(kind: str, width: int, parameters: dict[str, int]) -> Any:
    """An empty FAISS index for inner products, with its defaults for searching set."""
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, parameters["links"], faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = parameters["candidates_building"]
        graph.hnsw.efSearch = parameters["candidates_searching"]
        return graph
    clusters = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFPQ(
        clusters, width, parameters["nlist"], parameters["code_bytes"], PQ_BITS, faiss.METRIC_INNER_PRODUCT
    )
    index.nprobe = parameters["nprobe"]
    return index


def sample(catalogue: Catalogue, column: str, count: int, size: int) -> np.ndarray:
    """`size` vectors drawn at random from the whole catalogue, always the same: `(size, d)` float32."""
    return vectors_at(catalogue, column, np.sort(np.random.default_rng(0).choice(count, size, replace=False)))
