"""Lance tables: read by the rules of all tables, where pylance is installed."""

import sys
from pathlib import Path

import datasets
import lance
import pyarrow as pa
import pytest

from modeling_notellm2.images_notellm2 import load_image
from tests.support.catalogue import png
from training.tables.items import load_items
from training.tables.pairs import load_pairs
from training.tables.rejects import TableError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


ROWS = [
    {"item_id": 7.0, "title": "one", "topics": ["a", ""], "image": png(1)},
    {"item_id": 8.0, "title": None, "topics": None, "image": None},
    {"item_id": None, "title": "three", "topics": None, "image": None},
    {"item_id": 9.0, "title": "four", "topics": None, "image": b"no picture"},
]


def written(path: Path, rows: list[dict], mode: str = "create") -> str:
    lance.write_dataset(pa.Table.from_pylist(rows), str(path), mode=mode)
    return str(path)


def test_the_rules_are_those_of_all_tables(tmp_path):
    items, rejects = load_items(written(tmp_path / "items.lance", ROWS))
    assert list(items) == [{"item_id": "7", "title": "one", "topics": ["a"], "image": png(1)}]
    assert sorted((reject.file, reject.row, reject.ids, reject.reason.partition(":")[0]) for reject in rejects) == [
        ("items.lance", 1, ["8"], "neither text nor image"),
        ("items.lance", 2, [""], "item_id is missing"),
        ("items.lance", 3, ["9"], "unreadable image"),
    ]
    pairs = pa.table({"query_id": [7, 7], "target_id": [8, 10]})
    lance.write_dataset(pairs, str(tmp_path / "pairs.lance"))
    with pytest.raises(TableError, match="none of 2 pairs is usable"):
        load_pairs(str(tmp_path / "pairs.lance"), items)


def test_the_newest_version_counts_without_what_was_deleted(tmp_path):
    place = written(tmp_path / "items.lance", [{"item_id": name, "title": name} for name in "abc"])
    first, _ = load_items(place)
    written(tmp_path / "items.lance", [{"item_id": name, "title": name} for name in "de"], "append")
    table = lance.dataset(place)
    table.delete("item_id = 'b'")
    second, _ = load_items(place)
    assert list(first.item_ids) == ["a", "b", "c"] and list(second.item_ids) == ["a", "c", "d", "e"]
    table.alter_columns({"path": "title", "name": "content"})
    assert next(iter(load_items(place)[0])) == {"item_id": "a", "content": "a"}


def test_a_damaged_file_costs_its_own_rows(tmp_path):
    place = written(tmp_path / "items.lance", [{"item_id": f"a{n}", "title": "x" * 50} for n in range(30)])
    file = next((tmp_path / "items.lance" / "data").iterdir())
    written(tmp_path / "items.lance", [{"item_id": "b", "title": "b"}], "append")
    file.write_bytes(file.read_bytes()[:-40])
    items, rejects = load_items(place)
    assert list(items.item_ids) == ["b"] and len(rejects) == 30
    assert rejects.first().reason.startswith("unreadable row: the Lance file is damaged here")


def test_pictures_that_lie_apart_as_blobs(tmp_path):
    image = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    rows = pa.table([["a"], [png(1)]], schema=pa.schema([("item_id", pa.string()), image]))
    lance.write_dataset(rows, str(tmp_path / "items"), data_storage_version="2.0")
    items, _ = load_items(str(tmp_path / "items"))
    assert load_image(items[0]["image"]).size == (25, 24)


def test_what_is_none_and_what_is_missing_is_said(tmp_path, monkeypatch):
    (tmp_path / "empty.lance").mkdir()
    with pytest.raises(TableError, match="not a readable Lance table"):
        load_items(str(tmp_path / "empty.lance"))
    place = written(tmp_path / "items.lance", ROWS)
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(TableError, match="read with pylance: pip install pylance"):
        load_items(place)
