"""Item tables of the encoder's tests: good rows of all shapes, rows with every fault, and what the shards hold."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hub.catalogue.shards import MANIFEST, embeddings_array
from hub.encode import EncodeArguments
from hub.neighbours.index import IDS_FILE, INDEX_FILE, RECORD, hashes_of
from training.tables.commands.files import write_json
from training.tables.commands.hashes import file_sha256


SMALL = {
    "batch_size": 4,
    "rows_per_block": 8,
    "rows_per_shard": 16,
    "num_workers": 0,
    "device": "cpu",
    "dtype": "float32",
}


def png(number: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + number % 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def make_items(count: int) -> list[dict]:
    """Items of all shapes: with and without picture, texts of many lengths."""
    words = ["tree", "river", "stone", "lamp", "paper", "glass", "cloud", "wheel"]
    return [
        {
            "item_id": f"n{number}",
            "title": words[number % 8] if number % 3 else None,
            "topics": words[: number % 4],
            "content": " ".join(words[: 1 + number % 8]) + str(number),
            "image": png(number) if number % 5 else None,
        }
        for number in range(count)
    ]


def arguments(model: Path, items: Path, output: Path, **options) -> EncodeArguments:
    """Of a small job; in float32 unless the options say otherwise, so that any machine gives the same."""
    return EncodeArguments(str(model), str(items), str(output), **{**SMALL, **options})


def write_items(items: list[dict], path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(items), path, row_group_size=13)
    return path


def write_index(vectors: np.ndarray, folder: Path) -> Path:
    """An exact index of items n0, n1, ..., with what a search by id reads of it."""
    folder.mkdir(parents=True, exist_ok=True)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.astype(np.float32))
    faiss.write_index(index, str(folder / INDEX_FILE))
    ids = pa.table({"item_id": [f"n{number}" for number in range(len(vectors))]})
    with pa.OSFile(str(folder / IDS_FILE), "wb") as sink, pa.ipc.new_file(sink, ids.schema) as writer:
        writer.write_table(ids)
    write_json({"width": vectors.shape[1], "items": len(vectors), "hashes": hashes_of(folder)}, folder / RECORD)
    return folder


def read_shards(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("shard-*.parquet")))


def vectors(table: pa.Table, column: str = "embedding") -> np.ndarray:
    return np.array(table.column(column).to_pylist(), dtype=np.float32)


def checksums(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["complete"]
    return {name: shard["sha256"] for name, shard in manifest["shards"].items()}


def messy_rows() -> tuple[list[str], dict[int, tuple[str, str]]]:
    """JSON lines with every kind of fault, and for each faulty line its id and a part of its reason."""
    good = make_items(40)
    lines = [json.dumps({key: value for key, value in item.items() if key != "image"}) for item in good]
    bad = {
        3: ("{broken", "", "Expecting property name"),
        4: ('{"item_id": "", "title": "no id"}', "", "item_id is missing"),
        7: ('{"title": "no id"}', "", "item_id is missing"),
        9: (json.dumps({"item_id": "cut", "image": "cut.png"}), "cut", "image can't be read"),
        10: (json.dumps({"item_id": "gone", "image": ["fine.png", "gone.png"]}), "gone", "gone.png does not exist"),
        11: (json.dumps({"item_id": "empty", "title": " \n", "topics": []}), "empty", "neither text nor image"),
        17: (json.dumps({"item_id": " n2 ", "title": "again"}), "n2", "item_id stands in an earlier row"),
        18: ('{"item_id": "topics", "topics": 5}', "topics", "topics must be text or a list of texts"),
        25: ('{"item_id": "half\\ud800", "title": "x"}', "", "item_id is not valid Unicode"),
        26: ('{"item_id": "half", "title": "x\\ud800"}', "half", "title is not valid Unicode"),
        33: ('{"item_id": 5, "image": "", "image_file_name": ["a"]}', "5", "image"),
        38: ("[" * 100_000, "", "recursion"),
    }
    for line, (text, _, _) in bad.items():
        lines[line] = text
    return lines, {line: (item_id, reason) for line, (_, item_id, reason) in bad.items()}


def write_shards(
    vectors: np.ndarray,
    folder: Path,
    per_shard: int = 5000,
    embedding_type: str = "float32",
    item_ids: Sequence[str] | None = None,
    model_files: Mapping[str, str] | None = None,
) -> Path:
    """A folder as hub/encode.py leaves it, of vectors made up."""
    item_ids = [f"n{row}" for row in range(len(vectors))] if item_ids is None else item_ids
    folder.mkdir()
    shards = {}
    for number, first in enumerate(range(0, len(vectors), per_shard)):
        part = vectors[first : first + per_shard]
        path = folder / f"shard-{number:05d}.parquet"
        pq.write_table(
            pa.table(
                {"item_id": item_ids[first : first + per_shard], "embedding": embeddings_array(part, embedding_type)}
            ),
            path,
        )
        shards[path.name] = {"items": len(part), "rejects": 0, "sha256": file_sha256(path)}
    model = {"source": "made up", "revision": None, "files": dict(model_files or {})}
    job = {"model": model, "settings": {"dtype": "float32"}}
    counts = {"items": len(vectors)}
    scale = 127 if embedding_type == "int8" else 1
    manifest = {"complete": True, "job": job, "width": vectors.shape[1], "scale": scale, "counts": counts}
    write_json({**manifest, "shards": shards}, folder / "manifest.json")
    return folder
