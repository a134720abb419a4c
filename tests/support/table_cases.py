"""The table of cases: format x content x expected reading. Each case is a kind that users have met, with its neighbours."""

import datetime
import decimal
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa

from tests.support.table_files import (
    Fill,
    class_labels,
    damaged_page,
    files,
    image_folder,
    parquet,
    picture,
    saved,
    text,
    two_titles,
)


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


def titles(*pairs: tuple[str, str]) -> dict[str, dict[str, Any]]:
    return {item_id: {"title": title} for item_id, title in pairs}


BROKEN, GOOD = picture()[:40], picture()
PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
ITEM = '{"item_id": "1", "title": "x"}\n'
ITEM_CSV = "item_id,title\n1,x\n"
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
    Case("a JSON array", text("items.jsonl", f"[{ITEM.strip()}]"), {}, [(0, "no JSON object but list")]),
    Case("commas behind JSON objects", text("items.jsonl", ITEM.strip() + ",\n"), {}, [(0, "Extra data")]),
    Case("two columns of one name", two_titles, {}, [(0, "two columns have one name")]),
    # encodings
    Case("UTF-16 without a mark", text("items.csv", ITEM_CSV, "utf-16-le"), {}, [(0, "--encoding utf-16-le")]),
    Case(
        "UTF-16 by name",
        text("items.csv", ITEM_CSV, "utf-16-le"),
        titles(("1", "x")),
        options={"encoding": "utf-16-le"},
    ),
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
    # neighbours
    Case(
        "a key of JSON with half a surrogate pair",
        text("items.jsonl", '{"item_id": "a", "title": "x", "k\\ud800": 1}\n' + ITEM),
        titles(("1", "x")),
        [(0, "name is not valid Unicode")],
    ),
    Case(
        "lists in lists in lists",
        text("items.jsonl", f'{{"item_id": "a", "title": "x", "image": {"[" * 900}{"]" * 900}}}\n' + ITEM),
        titles(("1", "x")),
        [(0, "recursion")],
    ),
    Case(
        "dates beyond the calendar",
        parquet(
            ("item_id", ["a", "b", "c"]),
            ("title", pa.array([2_147_483_647, 19_905, None], pa.date32())),
            ("content", pa.array([0, 2**62, 0], pa.timestamp("us"))),
        ),
        {"c": {"content": "1970-01-01 00:00:00"}},
        [(0, "title is a date or time that can't be read"), (1, "content is a date or time")],
    ),
    Case(
        "a column of our own name",
        parquet(("item_id", ["a"]), ("title", ["x"]), ("__fault__", ["y"])),
        titles(("a", "x")),
    ),
    Case("what is no encoding of text", text("items.csv", ITEM_CSV), {}, [(0, "rot13")], {"encoding": "rot13"}),
    Case("a mark that is missing", text("items.csv", ITEM_CSV), {}, [(0, "--encoding utf-16")], {"encoding": "utf-16"}),
    Case(
        "a byte too many in UTF-16",
        text("items.csv", (ITEM_CSV + "2,y\n").encode("utf-16") + b"A"),
        titles(("1", "x"), ("2", "y")),
        [(2, "not utf-16")],
    ),
    Case(
        "line ends of all kinds",
        text("items.csv", "item_id,title\r\na,x\rb,y\nc,z\r\n"),
        titles(("a", "x"), ("b", "y"), ("c", "z")),
    ),
    Case("empty lines above the header", text("items.csv", "\n\n" + ITEM_CSV), titles(("1", "x"))),
    Case(
        "columns without a name", text("items.csv", ",item_id,title,\n0,a,x,\n1,b,y,\n"), titles(("a", "x"), ("b", "y"))
    ),
    Case(
        "texts of several lines with commas",
        text("items.csv", 'item_id,title\na,"Hello\nworld, all"\nb,"x\r\nyes, z"\n'),
        titles(("a", "Hello\nworld, all"), ("b", "x\r\nyes, z")),
    ),
    Case(
        "two stray quotes, ids of letters",
        text("items.csv", 'item_id,title\nab,"5 inch\ncd,y\nef,6"\ngh,z\n'),
        titles(("cd", "y"), ("ef", '6"'), ("gh", "z")),
        [(0, "quote")],
    ),
    Case(
        "long fields, quoted and not",
        text("items.csv", f'item_id,title\na,{"x" * 200_000}\nb,"{"y" * 200_000}"\n'),
        titles(("a", "x" * 200_000), ("b", "y" * 200_000)),
    ),
    Case(
        "empty files in a folder",
        files(
            a=text("x.csv", ""),
            b=text("x.jsonl", ""),
            c=parquet(("item_id", pa.nulls(0)), ("title", pa.nulls(0))),
            d=text("x.csv", ITEM_CSV),
        ),
        titles(("1", "x")),
    ),
    Case(
        "floats of 32 bits",
        parquet(
            ("item_id", pa.array([0.5, 2.0, 2.0**25], pa.float32())), ("title", pa.array([0.1, 3.0, 1.0], pa.float32()))
        ),
        titles(("0.5", "0.1"), ("2", "3")),
        [(2, "too large")],
    ),
]
