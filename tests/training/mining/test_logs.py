"""Logs as people have them: what each holds, on DuckDB and on Spark; broken rows cost themselves and are listed."""

import datetime
import json
from decimal import Decimal
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.web_server import WebServer
from tests.training.mining.test_mining import mined, spark
from training.mining.cooccurrence import MiningArguments, MiningError
from training.mining.engines import opened
from training.mining.mining import read_usable


__all__ = ["spark"]
HEADER = "user_id,item_id,timestamp\n"
NAN = float("nan")


def text(content, name="log.csv", encoding="utf-8"):
    return lambda folder: (folder / name).write_bytes(content.encode(encoding) if isinstance(content, str) else content)


def parquet(name="log.parquet", times=(1, 2, 3, 4), **ids):
    """A file of up to four rows; columns not given are texts `u`, `i`."""

    def write(folder):
        rows = len(next(iter(ids.values())))
        users = ids.get("user", pa.array(["u"] * rows))
        items = ids.get("item", pa.array([f"i{row}" for row in range(rows)]))
        moments = times if isinstance(times, pa.Array) else pa.array(times[:rows])
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": moments}), path)

    return write


def both(*writers):
    def write(folder):
        for writer in writers:
            writer(folder)

    return write


def rows(*written):
    """(user, item, seconds) of `u a 1` words."""
    return sorted((user, item, int(time) * 1000) for user, item, time in (row.split("|") for row in written))


STRAY = [f"u{n % 300},i{n % 40},{n}" for n in range(60_000)]
STRAY[40_000] = 'u1,"i5 inch,40000'
IDS = ["007", "1e5", "1.10", "1.1", "NA", "null", "#a", "书"]
JULY = datetime.datetime(2024, 7, 1, 10, tzinfo=datetime.UTC)
SECONDS = int(JULY.timestamp())

# What is written; the usable rows; the number of rejects by kind of reason.
CASES = {
    "ids as written, csv": (
        text(HEADER + "".join(f"{one},{one},1\n" for one in IDS)), rows(*(f"{one}|{one}|1" for one in IDS)), {},
    ),
    "ids as written, jsonl": (
        text("".join(json.dumps({"user_id": one, "item_id": one, "timestamp": 1}) + "\n" for one in IDS), "log.jsonl"),
        rows(*(f"{one}|{one}|1" for one in IDS)), {},
    ),
    "json numbers": (
        text('{"user_id": 7.0, "item_id": 1e5, "timestamp": 1.0}\n{"user_id": 12345678901, "item_id": 1.5, "timestamp": "2"}\n'
             '{"user_id": true, "item_id": NaN, "timestamp": 3}\n{"user_id": "a", "item_id": [1], "timestamp": 4}\n\n7\n',
             "log.jsonl"),
        rows("7|100000|1", "12345678901|1.5|2"), {"item_id is missing": 1, "item_id is a list where a text is expected": 1,
                                                  "unreadable row": 1},
    ),
    "escapes": (
        text('{"user_id": "\\u4e66", "item_id": "\\ud83d\\ude00", "timestamp": 1}\n'
             '{"user_id": "\\u4e66", "item_id": "a", "timestamp": 2}\n', "log.jsonl"),
        rows("书|😀|1", "书|a|2"), {},
    ),
    "half a surrogate": (
        text('{"user_id": "\\ud800", "item_id": "a", "timestamp": 1}\n{"user_id": "b", "item_id": "a", "timestamp": 2}\n',
             "log.jsonl"),
        rows("b|a|2"), {None: 1},
    ),
    "floats": (
        parquet(user=pa.array([7.0, NAN, None, 12345678901.0]), item=pa.array([1.5, 2.0, 3.0, 1e-5])),
        rows("7|1.5|1", "12345678901|1e-05|4"), {"user_id is missing": 2},
    ),
    "float32, infinity": (
        parquet(user=pa.array([7.0, 16777218.0, float("inf")], pa.float32())), rows("7|i0|1"), {None: 2},
    ),
    "binary": (
        parquet(user=pa.array(["书".encode(), b"\xe9", b" a ", None], pa.binary())), rows("书|i0|1", "a|i2|3"),
        {None: 1, "user_id is missing": 1},
    ),
    "decimals, bools": (
        parquet(user=pa.array([Decimal("7.00"), Decimal("1.10")]), item=pa.array([True, False])),
        rows("7|true|1", "1.10|false|2"), {},
    ),
    "dictionary, string_view": (
        parquet(user=pa.array(["a", None, "a"]).dictionary_encode(), item=pa.array(["x", "y", " z "], pa.string_view())),
        rows("a|x|1", "a|z|3"), {"user_id is missing": 1},
    ),
    "uint64": (parquet(user=pa.array([2**63, 7], pa.uint64())), rows("9223372036854775808|i0|1", "7|i1|2"), {}),
    "every kind of blank": (
        parquet(user=pa.array(["\u3000a\u00a0", "\u2003", "a\t"]), times=pa.array([" 1\u3000", "2", "\t3 "])),
        rows("a|i0|1", "a|i2|3"), {"user_id is missing": 1},
    ),
    "files of two types": (
        both(parquet("log/a.parquet", user=pa.array([7, 8])), parquet("log/b.parquet", user=pa.array(["007", "7"])),
             parquet("log/c.parquet", user=pa.array([7.0, NAN])), parquet("log/day=1/_d.parquet", user=pa.array(["hidden"])),
             parquet("log/_temporary/0/e.parquet", user=pa.array(["hidden"])), parquet("log/.f.parquet", user=pa.array(["no"])),
             text(HEADER + "csv,i9,9\n", "log/g.csv")),
        rows("7|i0|1", "8|i1|2", "007|i0|1", "7|i1|2", "7|i0|1", "csv|i9|9"), {"user_id is missing": 1},
    ),
    "times of two types": (
        both(parquet("log/a.parquet", user=pa.array(["a"]), times=[SECONDS]),
             parquet("log/b.parquet", user=pa.array(["b"]), times=pa.array([JULY], pa.timestamp("us", "UTC"))),
             parquet("log/c.parquet", user=pa.array(["c"]), times=pa.array(["2024-07-01T12:00+02:00"])),
             parquet("log/d.parquet", user=pa.array(["d"]), times=pa.array([float(SECONDS)])),
             parquet("log/e.parquet", user=pa.array(["e"]), times=pa.array([True]))),
        rows(*(f"{user}|i0|{SECONDS}" for user in "abcd")), {"timestamp is unreadable": 1},
    ),
    "a file lacks a column": (
        both(parquet("log/a.parquet", user=pa.array(["a"])),
             lambda folder: pq.write_table(pa.table({"user_id": ["b"], "item_id": ["i0"]}), folder / "log/b.parquet")),
        rows("a|i0|1"), {"timestamp is missing": 1},
    ),
    "nanoseconds with a zone": (
        parquet(user=pa.array(["a", "b"]), times=pa.array([JULY, None], pa.timestamp("ns", "Asia/Tokyo"))),
        rows(f"a|i0|{SECONDS}"), {"timestamp is missing": 1},
    ),
    "nanoseconds": (
        parquet(user=pa.array(["a"]), times=pa.array([JULY.replace(tzinfo=None)], pa.timestamp("ns"))),
        rows(f"a|i0|{SECONDS}"), {},
    ),
    "dates": (
        parquet(user=pa.array(["a"]), times=pa.array([JULY.date()])), rows(f"a|i0|{SECONDS - 36000}"), {},
    ),
    "dates as digits": (
        parquet(user=pa.array(["a", "b", "c", "d"]), times=pa.array([20240701, 202407011230, 20240701123000, SECONDS])),
        rows(f"d|i3|{SECONDS}"), {"timestamp is unreadable": 3},
    ),
    "dates as digits in text": (
        text(HEADER + f"a,i,20240701\nb,i,20240701.0\nc,i,2024-07-01\nd,i,{SECONDS}000\ne,i,{SECONDS}\nf,i,1d\ng,i,10:00\n"),
        rows(f"c|i|{SECONDS - 36000}", f"e|i|{SECONDS}"), {"timestamp is unreadable": 5},
    ),
    "a stray quote": (
        text(HEADER + "\n".join(STRAY) + "\n"),
        rows(*(row.replace(",", "|") for row in STRAY if '"' not in row)), {"unreadable row": 1},
    ),
    "stray quotes": (
        text(HEADER + 'u,a,1\nu,"5 inch,2\nu,b,3\nu,5" x,4\nu,"c",5\nu,"d, e",6\nu,f,7\nu,"g\nh",8\nu,i"\nu,k,9'),
        rows("u|a|1", "u|b|3", "u|c|5", "u|d, e|6", "u|f|7", 'u|5" x|4', "u|g\nh|8", "u|k|9"), {"unreadable row": 2},
    ),
    "short, long, empty lines": (
        text(HEADER + "u,a\n\n  \nu,a,1,2\nu,b,2\n,b,3\nu,,4\nu,b,\n,,\n"), rows("u|b|2"),
        {"unreadable row": 2, "user_id is missing": 1, "item_id is missing": 1, "timestamp is missing": 1, "no readable row": 1},
    ),
    "all quoted, more columns": (
        text('"extra","item_id","user_id","timestamp"\r\n"x, y","a","u","1"\r\n"","b","#u","2"\r\n'), rows("u|a|1", "#u|b|2"), {},
    ),
    "comment above": (
        text("# made by us\n# today\n" + HEADER + "#u,#a,1\n#u,b,2\n# a remark\n"), rows("#u|#a|1", "#u|b|2"),
        {"a comment line above the header": 2, "unreadable row": 1},
    ),
    "carriage returns": (text((HEADER + "u,a,1\nu,b,2\n").replace("\n", "\r")), rows("u|a|1", "u|b|2"), {}),
    "byte-order mark": (text(HEADER + "u,书,1\n", encoding="utf-8-sig"), rows("u|书|1"), {}),
    "byte-order mark, jsonl": (
        text('{"user_id": "u", "item_id": "a", "timestamp": 1}\n', "log.jsonl", "utf-8-sig"), rows("u|a|1"), {},
    ),
    "utf-16": (text(HEADER + "u,书,1\nu,b,2\n", encoding="utf-16"), rows("u|书|1", "u|b|2"), {}),
    "latin-1": (text((HEADER + "é1,a,1\nè1,a,2\nu,b,3\n").encode("latin-1")), rows("u|b|3"), {"unreadable row": 2}),
    "gbk": (text(HEADER + "书,a,1\nu,b,3\n", encoding="gbk"), rows("u|b|3"), {"unreadable row": 1}),
    "not utf-8 in parquet": (
        parquet(user=pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"ab"], pa.binary()).buffers())),
        rows("ab|i1|2"), {None: 1},
    ),
    "brackets in the name": (parquet("log[1].parquet", user=pa.array(["a"])), rows("a|i0|1"), {}),
}  # fmt: skip

ON_SPARK = (
    *("floats", "binary", "dictionary, string_view", "uint64", "every kind of blank", "files of two types"),
    *(
        "times of two types",
        "a file lacks a column",
        "nanoseconds with a zone",
        "nanoseconds",
        "dates",
        "dates as digits",
    ),
    *(
        "dates as digits in text",
        "stray quotes",
        "short, long, empty lines",
        "not utf-8 in parquet",
        "brackets in the name",
    ),
)
"""All in which the engine itself has a part; and some text."""


def outcome(write, folder, engine="duckdb", **options):
    """Usable rows and rejects by reason, as `mine` reads the log; and the list of rejects."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log").mkdir(exist_ok=True)
    write(folder)
    sources = [path for path in folder.iterdir() if path.name != "log"] or [folder / "log"]
    spill = folder / ".spill"
    spill.mkdir()
    arguments = MiningArguments(str(sources[0]), "unused", engine=engine, **options)
    with opened(arguments, spill) as backend:
        counts, usable = read_usable(backend, arguments, spill, folder / "rejects.jsonl", lambda table: table)
        found = sorted(usable.execute().astype({"user_id": str, "item_id": str}).itertuples(index=False, name=None))
    listed = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert len(listed) == sum(counts.values())
    return found, counts, listed


def check(case, folder, engine):
    write, expected, reasons = CASES[case]
    found, counts, _ = outcome(write, folder, engine)
    assert found == expected
    named = {reason: counts.pop(reason) for reason in reasons if reason is not None}
    assert named == {reason: count for reason, count in reasons.items() if reason is not None}
    assert sum(counts.values()) == reasons.get(None, 0)


@pytest.mark.parametrize("case", CASES)
def test_what_a_log_holds(case, tmp_path):
    check(case, tmp_path / "case", "duckdb")


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_SPARK)
def test_spark_reads_it_alike(case, tmp_path, spark):
    check(case, tmp_path / "case", "pyspark")


def test_a_reject_names_file_and_row(tmp_path):
    write = text(HEADER + 'u,a,1\nu,"b,2\nu,c\n\nu,d,4\n')
    _, _, listed = outcome(write, tmp_path / "careful")
    assert [(Path(row["file"]).name, row["row"]) for row in listed] == [("log.csv", 1), ("log.csv", 2)]
    assert [row["reason"] for row in listed] == [
        "unreadable row: a quote that nothing closes",
        "unreadable row: 2 fields, but the header has 3",
    ]
    _, _, listed = outcome(text(HEADER + "u,a,1\nu,c\n\nu,d,4\nu,e\n"), tmp_path / "fast")
    assert [(row["row"], row["reason"]) for row in listed] == [
        (1, "unreadable row: 2 fields, but the header has 3"),
        (4, "unreadable row: 2 fields, but the header has 3"),
    ]


def test_encoding_and_comment_are_read_where_they_are_named(tmp_path):
    write = text("; by us\n" + HEADER + "书,#a,1\n", encoding="gb18030")
    found, counts, _ = outcome(write, tmp_path / "log", encoding="gb18030", comment=";")
    assert (found, counts) == (rows("书|#a|1"), {})
    with pytest.raises(ValueError, match="knows no such encoding"):
        outcome(write, tmp_path / "again", encoding="klingon")


def test_a_damaged_page_costs_its_row_group(tmp_path):
    def write(folder):
        table = pa.table({"user_id": ["u"] * 40, "item_id": [f"i{n}" for n in range(40)], "timestamp": list(range(40))})
        path = folder / "log.parquet"
        pq.write_table(
            table, path, row_group_size=20, write_page_checksum=True, use_dictionary=False, compression="none"
        )
        column = pq.ParquetFile(path).metadata.row_group(0).column(1)
        content = bytearray(path.read_bytes())
        content[column.data_page_offset + column.total_compressed_size - 30] ^= 0xFF
        path.write_bytes(content)

    found, counts, _ = outcome(write, tmp_path / "log")
    assert len(found) in (20, 40)
    assert len(found) + sum(counts.values()) == 40


def test_the_popularity_cap_is_exact(tmp_path):
    """0.29 of 100 users are 29, though 0.29 * 100 is less than 29 in floats."""
    lines = [f"u{n},popular,1\nu{n},other{n},2\n" for n in range(29)] + [f"u{n},x{n},1\n" for n in range(29, 100)]
    source = tmp_path / "log.csv"
    source.write_text(HEADER + "".join(lines))
    found, _ = mined(MiningArguments(str(source), str(tmp_path / "pairs.parquet"), popularity_cap=0.29, top_targets=0))
    assert len(found) == 29
    source.write_text(HEADER + "".join(lines) + "u29,popular,0\n")
    with pytest.raises(MiningError, match="no pair is left"):
        mined(MiningArguments(str(source), str(tmp_path / "pairs.parquet"), popularity_cap=0.29))
    assert [MiningArguments("", "", popularity_cap=cap).most_users(users) for cap, users in [(0.57, 100), (1, 7)]] == [
        57,
        7,
    ]


def test_an_address_is_fetched_where_it_is_allowed_and_without_an_extension_of_duckdb(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def asked(source: str, **options) -> MiningArguments:
        return MiningArguments(source, str(tmp_path / "pairs.parquet"), **options)

    with WebServer() as web:
        web.answers["/log.csv"] = (200, (HEADER + "u,a,1\nu,b,2\nbroken\n").encode())
        with pytest.raises(MiningError, match=f"is not fetched: --allow_remote {web.host} would allow it"):
            mined(asked(f"{web.url}/log.csv"))
        assert not web.asked
        found, _ = mined(asked(f"{web.url}/log.csv", allow_remote=web.host))
        assert [row[:2] for row in found] == [("a", "b")]
        listed = (tmp_path / "pairs.rejects.jsonl").read_text(encoding="utf-8")
        assert json.loads(listed)["file"] == f"{web.url}/log.csv"
        for wrong in (f"{web.url}/none.csv", "nowhere://bucket/log.parquet"):
            with pytest.raises(MiningError, match="can't be fetched .*Copy the log here"):
                mined(asked(wrong, allow_remote=f"{web.host},nowhere://bucket"))
    with opened(MiningArguments("", ""), tmp_path) as backend:
        settings = [backend.settings[name] for name in ("autoinstall_known_extensions", "TimeZone")]
    assert settings == ["false", "UTC"]


def test_a_pattern_of_a_bucket_is_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = {"day=1/a.csv": "u,a,1", "day=2/b.csv": "u,b,2", "_temporary/c.csv": "u,c,3", "day=1/d.txt": "u,d,4"}
    system = fsspec.filesystem("memory")
    system.pipe({f"/logs/{name}": f"{HEADER}{row}\n".encode() for name, row in files.items()})
    for source in ("memory://logs", "memory://logs/*/*.csv"):
        arguments = MiningArguments(source, str(tmp_path / "pairs.parquet"), allow_remote="memory://logs")
        assert [row[:2] for row in mined(arguments)[0]] == [("a", "b")]


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(MiningError, match="two columns are called item_id"):
        outcome(text("user_id,item_id,item_id,timestamp\nu,a,b,1\n"), tmp_path / "log")


def test_files_are_those_that_are_meant(tmp_path):
    one = parquet("log/[1]/a.parquet", user=pa.array(["a"]))
    other = parquet("log/day=2/b.parquet", user=pa.array(["b"]))
    both(one, other, parquet("log/_temporary/c.parquet", user=pa.array(["c"])))(tmp_path)
    spill = tmp_path / "spill"
    spill.mkdir()
    for pattern, users in [("log", "ab"), ("log/**/*.parquet", "ab"), ("log/*/b.parquet", "b"), ("log/[[]1]/*", "a")]:
        arguments = MiningArguments(str(tmp_path / pattern), "unused")
        with opened(arguments, spill) as backend:
            _, usable = read_usable(backend, arguments, spill, tmp_path / "rejects.jsonl", lambda table: table)
            assert sorted(usable.user_id.execute()) == list(users)
