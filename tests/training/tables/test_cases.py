"""One table of cases, format x content x expected reading, through every entry point: one answer to each question.

The cases stand in tests/support/table_cases.py: `expected` are the items that there are, by id; `rejects` the rows that are
left out, as (row, part of the reason).
"""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoProcessor

from hub.catalogue.encoder import ItemEncoder, Rows
from hub.pages.app_search import positions_of_ids
from hub.pages.gallery_items import IMAGE, TEXT, embed_catalogue
from hub.publishing.dataset import RejectsFile, write_items
from tests.support.table_cases import CASES, Case
from training.batches.collators import ItemCollator
from training.evaluate import main as evaluate
from training.tables.columns import item_of
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS
from training.tables.items import ItemTable, load_items
from training.tables.pairs import load_pairs
from training.tables.rejects import Rejects, TableError
from training.tables.validate import validate


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("training.evaluation.evidence.draw_plots", lambda *_: {})  # they cost most of an evaluation
        yield


@pytest.fixture(scope="module")
def encoder(tiny_model_folder) -> ItemEncoder:
    return ItemEncoder(str(tiny_model_folder))


def described(items: ItemTable) -> dict[str, dict[str, Any]]:
    return {item["item_id"]: content(item) for item in items}


def content(item: dict[str, Any]) -> dict[str, Any]:
    """An item without its id, a picture as the number of pictures."""
    fields = {name: value for name, value in item.items() if name != "item_id"}
    if "image" in fields:
        fields["image"] = len(fields["image"]) if isinstance(fields["image"], list) else 1
    return fields


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_entry_point_reads_the_same(case, encoder, tmp_path):
    folder = tmp_path / "table"
    folder.mkdir()
    name = case.fill(folder)
    source = str(folder / name if name else folder)
    if not case.expected:
        with pytest.raises(TableError, match=case.rejects[0][1]):
            load_items(source, **case.options)
        return

    items, rejects = load_items(source, **case.options)
    assert described(items) == case.expected
    check_rejects(rejects, case.rejects)

    check_encoding(source, case, encoder)
    check_published(source, case, tmp_path)
    check_gallery(source, case, encoder)
    check_pairs(items, tmp_path)
    check_evaluated(source, case, encoder, tmp_path)
    figures = (
        validate(source, str(tmp_path / "pairs.csv"), None, tmp_path / "checked", **case.options)
        if len(items) > 1
        else None
    )
    assert figures is None or figures["items"] == len(case.expected)
    assert positions_of_ids(items.item_ids.column, items).tolist() == list(range(len(items)))  # the app's search table


def check_rejects(rejects: Rejects, expected: list[tuple[int, str]]) -> None:
    listed = sorted(rejects, key=lambda reject: reject.row)
    assert [reject.row for reject in listed] == sorted(row for row, _ in expected)
    for reject, (_, reason) in zip(listed, sorted(expected), strict=True):
        assert reason in reject.reason
        assert reject.file and Path(reject.table).exists()


def check_encoding(source: str, case: Case, encoder: ItemEncoder) -> None:
    """Encoding opens the pictures itself, and its prompts are the processor's of the same items."""
    unchecked = Rows(*load_items(source, check_images=False, **case.options))
    block = unchecked.prepare(encoder, 0, (0, len(unchecked)))
    assert {place.item_id for place in block.places} == set(case.expected)
    assert sorted({reject.row for reject in block.rejects}) == sorted(row for row, _ in case.rejects)
    checked = {item["item_id"]: item for item in load_items(source, **case.options)[0]}
    collate = ItemCollator(encoder.processor)
    for place, ids, count in zip(block.places, block.input_ids, block.num_images, strict=True):
        assert count == case.expected[place.item_id].get("image", 0)
        if len(checked) < 50:
            assert collate([checked[place.item_id]])["input_ids"][0].tolist() == ids


def check_published(source: str, case: Case, tmp_path: Path) -> None:
    """A data set of them holds the same items, and is read as the same."""
    staging = tmp_path / "staging"
    with RejectsFile(tmp_path / "rejects.jsonl") as listed:
        write_items(*load_items(source, check_images=False, **case.options), staging, listed)
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert sorted({line["row"] for line in lines}) == sorted(row for row, _ in case.rejects)
    again, rejects = load_items(str(staging / "data"))
    assert described(again) == case.expected
    assert not rejects


def check_gallery(source: str, case: Case, encoder: ItemEncoder) -> None:
    """A gallery shows the same items, with their texts and pictures left out by turns."""
    items, rejects = load_items(source, check_images=False, **case.options)
    shown = embed_catalogue(items, encoder)
    assert set(shown.item_ids) == set(case.expected)
    rows = {reject.row for reject in (*rejects, *shown.rejects)}
    assert rows == {row for row, _ in case.rejects}
    with_picture = {item_id for item_id, item in case.expected.items() if "image" in item}
    views = {view.name: set(np.array(shown.item_ids)[view.usable]) for view in shown.views}
    assert views.get(IMAGE, set()) == with_picture
    assert views.get(TEXT, set()) == {item_id for item_id, item in case.expected.items() if item.keys() - {"image"}}


def check_evaluated(source: str, case: Case, encoder: ItemEncoder, tmp_path: Path) -> None:
    """An evaluation measures on the same items, and lists the same rows."""
    if not 2 <= len(case.expected) < 50:
        return
    options = [f"--{name}={value}" for name, value in case.options.items()]
    places = {"model": encoder.model_path, "items": source, "pairs": tmp_path / "pairs.csv", "output": tmp_path / "out"}
    options += [f"--{name}={place}" for name, place in places.items()]
    assert evaluate(options) == (DONE_WITH_REJECTS if case.rejects else DONE)
    counts = json.loads((tmp_path / "out" / "evaluation.json").read_text())["counts"]
    assert counts["items"] == counts["pairs"] == len(case.expected)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert sorted({line["row"] for line in lines}) == sorted({row for row, _ in case.rejects})


def check_pairs(items: ItemTable, tmp_path: Path) -> None:
    """Pairs written as text find every item by its id, whatever type it had."""
    if len(items) < 2:
        return
    pairs = pd.DataFrame({"query_id": list(items.item_ids), "target_id": np.roll(list(items.item_ids), 1)})
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    table, rejects = load_pairs(str(tmp_path / "pairs.csv"), items)
    assert table.pairs[:, 0].tolist() == list(range(len(items)))
    assert not rejects


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_single_items_follow_the_rules_of_tables(kind, encoder, tmp_path):
    """An item that comes alone (a query of the app, of the index) is what it would be as a row."""
    raw = {"item_id": 7.0, "title": 2012, "topics": "x, y", "content": None}
    if kind == "json":
        (tmp_path / "items.jsonl").write_text(json.dumps(raw))
    elif kind == "csv":
        pd.DataFrame([{**raw, "item_id": 7}]).to_csv(tmp_path / "items.csv", index=False)
    else:
        pq.write_table(pa.Table.from_pylist([raw]), tmp_path / "items.parquet")
    (table,) = tmp_path.glob("items.*")
    (row,) = load_items(str(table))[0]
    assert row == item_of(raw, tmp_path) == {"item_id": "7", "title": "2012", "topics": ["x", "y"]}
    processor: Any = AutoProcessor.from_pretrained(encoder.model_path, trust_remote_code=True)
    assert processor(row)["input_ids"] == processor({**raw, "topics": ["x", "y"]})["input_ids"]
