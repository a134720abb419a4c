"""Item tables of every kind are read row by row from anywhere, and what is no table is refused."""

import csv
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub.catalogue.encoder import ItemEncoder
from hub.catalogue.item_tables import ItemTable, TableError, open_items
from tests.support.catalogue import write_items


def test_rows_are_read_from_anywhere(tmp_path):
    """Any range of any table is that range of the whole, with lines that break inside quotes and small row groups."""
    items = [
        {"item_id": f"n{number}", "title": f'two "lines"\r\n{number}', "content": "x" * (number % 50)}
        for number in range(1000)
    ]
    with (tmp_path / "items.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(items[0]))
        writer.writeheader()
        writer.writerows(items)
    write_items(items[:400], tmp_path / "a.parquet")
    write_items(items[400:], tmp_path / "b.parquet")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    ranges = random.Random(0)
    for source in ("items.csv", "items.jsonl", "."):
        table = open_items(str(tmp_path / source))
        assert len(table) == 1000
        assert [row.raw["title"] for row in table.read(0, 1000)] == [item["title"] for item in items]
        for _ in range(30):
            start, stop = sorted(ranges.choices(range(1001), k=2))
            assert [row.raw["item_id"] for row in table.read(start, stop)] == [f"n{n}" for n in range(start, stop)]


def test_repeated_ids_are_found_anywhere_in_the_table(tmp_path):
    numbers = random.Random(1).choices(range(3000), k=3000)
    ids = [f"n{number}" if number % 11 else " " for number in numbers]
    write_items([{"item_id": item_id, "title": "x"} for item_id in ids[:1700]], tmp_path / "a.parquet")
    write_items([{"item_id": item_id, "title": "x"} for item_id in ids[1700:]], tmp_path / "b.parquet")
    table: ItemTable = open_items(str(tmp_path))
    seen: set[str] = set()
    for row in table.read(0, 3000):
        item_id = row.raw["item_id"].strip()
        assert row.repeated == (item_id in seen)
        seen |= {item_id} - {""}


def read_and_report(path: Path, report: Path) -> None:
    """Most bytes that Arrow held at once in this process while a hundred rows far behind were read."""
    table = open_items(str(path))
    assert sum(len(row.raw["image"]) for row in table.read(3000, 3100)) == 2_000_000
    report.write_text(str(pa.default_memory_pool().max_memory()))


def test_reading_a_large_row_group_takes_little_memory(processes, tmp_path):
    rows = [{"item_id": f"n{number}", "image": random.Random(number).randbytes(20_000)} for number in range(4000)]
    table = tmp_path / "items.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=4000, write_batch_size=64)
    child = processes.Process(target=read_and_report, args=(table, tmp_path / "report"))
    child.start()
    child.join()
    assert int((tmp_path / "report").read_text()) < 25e6 < table.stat().st_size / 3


def test_topics_of_csv_files(tmp_path, tiny_model_folder):
    """A JSON list or words with commas; a list that is broken is a reject, and so is a row with a field too few."""
    (tmp_path / "items.csv").write_text('item_id,topics\na,"x,y"\nb,"[""x"", ""y""]"\nc,"[""x"""\nd\n')
    encoder = ItemEncoder(str(tiny_model_folder))
    block = encoder.prepare(0, open_items(str(tmp_path / "items.csv")).read(0, 4))
    assert block.input_ids[0] == block.input_ids[1]
    assert [(reject.place.item_id, reject.place.row) for reject in block.rejects] == [("c", 2), ("", 3)]
    assert "unreadable topics" in block.rejects[0].reason
    assert "1 fields, but the header has 2" in block.rejects[1].reason


def test_a_table_that_is_none_is_refused(tmp_path):
    (tmp_path / "ids.csv").write_text("id,title\na,b\n")
    with pytest.raises(TableError, match="ids.csv: an item table needs 'item_id' .* it has id, title"):
        open_items(str(tmp_path / "ids.csv"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(TableError, match="bad.parquet: not a readable Parquet file"):
        open_items(str(tmp_path / "bad.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match="no Parquet file and no metadata.csv"):
        open_items(str(tmp_path / "empty"))
    with pytest.raises(TableError, match="neither a file or folder nor a dataset"):
        open_items("nobody/has-this-dataset")


def test_texts_of_other_encodings_spoil_their_own_row_only(tmp_path):
    titles = pa.array([b"fine", b"\xff\xfe", b"also fine"]).view(pa.string())
    pq.write_table(pa.table({"item_id": ["a", "b", "c"], "title": titles}), tmp_path / "items.parquet")
    rows = list(open_items(str(tmp_path / "items.parquet")).read(0, 3))
    assert [isinstance(row.raw, dict) for row in rows] == [True, False, True]
    assert "not valid UTF-8" in rows[1].raw.reason
