"""Rows of any table from anywhere: any range, any thread, any process, of bounded memory; what is no table is refused."""

import csv
import json
import multiprocessing
import os
import pickle
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.catalogue import write_items
from training.tables.items import TableError, load_items
from training.tables.reading import open_table


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def same_items(folder: Path) -> list[dict]:
    """A thousand items as CSV, JSON lines and two Parquet files, with lines that break inside quotes."""
    items = [
        {"item_id": f"n{number}", "title": f'two "lines"\r\n{number}', "content": "x" * (1 + number % 50)}
        for number in range(1000)
    ]
    with (folder / "items.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(items[0]))
        writer.writeheader()
        writer.writerows(items)
    (folder / "parts").mkdir()
    write_items(items[:400], folder / "parts" / "a.parquet")
    write_items(items[400:], folder / "parts" / "b.parquet")
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return items


def test_any_range_is_that_range_of_the_whole_and_copies_travel(tmp_path):
    items = same_items(tmp_path)
    ranges = random.Random(0)
    for source in ("items.csv", "items.jsonl", "parts"):
        table, rejects = load_items(str(tmp_path / source))
        assert len(table) == 1000 and not rejects
        assert list(table) == items
        other = pickle.loads(pickle.dumps(table))
        for _ in range(10):
            start, stop = sorted(ranges.choices(range(1001), k=2))
            assert table[start:stop] == other[start:stop] == items[start:stop]
            assert [items[at] for at in table.between(start, stop)] == items[start:stop]
        other.table.copy.unlink()  # as on another machine, which makes its own
        assert pickle.loads(pickle.dumps(other))[7] == items[7]
    assert table.place(399) == ("a.parquet", 399) and table.place(400) == ("b.parquet", 0)


def test_copies_that_nobody_opens_go(tmp_path):
    tables = [str(tmp_path / f"{name}.csv") for name in "abc"]
    for table in tables:
        Path(table).write_text(f"item_id,title\n{Path(table).stem},x\n")
    first, second = [open_table(table).copy for table in tables[:2]]
    long_ago = time.time() - 31 * 86_400
    for copy in (first, second):
        os.utime(copy, (long_ago, long_ago))
    unused = open_table(tables[1])  # opened again: it is in use
    third = open_table(tables[2]).copy
    assert [copy.exists() for copy in (first, second, third)] == [False, True, True]
    second.unlink()
    assert unused.row(0, ["title"]) == {"title": "x"}  # what is mapped stays
    assert open_table(tables[0]).row(0, ["item_id"]) == {"item_id": "a"}  # and is copied anew


def test_many_threads_and_forked_processes_read_their_own_rows(tmp_path):
    same_items(tmp_path)
    table, _ = load_items(str(tmp_path / "parts"))
    order = random.Random(1).choices(range(1000), k=4000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda at: table[at]["item_id"], order)) == [f"n{at}" for at in order]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(table.__getitem__, order[:20]) == [table[at] for at in order[:20]]


def test_repeated_ids_are_found_anywhere_in_the_table(tmp_path):
    numbers = random.Random(1).choices(range(3000), k=3000)
    ids = [f"n{number}" if number % 11 else " " for number in numbers]
    write_items([{"item_id": item_id, "title": "x"} for item_id in ids[:1700]], tmp_path / "a.parquet")
    write_items([{"item_id": item_id, "title": "x"} for item_id in ids[1700:]], tmp_path / "b.parquet")
    (tmp_path / "table").mkdir()
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / name).rename(tmp_path / "table" / name)
    items, rejects = load_items(str(tmp_path / "table"))
    firsts = [ids.index(item_id) for item_id in dict.fromkeys(ids) if item_id.strip()]
    assert items.rows.tolist() == sorted(firsts)
    assert len(rejects) == 3000 - len(firsts)
    assert rejects.counts()[str(tmp_path / "table"), "item_id is missing"] == ids.count(" ")
    listed = {(reject.file, reject.row) for reject in rejects}
    assert listed == {("a.parquet", at) if at < 1700 else ("b.parquet", at - 1700) for at in {*range(3000)} - {*firsts}}


def read_and_report(path: Path, cache: Path, report: Path) -> None:
    """Most bytes that Arrow held at once in this process while a table was copied and a hundred rows of it were read."""
    datasets.config.HF_DATASETS_CACHE = cache
    items, _ = load_items(str(path), check_images=False)
    assert sum(len(item["image"]) for item in items[3000:3100]) == 2_000_000
    report.write_text(str(pa.default_memory_pool().max_memory()))


def test_a_large_row_group_takes_little_memory(processes, tmp_path):
    """Also one that a dictionary makes small on the disk, so that its size tells nothing of its rows'."""
    picture = random.Random(0).randbytes(20_000)
    for name, pictures in (
        ("different", [random.Random(number).randbytes(20_000) for number in range(6000)]),
        ("alike", [picture] * 6000),
    ):
        rows = pa.table({"item_id": [f"n{number}" for number in range(6000)], "image": pa.array(pictures, pa.binary())})
        table = tmp_path / f"{name}.parquet"
        pq.write_table(rows, table, row_group_size=6000, write_batch_size=64)
        child = processes.Process(target=read_and_report, args=(table, tmp_path / "cache", tmp_path / "report"))
        child.start()
        child.join()
        assert int((tmp_path / "report").read_text()) < 80e6 < rows.nbytes * 0.7, name


def test_offsets_of_32_bits_suffice_for_any_table(tmp_path):
    """2.3 GB of pictures in one row group of one Parquet file, as a list and alone."""
    picture = pa.array([b"\x89PNG" + bytes(240_000)])
    ids = pa.array([f"n{number}" for number in range(9_600)])
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * 9_600, pa.int8()), picture)
    pq.write_table(pa.table({"item_id": ids, "image": dictionary}), tmp_path / "items.parquet")
    items, rejects = load_items(str(tmp_path / "items.parquet"), check_images=False)
    assert (len(items), len(rejects)) == (9_600, 0)
    assert len(items[9_599]["image"]) == 240_004
    assert max(batch.nbytes for batch in items.table.batches) < 2**27


def test_what_is_no_table_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "ids.csv").write_text("id,title\na,b\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "empty").mkdir()
    pq.write_table(
        pa.table({"item_id": pa.array([], pa.string()), "title": pa.array([], pa.string())}), tmp_path / "0.parquet"
    )
    (tmp_path / "items.xlsx").touch()
    (tmp_path / "twice.csv").write_text("item_id,title,title\n")
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    for source, message in {
        "ids.csv": "ids.csv: an item table needs 'item_id' .* it has id, title",
        "bad.parquet": "bad.parquet: not a readable Parquet file",
        "empty": "no Parquet file and no metadata.csv",
        "0.parquet": "0.parquet: no usable row: it is empty",
        "items.xlsx": "items.xlsx: a table is a .parquet, .jsonl, .csv file",
        "twice.csv": "two columns have one name",
        "none.jsonl": "none.jsonl: no such table",
        "data/itms": "data/itms: no such table",
        "../somewhere/else": "no such table",
        str(tmp_path / "nothing"): "nothing: no such table",
        "nobody/has-this-dataset": "neither a file or folder nor a data set",
    }.items():
        with pytest.raises(TableError, match=message) as raised:
            load_items(source)
        assert "\n" not in str(raised.value), source


def test_a_hub_that_nobody_answers_for_is_asked_once(monkeypatch):
    """`datasets` itself tries for 23 seconds."""
    asked = []

    def fail(_, name, **__):
        asked.append(name)
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(TableError, match="nobody/itms: neither a file .*Name or service not known"):
        load_items("nobody/itms")
    assert asked == ["nobody/itms"]


def test_a_local_table_asks_no_network(tmp_path, monkeypatch):
    import socket

    import httpx

    same_items(tmp_path)
    datasets.Dataset.from_list([{"item_id": "a", "title": "b"}]).save_to_disk(tmp_path / "saved")

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(httpx.Client, "send", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for source in ("items.csv", "items.jsonl", "parts", "saved"):
        assert len(open_table(str(tmp_path / source)))
