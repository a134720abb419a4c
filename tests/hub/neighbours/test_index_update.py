"""An index and a database follow a catalogue from version to version, and end where one built from scratch is."""

import json
import shutil
from pathlib import Path

import lancedb
import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from hub.index import BuildArguments, Index, UpdateArguments, build, main, update
from hub.neighbours.exports import export, point_id
from hub.neighbours.index import IDS_FILE
from tests.support.catalogue import write_items, write_shards
from training.tables.commands.handler import OptionError


WIDTH = 16
Vectors = dict[str, np.ndarray]


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def first_version(count: int) -> Vectors:
    chance = np.random.default_rng(0)
    centres = chance.normal(size=(40, WIDTH))
    vectors = unit(centres[chance.integers(0, 40, count)] + 0.5 * chance.normal(size=(count, WIDTH)))
    return {f"i{number}": vector for number, vector in enumerate(vectors)}


def next_version(items: Vectors, seed: int, share: float = 0.03) -> tuple[Vectors, set[str]]:
    """Some items gone, some with another vector, some new, all in another order; and the ids of the changed and new ones."""
    chance = np.random.default_rng(seed)
    ids = list(items)
    chance.shuffle(ids)
    few = max(1, int(share * len(ids)))
    gone, changed = set(ids[:few]), set(ids[few : 2 * few])
    new = {f"v{seed}-{number}" for number in range(few)}
    version = {item_id: items[item_id] for item_id in reversed(ids) if item_id not in gone}
    for item_id in sorted(changed | new):
        near = items[ids[chance.integers(len(ids))]]
        version[item_id] = unit(near[None] + 0.15 * chance.normal(size=(1, WIDTH)))[0]
    return version, changed | new


def write_catalogue(items: Vectors, folder: Path) -> Path:
    """What hub/encode.py would write."""
    shutil.rmtree(folder, ignore_errors=True)
    return write_shards(np.stack(list(items.values())), folder, per_shard=len(items), item_ids=list(items))


def overlap(index: Index, items: Vectors, k: int = 10) -> float:
    """Share of the exact neighbours of some items that an index gives."""
    ids, vectors = list(items), np.stack(list(items.values()))
    queries = np.random.default_rng(1).choice(len(ids), 100, replace=False)
    found = index.search([ids[query] for query in queries], k)
    shares = []
    for query, near in zip(queries, found, strict=True):
        order = [ids[row] for row in np.argsort(-(vectors @ vectors[query]), kind="stable") if row != query][:k]
        shares.append(len({neighbour.item_id for neighbour in near} & set(order)) / k)
    return float(np.mean(shares))


@pytest.mark.parametrize(
    ("kind", "count", "least"), [("flat", 500, 1.0), ("hnsw", 3000, 0.99), ("ivf_pq", 12_000, 0.6)]
)
def test_updates_find_what_an_index_from_scratch_finds(kind, count, least, tmp_path):
    items, folder, place = first_version(count), tmp_path / "vectors", tmp_path / "index"
    build(BuildArguments(str(write_catalogue(items, folder)), str(place), kind))
    for seed in range(1, 4):
        before = items
        items, changed = next_version(items, seed)
        write_catalogue(items, folder)
        settings = update(UpdateArguments(str(place), str(folder)))
        assert settings["added"] == len(changed)
        assert settings["dropped"] == len(before) - (len(items) - len(changed))
        index = Index.load(place)
        assert len(index) == settings["items"] == len(items)
        assert index.faiss_index.ntotal == len(items) + (0 if kind == "flat" else sum_of_dropped(index))
        assert {row for row in index.ids["item_id"].to_pylist() if row is not None} == items.keys()
        for item_id in [*sorted(changed)[:20], *sorted(items)[:20]]:
            row = index.ids["item_id"].to_pylist().index(item_id)
            error = np.abs(index.faiss_index.reconstruct(row) - items[item_id]).max()
            assert error < (0.5 if kind == "ivf_pq" else 1e-6)
        fresh = tmp_path / "fresh"
        build(BuildArguments(str(folder), str(fresh), kind))
        ours, theirs = overlap(index, items), overlap(Index.load(fresh), items)
        assert ours >= least and ours >= theirs - 0.02
        gone = next(item_id for item_id in before if item_id not in items)
        with pytest.raises(ValueError, match="Not in the index"):
            index.search([gone])


def sum_of_dropped(index: Index) -> int:
    return index.ids["item_id"].null_count


def test_an_index_with_many_dropped_rows_is_built_anew(tmp_path):
    items, place = first_version(400), tmp_path / "index"
    build(BuildArguments(str(write_catalogue(items, tmp_path / "v")), str(place), "hnsw"))
    items, _ = next_version(items, 1, share=0.08)
    update(UpdateArguments(str(place), str(write_catalogue(items, tmp_path / "v"))))
    assert Index.load(place).ids["item_id"].null_count == 64
    items, _ = next_version(items, 2, share=0.08)
    update(UpdateArguments(str(place), str(write_catalogue(items, tmp_path / "v"))))
    assert Index.load(place).ids["item_id"].null_count == 0
    assert overlap(Index.load(place), items) > 0.99


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_titles_follow_and_are_asked_for(kind, tmp_path):
    items, place, table = first_version(50), tmp_path / "index", tmp_path / "items.parquet"
    write_items([{"item_id": item_id, "title": f"old {item_id}"} for item_id in items], table)
    build(BuildArguments(str(write_catalogue(items, tmp_path / "v")), str(place), kind, items=str(table)))
    items, _ = next_version(items, 1)
    write_items([{"item_id": item_id, "title": f"new {item_id}"} for item_id in items], table)
    write_catalogue(items, tmp_path / "v")
    with pytest.raises(OptionError, match="has titles: pass --items"):
        update(UpdateArguments(str(place), str(tmp_path / "v")))
    assert main(["update", "--index", str(place), "--embeddings", str(tmp_path / "v"), "--items", str(table)]) in (
        0,
        None,
    )
    index = Index.load(place)
    for neighbour in index.search([next(iter(items))], 30)[0]:
        assert neighbour.title == f"new {neighbour.item_id}"
    assert sorted(json.loads((place / "index.json").read_text())["hashes"]) == [IDS_FILE, "index.faiss"]


@pytest.mark.parametrize("name", ["lancedb", "qdrant", "milvus"])
def test_a_database_follows_by_inserts_and_deletes(name, tmp_path):
    """From export to export; what is loaded ends as the whole of the newest one."""
    items, folder = first_version(200), tmp_path / "v"
    export(str(write_catalogue(items, folder)), name, str(tmp_path / "0"))
    key = "id" if name == "qdrant" else "item_id"
    database = {row[key]: row for row in ds.dataset(tmp_path / "0").to_table().to_pylist()}
    for number in (1, 2):
        items, changed = next_version(items, number)
        write_catalogue(items, folder)
        counts = export(str(folder), name, str(tmp_path / str(number)), since=str(tmp_path / str(number - 1)))
        assert counts.written == len(changed)
        upserts = ds.dataset(tmp_path / str(number)).to_table().to_pylist()
        deletes = pq.read_table(tmp_path / str(number) / "_deletes.parquet").to_pylist()
        assert len(upserts) == counts.written and len(deletes) == counts.deleted > 0
        if name == "qdrant":
            assert all(row["id"] == point_id(row["item_id"]) for row in deletes)
        for row in deletes:
            del database[row[key]]
        database |= {row[key]: row for row in upserts}
        export(str(folder), name, str(tmp_path / "whole"))
        assert database == {row[key]: row for row in ds.dataset(tmp_path / "whole").to_table().to_pylist()}
    with pytest.raises(ValueError, match="has format"):
        export(str(folder), "milvus" if name == "qdrant" else "qdrant", str(tmp_path / "x"), since=str(tmp_path / "0"))


def test_lancedb_takes_the_changes_as_the_readme_says(tmp_path):
    items, folder = first_version(60), tmp_path / "v"
    export(str(write_catalogue(items, folder)), "lancedb", str(tmp_path / "all"))
    table = lancedb.connect(tmp_path / "db").create_table("items", ds.dataset(tmp_path / "all").to_table())
    items, _ = next_version(items, 1)
    export(str(write_catalogue(items, folder)), "lancedb", str(tmp_path / "new"), since=str(tmp_path / "all"))
    changes = ds.dataset(tmp_path / "new").to_table()
    table.merge_insert("item_id").when_matched_update_all().when_not_matched_insert_all().execute(changes)
    gone = pq.read_table(tmp_path / "new" / "_deletes.parquet")["item_id"].to_pylist()
    table.delete(f"item_id IN ({', '.join(map(repr, gone))})")
    there = {row["item_id"]: row["vector"] for row in table.to_arrow().to_pylist()}
    assert there.keys() == items.keys()
    assert all(np.array_equal(np.float32(there[item_id]), vector) for item_id, vector in items.items())
