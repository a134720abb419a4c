"""Item and pair tables: every kind of file gives the same items, and every row left out is listed with its reason."""

import io
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.batches.false_negatives import image_hashes
from training.tables.columns import item_of
from training.tables.items import load_items
from training.tables.pairs import load_pairs
from training.tables.rejects import TableError, write_rejects


SCHEMA = pa.schema(
    {name: pa.string() for name in ("item_id", "title", "content")}
    | {"topics": pa.list_(pa.string()), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
)


def png(colour: str, size: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_tables_of_every_kind_give_the_same_items(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    expected = [
        {"item_id": "1", "title": "A", "topics": ["x", "y"], "image": str(tmp_path / "a.png")},
        {"item_id": "2", "content": "B"},
    ]
    (tmp_path / "items.csv").write_text(
        'item_id,title,topics,content,image\n1,A,"x, y",,a.png\n2,,,B,\n,C,,,\n1,A,,,\nshort\n5,,[x,,\n'
    )
    (tmp_path / "items.jsonl").write_text(
        '{"item_id": 1, "title": "A", "topics": ["x", "y"], "image": "a.png"}\nnot json\n\n'
        '{"item_id": "2", "content": "B"}\n{"item_id": 3, "title": ["wrong"]}\n{"item_id": 4, "image": "no.png"}\n'
    )

    items, rejects = load_items(str(tmp_path / "items.csv"))
    assert list(items) == expected == items[0:2] == [items[0], items[1]]
    assert sorted((reject.row, reject.reason.split(":")[0]) for reject in rejects) == [
        (2, "item_id is missing"),
        (3, "item_id stands in an earlier row"),
        (4, "unreadable row"),
        (5, "unreadable topics"),
    ]
    assert {name: present.tolist() for name, present in items.fields_present().items()} == {
        name: [name in item for item in expected] for name in ("title", "topics", "content", "image")
    }
    items, rejects = load_items(str(tmp_path / "items.jsonl"))
    assert list(items) == expected
    assert sorted(reject.row for reject in rejects) == [1, 4, 5]
    assert {reject.row: reject.ids for reject in rejects}[5] == ["4"]

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "metadata.csv").write_text("file_name,item_id,title\na.png,1,A\n")
    items, rejects = load_items(str(tmp_path / "photos"))
    assert items[0]["title"] == "A"
    assert not rejects


def test_a_table_is_copied_again_only_when_its_content_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "items.jsonl"
    path.write_text('{"item_id": "a", "title": "first"}\nbroken\n')
    load_items(str(path))
    monkeypatch.setattr("training.tables.reading._write_copy", None)
    items, rejects = load_items(str(path))
    assert (items[0]["title"], len(rejects)) == ("first", 1)
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = path.stat()
    path.write_text('{"item_id": "a", "title": "other"}\nbroken\n')  # as long, and as old: rsync -a, cp -p
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    items, rejects = load_items(str(path))
    assert (items[0]["title"], len(rejects)) == ("other", 1)
    assert not list(tmp_path.rglob(".*.partial"))


def test_column_checks_agree_with_a_look_at_each_row(tmp_path):
    """The vectorised screening leaves exactly those rows that `item_of` finds empty."""
    generator = np.random.default_rng(0)
    texts = ["", " ", None, "word"]
    topics = [None, [], [""], [" "], ["x"], ["", "y"]]
    images = [None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}, {"bytes": png("red"), "path": None}]
    rows = [
        {
            "item_id": f" {number} " if number % 2 else str(number),
            "title": texts[generator.integers(4)],
            "content": texts[generator.integers(4)],
            "topics": topics[generator.integers(6)],
            "image": images[generator.integers(4)],
        }
        for number in range(300)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "items.parquet")
    expected = [item for row in rows if len(item := item_of(row, tmp_path)) > 1]

    items, rejects = load_items(str(tmp_path / "items.parquet"))

    assert 0 < len(rejects) < 100
    assert list(items) == expected
    assert list(items.item_ids) == [item["item_id"] for item in expected]
    for name, present in items.fields_present().items():
        assert present.tolist() == [name in item for item in expected]
    assert items.item_ids[3] == expected[3]["item_id"]
    ids = pa.array([expected[5]["item_id"], "nowhere", expected[2]["item_id"]])
    assert items.item_ids.positions(ids).tolist() == [5, -1, 2]
    chosen = items.select([7, 2])
    assert [item["item_id"] for item in chosen] == [expected[7]["item_id"], expected[2]["item_id"]]
    assert chosen.where("title", "word").tolist() == [
        i for i, at in enumerate((7, 2)) if expected[at].get("title") == "word"
    ]
    with pytest.raises(TableError, match="no column 'colour'"):
        items.column("colour")


def test_pairs_become_positions_groups_and_negatives(tmp_path):
    pq.write_table(pa.table({"item_id": list(range(6)), "title": list("abcdef")}), tmp_path / "items.parquet")
    items, _ = load_items(str(tmp_path / "items.parquet"))
    pairs = {
        "query_id": ["0", "1", "9", "2", "9", "3"],
        "target_id": ["1", " 2", "0", "9", "9", "3"],
        "kind": ["x", "y", "x", "x", "x", "x"],
        "negative_1": ["4", None, None, None, None, None],
        "negative_2": ["unknown", "5", None, None, None, None],
    }
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")

    table, rejects = load_pairs(str(tmp_path / "pairs.parquet"), items, distinct_column="kind")

    assert table.pairs.tolist() == [[0, 1], [1, 2]]
    assert table.pairs.dtype == np.int32
    assert table.groups[0] != table.groups[1]
    assert (table.negatives[0, 0], table.negatives[1, 1]) == (4, 5)
    assert set(table.negatives.reshape(-1).tolist()) <= {4, 5, 0, 1, 2}
    assert [(reject.row, reject.ids, reject.reason) for reject in sorted(rejects, key=lambda reject: reject.row)] == [
        (2, ["9", "0"], "not among the usable items: query"),
        (3, ["2", "9"], "not among the usable items: target"),
        (4, ["9", "9"], "not among the usable items: query and target"),
        (5, ["3", "3"], "query and target are one item"),
    ]
    write_rejects(rejects, tmp_path / "rejects.jsonl")
    assert (
        len([json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]) == len(rejects) == 4
    )

    with pytest.raises(TableError, match="no column colour"):
        load_pairs(str(tmp_path / "pairs.parquet"), items, distinct_column="colour")
    (tmp_path / "pairs.csv").write_text("query_id,target_id\n7,8\n")
    with pytest.raises(TableError, match="none of 1 pairs is usable"):
        load_pairs(str(tmp_path / "pairs.csv"), items)
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(TableError, match="no usable row"):
        load_pairs(str(tmp_path / "nothing.csv"), items)


def test_images_are_opened_by_workers_and_hashed_by_content(tmp_path):
    red, blue = png("red"), png("blue")
    (tmp_path / "copy of red.png").write_bytes(red)
    sources = [red, blue, b"no image", None, red[:40], "missing.png", "copy of red.png"] * 40
    rows = [
        {
            "item_id": str(number),
            "title": "t",
            "image": {
                "bytes": source if isinstance(source, bytes) else None,
                "path": source if isinstance(source, str) else None,
            },
        }
        for number, source in enumerate(sources)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "items.parquet")

    unchecked, rejects = load_items(str(tmp_path / "items.parquet"), check_images=False)
    checked, rejected = load_items(str(tmp_path / "items.parquet"), num_workers=2)

    assert (len(unchecked), len(rejects)) == (280, 0)
    assert [item["item_id"] for item in checked] == [str(number) for number in range(280) if number % 7 in (0, 1, 3, 6)]
    assert {reject.reason.split(":")[0] for reject in rejected} == {"unreadable image"}
    hashes = image_hashes(unchecked, num_workers=2)
    assert (hashes == np.tile(hashes[:7], 40)).all()
    assert hashes[3] == hashes[5] == -1 < hashes[:3].min()
    assert hashes[0] == hashes[6] != hashes[1]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a", None, "a", " ", "b", ""]),
        pa.array([1.0, float("nan"), 1.0, None, 2.0, float("nan")]),
        pa.array([5, None, 5, None, 6, None]),
        pa.array(["a", None, "a", None, "b", None]).dictionary_encode(),
    ],
)
def test_a_missing_value_of_the_distinct_column_is_no_group(tmp_path, values):
    ids = [f"i{number}" for number in range(7)]
    pq.write_table(pa.table({"item_id": ids, "title": ids}), tmp_path / "items.parquet")
    pairs = pa.table({"query_id": ids[:-1], "target_id": ids[1:], "shop": values})
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    items, _ = load_items(str(tmp_path / "items.parquet"))
    table, _ = load_pairs(str(tmp_path / "pairs.parquet"), items, distinct_column="shop")
    groups = table.groups.tolist()
    assert [groups[place] for place in (1, 3, 5)] == [-1, -1, -1]
    assert groups[0] == groups[2] != groups[4]
    assert min(groups[0], groups[4]) >= 0


def test_a_pair_without_a_weight_is_rejected(tmp_path):
    ids = [f"i{number}" for number in range(9)]
    pq.write_table(pa.table({"item_id": ids, "title": ids}), tmp_path / "items.parquet")
    scores = ["0.5", "", "-1", "0", "nan", "2e1", "inf", "much"]
    columns = {"query_id": ids[:-1], "target_id": ids[1:], "score": scores}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    items, _ = load_items(str(tmp_path / "items.parquet"))
    table, rejects = load_pairs(str(tmp_path / "pairs.parquet"), items, weight_column="score")
    assert table.weights.tolist() == [0.5, 0, 20]
    assert table.pairs.tolist() == [[0, 1], [3, 4], [5, 6]]
    assert [(reject.row, reject.reason) for reject in rejects] == [
        (row, "no weight in 'score': a number of at least 0 is wanted") for row in (1, 2, 4, 6, 7)
    ]
    pq.write_table(pa.table({**columns, "score": [0.0] * 8}), tmp_path / "zero.parquet")
    with pytest.raises(TableError, match="no pair has a weight above 0 in 'score'"):
        load_pairs(str(tmp_path / "zero.parquet"), items, weight_column="score")
