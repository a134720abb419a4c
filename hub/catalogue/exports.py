"""Encoded catalogues in the layouts that vector databases load, one Parquet file or more for each shard.

LanceDB takes a fixed-size list beside plain columns. Qdrant's points are `id` (a number or UUID, so the item's id becomes a
UUID, always the same one), `vector` and `payload`; a row is the arguments of a `PointStruct`. Milvus imports files whose
columns are the collection's fields, vectors as plain lists, and knows no missing text. The README has five lines for each.
"""

import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from hub.catalogue.catalogue import Batch, Catalogue, new_folder
from hub.catalogue.shards import embeddings_array, write_parquet
from training.tables.commands.files import write_json
from training.tables.commands.outputs import Output, claimed
from training.tables.items import load_items


RECORD = "_export.json"  # the underscore keeps readers of the folder from taking it for data
ID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "notellm2/item_id")


def export(
    embeddings: str,
    name: str,
    output: str,
    items: str | None = None,
    split: str | None = None,
    encoding: str | None = None,
) -> int:
    """Write a catalogue for a database; returns the number of items.

    Args:
        embeddings: folder that hub/encode.py wrote.
        name: of `FORMATS`.
        output: folder to write; an earlier export there is replaced.
        items, split, encoding: the item table that was encoded, for titles.

    Raises:
        ValueError: for embeddings or an item table that can't be relied on, or an `output` that is something else.
    """
    with claimed([Output("--output", Path(output))], (embeddings, items)), new_folder(Path(output)) as folder:
        catalogue = Catalogue.open(embeddings)
        table = load_items(items, split, check_images=False, encoding=encoding)[0] if items else None
        for number, batch in enumerate(catalogue.batches(items=table)):
            write_parquet(FORMATS[name](batch), folder / f"vectors-{number:05d}.parquet")
        record = {"format": name, "width": catalogue.width, "items": len(catalogue), "metric": "inner_product"}
        write_json({**record, "model": catalogue.manifest["job"]["model"]}, folder / RECORD)
    return len(catalogue)


def lancedb_table(batch: Batch) -> pa.Table:
    """`item_id`, perhaps `title`, and `vector`, a fixed-size list of float32."""
    return pa.table({**batch.metadata(), "vector": embeddings_array(batch.vectors, "float32")})


def qdrant_table(batch: Batch) -> pa.Table:
    """`id` (UUID as text), `vector` and `payload` with `item_id` and perhaps `title`."""
    columns = batch.metadata()
    return pa.table(
        {
            "id": [str(uuid.uuid5(ID_NAMESPACE, item_id)) for item_id in batch.item_ids.to_pylist()],
            "vector": _lists(batch),
            "payload": pa.StructArray.from_arrays(list(columns.values()), list(columns)),
        }
    )


def milvus_table(batch: Batch) -> pa.Table:
    """`item_id`, perhaps `title` (empty where there is none), and `vector`, a list of float32."""
    columns = {name: column.fill_null("") for name, column in batch.metadata().items()}
    return pa.table({**columns, "vector": _lists(batch)})


def _lists(batch: Batch) -> pa.ListArray:
    return embeddings_array(batch.vectors, "float32").cast(pa.list_(pa.float32()))


FORMATS: dict[str, Callable[[Batch], pa.Table]] = {
    "lancedb": lancedb_table,
    "qdrant": qdrant_table,
    "milvus": milvus_table,
}
