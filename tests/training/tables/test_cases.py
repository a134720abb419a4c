"""One table of cases, format x content x expected reading, through every entry point: one answer to each question.

Each case is a kind that users have met, with its neighbours. `expected` are the items that there are, by id; `rejects` the
rows that are left out, as (row, part of the reason).
"""

import datetime
import decimal
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoProcessor

from hub.catalogue.encoder import ItemEncoder, Rows
from hub.pages.app_search import positions_of_ids
from hub.publishing.dataset import RejectsFile, write_items
from training.tables.columns import item_of
from training.tables.items import ItemTable, load_items
from training.tables.pairs import load_pairs
from training.tables.rejects import Rejects, TableError
from training.tables.validate import validate
from training.trainer.batches import ItemCollator


Fill = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A table, and what it holds.

    Attributes:
        name: of the case.
        fill: writes the table into a folder; gives the file's name, or None for the folder itself.
        expected: fields of each item by id; a picture as its number of pictures.
        rejects: row and part of the reason.
        options: of `load_items`.
    """

    name: str
    fill: Fill
    expected: dict[str, dict[str, Any]]
    rejects: list[tuple[int, str]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def parquet(*columns: tuple[str, Any], **options: Any) -> Fill:
    def fill(folder: Path) -> str:
        arrays = {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns}
        pq.write_table(pa.table(arrays), folder / "items.parquet", **options)
        return "items.parquet"

    return fill


def text(name: str, content: str | bytes, encoding: str = "utf-8") -> Fill:
    def fill(folder: Path) -> str:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return name

    return fill


def picture(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def image_folder(metadata: str, content: str, pictures: tuple[str, ...]) -> Fill:
    def fill(folder: Path) -> None:
        for number, name in enumerate(pictures):
            (folder / name).write_bytes(picture("red" if number % 2 else "blue"))
        (folder / metadata).write_text(content)

    return fill


def files(**contents: Fill) -> Fill:
    def fill(folder: Path) -> None:
        for place, one in contents.items():
            part = folder / "making"
            part.mkdir()
            made = part / one(part)
            target = folder / f"{place.replace('__', '/')}{made.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            made.rename(target)
            part.rmdir()

    return fill


def class_labels(folder: Path) -> str:
    features = datasets.Features(
        {
            "item_id": datasets.Value("string"),
            "title": datasets.ClassLabel(names=["cat", "dog"]),
            "topics": datasets.List(datasets.ClassLabel(names=["x", "y"])),
        }
    )
    rows = [{"item_id": "a", "title": 0, "topics": [1, 0]}, {"item_id": "b", "title": 1, "topics": []}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "items.parquet")
    return "items.parquet"


def damaged_page(folder: Path) -> str:
    """Three row groups, of which the second is overwritten."""
    texts = [f"title {number} " + "x" * 200 for number in range(30)]
    table = pa.table({"item_id": [str(number) for number in range(30)], "title": texts})
    pq.write_table(table, folder / "items.parquet", row_group_size=10, compression="zstd", use_dictionary=False)
    group = pq.ParquetFile(folder / "items.parquet").metadata.row_group(1).column(1)
    content = bytearray((folder / "items.parquet").read_bytes())
    start, size = group.data_page_offset, group.total_compressed_size
    content[start + size // 2 : start + size] = b"\xff" * (size - size // 2)
    (folder / "items.parquet").write_bytes(content)
    return "items.parquet"


def saved(folder: Path) -> None:
    rows = [{"item_id": 7.0, "title": "seven"}, {"item_id": None, "title": "none"}]
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows[:1]), "test": datasets.Dataset.from_list(rows[1:])}
    ).save_to_disk(folder)


def titles(*pairs: tuple[str, str]) -> dict[str, dict[str, Any]]:
    return {item_id: {"title": title} for item_id, title in pairs}


BROKEN, GOOD = picture()[:40], picture()
PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
ITEM = '{"item_id": "1", "title": "x"}\n'
STRAY = "".join(f"{number},t{number}\n" for number in range(2000))

CASES = [
    # ids
    Case(
        "ids as float64",
        parquet(("item_id", [7.0, 12345678901.0, None, -0.0, float("inf"), 1e300]), ("title", list("abcdef"))),
        titles(("7", "a"), ("12345678901", "b"), ("0", "d")),
        [(2, "item_id is missing"), (4, "infinite"), (5, "too large")],
    ),
    Case(
        "ids as binary",
        parquet(("item_id", ["书".encode(), b"\xff"]), ("title", ["a", "b"])),
        titles(("书", "a")),
        [(1, "not UTF-8")],
    ),
    Case(
        "ids of other types",
        parquet(
            ("item_id", pa.array([1, 2, None], pa.uint64()).dictionary_encode()),
            ("title", pa.array(["a", "b", "c"], pa.string_view())),
        ),
        titles(("1", "a"), ("2", "b")),
        [(2, "missing")],
    ),
    Case(
        "ids as lists", parquet(("item_id", [["a"], None]), ("title", ["a", "b"])), {}, [(0, "a list"), (1, "missing")]
    ),
    Case(
        "ids as written, image folder",
        image_folder(
            "metadata.csv",
            "file_name,item_id,title\na.png,007,a\nb.png,1e5,b\nc.png,1.10,c\nd.png,1.1,d\ne.png,NA,e\nf.png,null,f\n",
            ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "test tubes.png"),
        ),
        {
            i: {"title": t, "image": 1}
            for i, t in zip(["007", "1e5", "1.10", "1.1", "NA", "null"], "abcdef", strict=True)
        },
    ),
    Case(
        "ids as written, JSON lines",
        text(
            "items.jsonl",
            '{"item_id": "007", "title": 2012}\n{"item_id": 8.0, "title": false}\n'
            '{"item_id": [1], "title": "x"}\n{"item_id": NaN, "title": "y"}\n',
        ),
        titles(("007", "2012"), ("8", "false")),
        [(2, "a list"), (3, "missing")],
    ),
    Case(
        "the usable row of an id counts",
        text("items.csv", "item_id,title,image\na,,\na,first,\na,second,\nb,,gone.png\nb,shown,\n"),
        titles(("a", "first"), ("b", "shown")),
        [(0, "neither"), (2, "earlier row"), (3, "unreadable image")],
    ),
    # texts
    Case(
        "texts as binary",
        parquet(
            ("item_id", ["a", "b"]), ("title", [b"\xe4\xb9\xa6", b"\xe4"]), ("topics", [[b"x", "书".encode()], []])
        ),
        {"a": {"title": "书", "topics": ["x", "书"]}},
        [(1, "title is not UTF-8")],
    ),
    Case(
        "NaN and null are empty",
        parquet(
            ("item_id", list("abc")),
            ("title", [1.5, float("nan"), None]),
            ("content", [float("nan")] * 3),
            ("topics", [[None, "t"], [None], ["u"]]),
        ),
        {"a": {"title": "1.5", "topics": ["t"]}, "c": {"topics": ["u"]}},
        [(1, "neither")],
    ),
    Case(
        "numbers are texts", parquet(("item_id", list("ab")), ("title", [0, 2012])), titles(("a", "0"), ("b", "2012"))
    ),
    Case(
        "truth values are texts",
        parquet(("item_id", list("ab")), ("title", [False, True])),
        titles(("a", "false"), ("b", "true")),
    ),
    Case(
        "truth values and dates as written",
        image_folder(
            "metadata.jsonl",
            '{"file_name": "a.png", "item_id": "a", "title": "2024-07-01"}\n'
            '{"file_name": "b.png", "item_id": "b", "title": "true"}\n',
            ("a.png", "b.png"),
        ),
        {"a": {"title": "2024-07-01", "image": 1}, "b": {"title": "true", "image": 1}},
    ),
    Case("dates", parquet(("item_id", ["a"]), ("title", [datetime.date(2024, 7, 1)])), titles(("a", "2024-07-01"))),
    Case(
        "times with a zone",
        parquet(
            ("item_id", ["a"]),
            ("title", pa.array([pd.Timestamp("2024-07-01T12:00", tz="UTC")], pa.timestamp("ns", "UTC"))),
        ),
        titles(("a", "2024-07-01 12:00:00+00:00")),
    ),
    Case("durations", parquet(("item_id", ["a"]), ("title", [datetime.timedelta(hours=2)])), titles(("a", "2:00:00"))),
    Case("decimals", parquet(("item_id", ["a"]), ("title", [decimal.Decimal("1.50")])), titles(("a", "1.50"))),
    Case(
        "structs are no texts",
        parquet(("item_id", list("ab")), ("title", pa.array([{"en": "x"}, None])), ("content", ["c", "d"])),
        {"b": {"content": "d"}},
        [(0, "title is a struct")],
    ),
    Case("classes", class_labels, {"a": {"title": "cat", "topics": ["y", "x"]}, "b": {"title": "dog"}}),
    Case("blanks are empty", text("items.csv", "item_id,title\na, \nb, x \n"), titles(("b", " x ")), [(0, "neither")]),
    Case(
        "topics as text",
        text("items.csv", 'item_id,topics\na,"x，y, "\nb,"[""x"", 2, null]"\nc,[x\n'),
        {"a": {"topics": ["x", "y"]}, "b": {"topics": ["x", "2"]}},
        [(2, "unreadable topics")],
    ),
    # broken rows
    Case(
        "half a surrogate pair",
        text("items.jsonl", '{"item_id": "a", "title": "x\\ud800"}\n' + ITEM),
        titles(("1", "x")),
        [(0, "title is not valid Unicode")],
    ),
    Case(
        "bytes of another encoding, CSV",
        text("items.csv", "item_id,title\né1,a\nè1,b\nc,c\n", "latin-1"),
        titles(("c", "c")),
        [(0, "--encoding"), (1, "--encoding")],
    ),
    Case(
        "bytes of another encoding, JSON",
        text("items.jsonl", '{"item_id": "书", "title": "x"}\n' + ITEM, "gbk"),
        titles(("1", "x")),
        [(0, "not UTF-8")],
    ),
    Case(
        "a named encoding",
        text("items.csv", "item_id,title\n书,标题\n", "gbk"),
        titles(("书", "标题")),
        options={"encoding": "gbk"},
    ),
    Case(
        "a stray quote",
        text("items.csv", 'item_id,title\n1,x\n2,"5 inch\n3,y\n4,z\n'),
        titles(("1", "x"), ("3", "y"), ("4", "z")),
        [(1, "quote")],
    ),
    Case(
        "two stray quotes",
        text("items.csv", 'item_id,title\n1,x\n2,"5 inch\n3,y\n4,6"\n5,"a ""b""\nc, d"\n'),
        titles(("1", "x"), ("3", "y"), ("4", '6"'), ("5", 'a "b"\nc, d')),
        [(1, "quote")],
    ),
    Case(
        "a stray quote before much else",
        text("items.csv", f'item_id,title\nz,"x\n{STRAY}'),
        titles(*((str(number), f"t{number}") for number in range(2000))),
        [(0, "quote")],
    ),
    Case(
        "short and long rows",
        text("items.csv", "item_id,title\na\nb,x\nc,y,z\n\nd,w\n"),
        titles(("b", "x"), ("d", "w")),
        [(0, "1 fields"), (2, "3 fields")],
    ),
    Case(
        "broken JSON lines",
        text("items.jsonl", "{broken\n\n[1]\n" + ITEM),
        titles(("1", "x")),
        [(0, "unreadable row"), (2, "no JSON object")],
    ),
    Case(
        "a damaged page",
        damaged_page,
        titles(*((str(n), f"title {n} " + "x" * 200) for n in [*range(10), *range(20, 30)])),
        [(n, "damaged") for n in range(10, 20)],
    ),
    Case(
        "text that isn't UTF-8 in Parquet",
        parquet(("item_id", list("abc")), ("title", pa.array([b"ok", b"\xff\xfe", b"fine"]).view(pa.string()))),
        titles(("a", "ok"), ("c", "fine")),
        [(1, "title is not UTF-8")],
    ),
    # encodings
    Case("carriage returns", text("items.csv", "item_id,title\ra,x\rb,y\r"), titles(("a", "x"), ("b", "y"))),
    Case("UTF-16 with a mark, CSV", text("items.csv", "item_id,title\n书,标题\n", "utf-16"), titles(("书", "标题"))),
    Case(
        "UTF-16 with a mark, JSON",
        text("items.jsonl", '{"item_id": "书", "title": "x"}\r\n' + ITEM, "utf-16"),
        titles(("书", "x"), ("1", "x")),
    ),
    Case("a byte-order mark, JSON", text("items.jsonl", ITEM, "utf-8-sig"), titles(("1", "x"))),
    Case("a byte-order mark, CSV", text("items.csv", "item_id,title\r\na,x\r\n", "utf-8-sig"), titles(("a", "x"))),
    # files
    Case(
        "all files of a folder, types joined",
        files(
            **{
                "items-train": parquet(("item_id", [1, 2]), ("title", ["a", "b"]), ("price", [3, 4])),
                "items-test": text("x.csv", "item_id,content,price\n007,c,5.0\n"),
                "b/items-dev": text("x.jsonl", '{"item_id": "z", "title": 5}\n'),
                "_temporary/0/part": parquet(("item_id", ["no"]), ("title", ["no"])),
                ".hidden": parquet(("item_id", ["no"]), ("title", ["no"])),
            }
        ),
        {"1": {"title": "a"}, "2": {"title": "b"}, "007": {"content": "c"}, "z": {"title": "5"}},
    ),
    Case(
        "a split of a folder",
        files(
            **{
                "items-train": parquet(("item_id", ["a"]), ("title", ["a"])),
                "items-test": parquet(("item_id", ["b"]), ("title", ["b"])),
            }
        ),
        titles(("b", "b")),
        options={"split": "test"},
    ),
    Case("a saved data set", saved, titles(("7", "seven")), [(0, "missing")]),
    Case(
        "a name with brackets", lambda folder: text("items[1].csv", "item_id,title\na,x\n")(folder), titles(("a", "x"))
    ),
    # pictures
    Case(
        "several pictures, one of them broken",
        parquet(
            ("item_id", list("abc")),
            ("title", [None, "t", None]),
            (
                "image",
                pa.array(
                    [
                        [{"bytes": GOOD, "path": None}, {"bytes": BROKEN, "path": "x.png"}],
                        [{"bytes": GOOD, "path": None}] * 2,
                        [{"bytes": BROKEN, "path": None}],
                    ],
                    pa.list_(PICTURE),
                ),
            ),
        ),
        {"a": {"image": 1}, "b": {"title": "t", "image": 2}},
        [(0, "image"), (2, "image")],
    ),
    Case(
        "pictures as bytes, one broken",
        parquet(
            ("item_id", list("abc")), ("title", ["t", "u", None]), ("image", pa.array([GOOD, BROKEN, b""], pa.binary()))
        ),
        {"a": {"title": "t", "image": 1}},
        [(1, "image"), (2, "neither")],
    ),
    Case(
        "pictures that are numbers",
        text("items.jsonl", '{"item_id": "a", "title": "x", "image": 5}\n' + ITEM),
        titles(("1", "x")),
        [(0, "image must be")],
    ),
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
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
    check_pairs(items, tmp_path)
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
