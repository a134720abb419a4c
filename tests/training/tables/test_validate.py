"""The validation pass finds every planted fault, counts it once, and lists it with table, row and ids."""

import json
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.training.tables.test_items import SCHEMA, png
from training.tables.rejects import TableError
from training.tables.validate import validate


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"item_id": f"i{n}", "title": f"t{n}", "image": {"bytes": png("red"), "path": None}} for n in range(10)]
    rows += [
        {"item_id": "i3", "title": "again"},
        {"item_id": "empty"},
        {"item_id": "cut", "image": {"bytes": png("red")[:30], "path": None}},
        {"item_id": None, "title": "no id"},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "items.parquet")
    return tmp_path


def write_pairs(path, pairs):
    path.write_text("query_id,target_id\n" + "".join(f"{query},{target}\n" for query, target in pairs))
    return str(path)


def test_every_fault_is_counted_and_listed(tables, capsys):
    train = write_pairs(
        tables / "train.csv",
        [
            ("i0", "i1"),
            ("i1", "i0"),
            ("i0", "i1"),
            ("i2", "i2"),
            ("i2", "cut"),
            ("i4", "i8"),
            ("i0", "i1"),
            ("x",)[:1] * 2,
        ],
    )
    test = write_pairs(tables / "test.csv", [("i8", "i9"), ("i9", "i0"), ("i8", "i9"), ("i8", "empty")])

    figures = validate(str(tables / "items.parquet"), train, test, tables, console=Console(width=200))

    items = str(tables / "items.parquet")
    assert figures == {
        "items": 10,
        "train_pairs": 5,
        "eval_pairs": 3,
        "test_items_in_training": 2,
        f"{items}: item_id stands in an earlier row": 1,
        f"{items}: neither text nor image": 1,
        f"{items}: unreadable image": 1,
        f"{items}: item_id is missing": 1,
        f"{train}: query and target are one item": 1,
        f"{train}: not among the usable items: target": 1,
        f"{train}: not among the usable items: query and target": 1,
        f"{train}: the pair occurs twice": 2,
        f"{train}: a test item is seen in training": 5,
        f"{test}: not among the usable items: target": 1,
        f"{test}: the pair occurs twice": 1,
    }
    rejects = [json.loads(line) for line in (tables / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == sum(figures.values()) - 10 - 5 - 3 - 2
    listed = Counter(
        (reject["table"], reject["row"])
        for reject in rejects
        if "twice" in reject["reason"] or "earlier" in reject["reason"]
    )
    assert listed == {(items, 10): 1, (train, 2): 1, (train, 6): 1, (test, 2): 1}
    leaked = {reject["row"]: reject["ids"] for reject in rejects if "test item" in reject["reason"]}
    assert leaked[5] == ["i4", "i8"]
    assert set(leaked) == {0, 1, 2, 5, 6}
    printed = capsys.readouterr().out
    assert "2 test items are seen in training" in printed
    assert "the pair occurs twice" in printed


def test_sound_tables_say_so_and_hopeless_ones_stop(tables, capsys):
    rows = [{"item_id": f"i{n}", "title": f"t{n}"} for n in range(4)]
    sound = pa.Table.from_pylist(rows).append_column("split", pa.array(["train", "train", "test", "test"]))
    pq.write_table(sound, tables / "sound.parquet")
    train = write_pairs(tables / "train.csv", [("i0", "i1")])

    figures = validate(str(tables / "sound.parquet"), train, None, tables, eval_split="test", console=Console())

    assert figures == {"items": 4, "train_pairs": 1, "test_items_in_training": 0}
    assert "Nothing is wrong" in capsys.readouterr().out
    assert (tables / "rejects.jsonl").read_text() == ""
    leaky = write_pairs(tables / "leaky.csv", [("i0", "i3")])
    assert (
        validate(str(tables / "sound.parquet"), leaky, None, tables, eval_split="test")["test_items_in_training"] == 1
    )
    with pytest.raises(TableError, match="none of 1 pairs is usable"):
        validate(str(tables / "sound.parquet"), write_pairs(tables / "other.csv", [("a", "b")]), None, tables)
