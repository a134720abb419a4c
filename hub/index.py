"""Nearest neighbours over an encoded catalogue: builds a FAISS index, searches it, exports vectors for other databases.

    python hub/index.py --embeddings DIR --output INDEX
    python hub/index.py search --index INDEX --id ID -k 20              (or --item ITEM.json)
    python hub/index.py export --embeddings DIR --format lancedb --output FOLDER

    Index.load("INDEX").search(["some-id"], k=20)                       (or an array of vectors)

INDEX gets index.faiss, ids.arrow (`item_id`, and `title` with --items) and index.json; the first two are mapped into
memory, not read.
"""

import training.tables.own_folder  # noqa: F401  # isort: skip

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from rich.table import Table
from rich.text import Text

from hub.catalogue.catalogue import EMBEDDING, VISUAL_EMBEDDING, Catalogue, new_folder, rows_of_ids
from hub.catalogue.encoder import ItemEncoder, Place
from hub.catalogue.exports import FORMATS, export
from hub.encode import describe_model, find_model
from modeling_notellm2 import DTYPES, choose_precision
from training.tables.bounds import AtLeastOne, check_bounds
from training.tables.columns import item_of
from training.tables.commands import DONE, OptionError, about, command, parse, plain_console
from training.tables.files import write_json
from training.tables.items import load_items
from training.tables.outputs import Output, claimed
from training.tables.texts import CellError


INDEX_FILE, IDS_FILE, RECORD = "index.faiss", "ids.arrow", "index.json"
PQ_BITS = 8
POINTS_PER_CENTROID = 39
"""k-means of FAISS wants at least so many training vectors for each centroid."""


Queries = np.ndarray | Sequence[np.ndarray] | Sequence[Sequence[float]] | Sequence[str]


@dataclass
class BuildArguments:
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
    items: str | None = field(default=None, metadata={"help": "The item table that was encoded, for titles."})
    split: str | None = field(default=None, metadata={"help": "Its split, as it was encoded."})
    encoding: str | None = field(default=None, metadata={"help": "Its encoding, as it was encoded."})


@dataclass
class SearchArguments:
    """What to look for."""

    index: str = field(metadata={"help": "Folder of an index."})
    id: str | None = field(default=None, metadata={"help": "An item of the index; it is left out of its own result."})
    item: str | None = field(
        default=None, metadata={"help": "JSON file of an item; its image path starts at the file's folder."}
    )
    k: AtLeastOne = field(default=20, metadata={"help": "Number of neighbours.", "aliases": ["-k"]})
    model: str | None = field(
        default=None, metadata={"help": "With --item: where the model is now; none: where it was when encoding."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "With --item: type of the model's weights; auto: as the machine.", "choices": list(DTYPES)},
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass
class ExportArguments:
    """What to export, and for which database."""

    embeddings: str = field(metadata={"help": "Folder that hub/encode.py wrote."})
    output: str = field(metadata={"help": "Folder to write. An earlier export there is replaced."})
    format: str = field(metadata={"help": "The database that shall load it.", "choices": list(FORMATS)})
    items: str | None = field(default=None, metadata={"help": "The item table that was encoded, for titles."})
    split: str | None = field(default=None, metadata={"help": "Its split, as it was encoded."})
    encoding: str | None = field(default=None, metadata={"help": "Its encoding, as it was encoded."})


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
        settings: what index.json holds: kind, metric, width, items, embedding, parameters, model.
        faiss_index: the index itself.
        ids: `item_id` and perhaps `title` of each of its rows.
    """

    settings: dict[str, Any]
    faiss_index: Any
    ids: pa.Table

    @classmethod
    def load(cls, path: str | Path) -> "Index":
        """Map an index into memory.

        Raises:
            ValueError: when the folder is none, or its files don't belong together.
        """
        path = Path(path)
        missing = [name for name in (RECORD, INDEX_FILE, IDS_FILE) if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{path} is no index: {', '.join(missing)} is missing. hub/index.py builds one.")
        with about(path, "A file in it was edited or damaged: build the index again."):
            settings = json.loads((path / RECORD).read_text(encoding="utf-8"))
            faiss_index = faiss.read_index(str(path / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
            ids = pa.ipc.open_file(pa.memory_map(str(path / IDS_FILE))).read_all()
            items = settings["items"]
        if not faiss_index.ntotal == len(ids) == items:
            raise ValueError(f"{path}: {faiss_index.ntotal} vectors, {len(ids)} ids; build the index again.")
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

    def _search(self, vectors: np.ndarray, own_rows: Sequence[int | None], k: int) -> list[list[Neighbour]]:
        if vectors.ndim != 2 or vectors.shape[1] != self.width or not np.isfinite(vectors).all():
            raise ValueError(f"Queries of shape {vectors.shape}; expected finite vectors (n, {self.width}).")
        most = min(k + 1, len(self.ids))
        scores, rows = self.faiss_index.search(np.ascontiguousarray(vectors, dtype=np.float32), most)
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


def build(arguments: BuildArguments) -> dict[str, Any]:
    """Build an index; returns what index.json holds.

    Raises:
        ValueError: for embeddings or an item table that can't be relied on, or too few items for the kind.
    """
    catalogue = Catalogue.open(arguments.embeddings)
    table = None
    if arguments.items:
        table, _ = load_items(arguments.items, arguments.split, check_images=False, encoding=arguments.encoding)
    column = VISUAL_EMBEDDING if arguments.visual else EMBEDDING
    count = len(catalogue)
    if arguments.visual:
        count = sum(len(batch.item_ids) for batch in catalogue.batches(column))
    parameters = choose_parameters(arguments.kind, count, catalogue.width)
    with new_folder(Path(arguments.output), RECORD) as folder:
        index = make_index(arguments.kind, catalogue.width, parameters)
        if not index.is_trained:
            index.train(sample(catalogue, column, count, parameters["training_items"]))
        schema = pa.schema({"item_id": pa.string()} | ({"title": pa.string()} if table else {}))
        with pa.OSFile(str(folder / IDS_FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as ids:
            for batch in catalogue.batches(column, table):
                index.add(batch.vectors)
                ids.write_batch(pa.record_batch(batch.metadata(), schema))
        if arguments.kind == "ivf_pq":
            index.make_direct_map()  # so that an id can be searched
        faiss.write_index(index, str(folder / INDEX_FILE))
        settings = {
            "kind": arguments.kind,
            "metric": "inner_product",
            "width": catalogue.width,
            "items": index.ntotal,
            "embedding": column,
            "parameters": parameters,
            "model": catalogue.manifest["job"]["model"],
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
    chosen = np.sort(np.random.default_rng(0).choice(count, size, replace=False))
    parts, first = [], 0
    for batch in catalogue.batches(column):
        behind = first + len(batch.item_ids)
        here = chosen[slice(*np.searchsorted(chosen, (first, behind)))]
        parts.append(batch.vectors[here - first])
        first = behind
    return np.concatenate(parts)


def encode_item(path: Path, index: Index, model: str | None, dtype: str = "auto") -> np.ndarray:
    """Vector `(1, d)` of an item in a JSON file, by the model that encoded the index.

    Raises:
        ValueError: for a file that holds no item, an item that can't be encoded, or another model.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: an item is a JSON object, this is a {type(raw).__name__}.")
    known = index.settings["model"]
    folder = find_model(model or known["source"], None if model else known["revision"])
    changed = [name for name, digest in describe_model(folder).items() if known["files"].get(name, digest) != digest]
    if changed:
        raise ValueError(f"{folder} is not the model of this index: {', '.join(changed)} differs.")
    visual = index.settings["embedding"] == VISUAL_EMBEDDING
    encoder = ItemEncoder(str(folder), choose_precision(dtype).name, visual=visual)
    try:
        item = item_of(raw, path.parent)
    except CellError as error:
        raise ValueError(f"{path}: {error}.") from error
    block = encoder.embed(encoder.prepare(0, [(Place(item["item_id"] or path.stem, path.name, 0), item)]))
    if not block.item_ids:
        raise ValueError(f"{path}: {block.rejects[0].reason}.")
    if visual and not block.has_image[0]:
        raise ValueError(f"{path}: this index holds visual embeddings and the item has no image.")
    chosen = block.visual_embeddings if visual else block.embeddings
    assert chosen is not None
    return chosen


def search(arguments: SearchArguments) -> Table:
    """The neighbours of an item as a table to print."""
    if (arguments.id is None) == (arguments.item is None):
        raise OptionError("Pass either --id or --item.")
    index = Index.load(arguments.index)
    if arguments.id is not None:
        queries: np.ndarray | list[str] = [arguments.id]
    else:
        queries = encode_item(Path(arguments.item or ""), index, arguments.model, arguments.dtype)
    name = arguments.id or arguments.item
    table = Table(title=Text(f"Nearest to {name} of {len(index.ids):,} items"), title_justify="left")
    for column in ("#", "score", "item_id", "title"):
        table.add_column(column, justify="right" if column in ("#", "score") else "left", overflow="fold")
    for number, near in enumerate(index.search(queries, arguments.k)[0], 1):
        table.add_row(str(number), f"{near.score:.4f}", printable(near.item_id), printable(near.title or ""))
    return table


def printable(text: str) -> Text:
    """A catalogue's text as it is, but for characters that would steer the terminal."""
    return Text("".join(character if character.isprintable() else " " for character in text))


def write(arguments: BuildArguments | ExportArguments) -> None:
    """Build or export, and say what was written."""
    if isinstance(arguments, ExportArguments):
        count = export(
            arguments.embeddings,
            arguments.format,
            arguments.output,
            arguments.items,
            arguments.split,
            arguments.encoding,
        )
        print(f"{arguments.output}: {count:,} items for {arguments.format}")
    else:
        settings = build(arguments)
        print(f"{arguments.output}: {settings['items']:,} items, {settings['kind']}, {settings['width']} dimensions")


@command("hub/index.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    given = sys.argv[1:] if options is None else list(options)
    arguments_of = {"build": BuildArguments, "search": SearchArguments, "export": ExportArguments}
    verb = given.pop(0) if given and given[0] in ("search", "export") else "build"
    (arguments,) = parse(arguments_of[verb], options=given, prog=f"hub/index.py {verb}")
    if verb == "search":
        plain_console().print(search(arguments))
        return DONE
    with claimed([Output("--output", Path(arguments.output))], (arguments.embeddings, arguments.items)):
        write(arguments)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
