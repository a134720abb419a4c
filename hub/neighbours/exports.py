"""Encoded catalogues in the layouts that vector databases load, one Parquet file or more for each shard.

LanceDB takes a fixed-size list beside plain columns. Qdrant's points are `id` (a number or UUID, so the item's id becomes a
UUID, always the same one), `vector` and `payload`; a row is the arguments of a `PointStruct`. Milvus imports files whose
columns are the collection's fields, vectors as plain lists, and knows no missing text. The README has five lines for each.
"""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from hub.catalogue.catalogue import Batch, Catalogue, TitleArguments, new_folder
from hub.catalogue.shards import embeddings_array, write_parquet
from training.tables.commands.files import write_json
from training.tables.commands.outputs import Output, claimed


RECORD, ITEMS, DELETES = "_export.json", "_items.parquet", "_deletes.parquet"
"""What was exported; which items, by their states; what to delete. The underscore keeps readers from taking them for data."""
STATES = pa.schema({"item_id": pa.string(), "state": pa.uint64()})
ID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "notellm2/item_id")


@dataclass(frozen=True)
class Exported:
    """How many items were written, to be inserted or to replace older ones, and how many are to be deleted."""

    written: int
    deleted: int


def export(
    embeddings: str,
    name: str,
    output: str,
    items: str | None = None,
    split: str | None = None,
    encoding: str | None = None,
    since: str | None = None,
    allow_remote: str | None = None,
) -> Exported:
    """Write a catalogue for a database; or, since an earlier export, what it must insert and delete.

    Args:
        embeddings: folder that hub/encode.py wrote.
        name: of `FORMATS`.
        output: folder to write; an earlier export there is replaced.
        items, split, encoding, allow_remote: the item table that was encoded, for titles.
        since: folder of an earlier export, or of the changes since an earlier one.

    Raises:
        ValueError: for embeddings, an item table or an earlier export that can't be relied on, or an `output` that is
            something else.
    """
    with claimed([Output("--output", Path(output))], (embeddings, items, since)), new_folder(Path(output)) as folder:
        catalogue = Catalogue.open(embeddings)
        table = TitleArguments(items=items, split=split, encoding=encoding, allow_remote=allow_remote).table()
        known = _known(Path(since), name, catalogue.width, titles=table is not None) if since else STATES.empty_table()
        known_states = known["state"].combine_chunks()
        written = 0
        with pq.ParquetWriter(folder / ITEMS, STATES) as states:
            for number, batch in enumerate(catalogue.batches(items=table)):
                now = _states(batch)
                states.write_batch(now)
                changed = batch.filter(pc.invert(pc.is_in(now["state"], known_states)))
                if len(changed.item_ids):
                    write_parquet(FORMATS[name](changed), folder / f"vectors-{number:05d}.parquet")
                    written += len(changed.item_ids)
        now_there = pq.read_table(folder / ITEMS, columns=["item_id"])["item_id"].combine_chunks()
        gone = known.filter(pc.invert(pc.is_in(known["item_id"], now_there)))["item_id"].combine_chunks()
        if since:
            write_parquet(pa.table({"item_id": gone, **_keys(name, gone)}), folder / DELETES)
        record = {"format": name, "width": catalogue.width, "items": written, "metric": "inner_product"}
        record |= {"titles": table is not None, "since": since}
        write_json({**record, "model": catalogue.manifest["job"]["model"]}, folder / RECORD)
    return Exported(written, len(gone))


def _known(since: Path, name: str, width: int, titles: bool) -> pa.Table:
    """Ids and states that a database has once it has loaded an earlier export."""
    missing = [file for file in (RECORD, ITEMS) if not (since / file).is_file()]
    if missing:
        raise ValueError(f"--since {since} is no export: {' and '.join(missing)} is missing.")
    record = json.loads((since / RECORD).read_text(encoding="utf-8"))
    for what, now in (("format", name), ("width", width), ("titles", titles)):
        if record.get(what) != now:
            raise ValueError(
                f"--since {since} has {what} {record.get(what)}, this export {now}: export all of it anew."
            )
    return pq.read_table(since / ITEMS)


def _states(batch: Batch) -> pa.RecordBatch:
    """Ids, and 64 bits of what a database gets of each item."""
    states = batch.states()
    if batch.titles is not None:
        pairs = zip(states.to_pylist(), batch.titles.to_pylist(), strict=True)
        states = pa.array(
            (xxhash.xxh3_64_intdigest(f"{state} {title}".encode()) for state, title in pairs), pa.uint64()
        )
    return pa.record_batch({"item_id": batch.item_ids, "state": states}, STATES)


def _keys(name: str, item_ids: pa.Array) -> dict[str, list[str]]:
    """By what a database knows items, where that isn't their id."""
    return {"id": [point_id(item_id) for item_id in item_ids.to_pylist()]} if name == "qdrant" else {}


def point_id(item_id: str) -> str:
    """An item's UUID in Qdrant, always the same one."""
    return str(uuid.uuid5(ID_NAMESPACE, item_id))


def lancedb_table(batch: Batch) -> pa.Table:
    """`item_id`, perhaps `title`, and `vector`, a fixed-size list of float32."""
    return pa.table({**batch.metadata(), "vector": embeddings_array(batch.vectors, "float32")})


def qdrant_table(batch: Batch) -> pa.Table:
    """`id` (UUID as text), `vector` and `payload` with `item_id` and perhaps `title`."""
    columns = batch.metadata()
    return pa.table(
        {
            "id": [point_id(item_id) for item_id in batch.item_ids.to_pylist()],
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
