"""Mined pairs against a brute-force reading of the definition, on DuckDB and on Spark; logs that can't be read whole."""

import json
import random
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tests.support.machine import require_java
from training.mining.cooccurrence import UNIT, MiningArguments, MiningError, check_rows
from training.mining.engines import opened, read_log
from training.mining.mining import Mined, mine, parse_time, write_rejects
from training.tables.commands.handler import OptionError


ROOT = Path(__file__).parents[3]
HOUR = 3_600_000
SETTINGS = {
    "plain": {},
    "bounds": {"lower_score": 0.2, "upper_score": 0.9, "min_users": 2, "top_targets": 3},
    "sessions": {"session_gap_minutes": 90, "top_targets": 0},
    "symmetric": {"symmetric": True, "window_days": 0.2, "top_targets": 2},
    "symmetric sessions": {"symmetric": True, "session_gap_minutes": 60, "popularity_cap": 0.8},
    "capped": {"popularity_cap": 0.6, "max_items_per_user": 6, "window_days": 1.5},
    "instant": {"window_days": 1 / 24, "top_targets": 1},
}


def random_log(seed, rows=220):
    """(user, item, milliseconds) of full hours around 1970: repeats, equal times, ids whose order as text is not their
    order as numbers, users with a single item and one with all."""
    draw = random.Random(seed)
    items = ["9", "10", "100", "ä", "z", "😀", "a b", "é", "11"]
    log = [
        (f"u{min(draw.randrange(14), draw.randrange(14))}", draw.choice(items[: draw.randint(1, 9)]),
         draw.randrange(-60, 60) * HOUR)
        for _ in range(rows)
    ]  # fmt: skip
    return [*log, ("single", "9", 0), *(("robot", item, hour * HOUR) for hour, item in enumerate(items))]


def brute_force(log, arguments):
    """Every pair of interactions of every user, one after another."""
    consumed = defaultdict(set)
    for user, item, _ in log:
        consumed[user].add(item)
    users = {user for user, items in consumed.items() if len(items) <= arguments.max_items_per_user}
    popularity = {item: sum(item in consumed[user] for user in users) for _, item, _ in log}
    allowed = {item for item, count in popularity.items() if count <= arguments.popularity_cap * len(users)}
    of_pair = defaultdict(set)
    for user in users:
        events = sorted((time, item) for who, item, time in log if who == user)
        session, numbered = 0, []
        for position, (time, item) in enumerate(events):
            gap = arguments.session_gap_ms
            session += gap is not None and position > 0 and time - events[position - 1][0] > gap
            numbered.append((time, item, session))
        for time, a, session in numbered:
            for later, b, other_session in numbered:
                passed = later - time
                near = abs(passed) if arguments.symmetric else passed
                in_order = arguments.symmetric or passed > 0
                if in_order and near <= arguments.window_ms and a != b and session == other_session:
                    of_pair[a, b].add(user)
    rows = defaultdict(list)
    for (a, b), those in of_pair.items():
        score = sum(UNIT // len(consumed[user]) for user in those) / UNIT
        bounded = arguments.lower_score <= score <= arguments.upper_score
        if {a, b} <= allowed and bounded and len(those) >= arguments.min_users:
            rows[a].append((-score, b, len(those)))
    most = arguments.top_targets or None
    return [(a, b, -score, users) for a in sorted(rows) for score, b, users in sorted(rows[a])[:most]]


def write_log(path, log, unit=1000):
    columns = {"user_id": [r[0] for r in log], "item_id": [r[1] for r in log], "timestamp": [r[2] / unit for r in log]}
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()))
    return path


def mined(arguments) -> tuple[list, Mined]:
    result = mine(arguments)
    return read(arguments.output), result


def read(path):
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def spark():
    """One session for the whole file, as small as it gets; `mine` finds and uses it."""
    from pyspark.sql import SparkSession

    require_java()
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    for option in ("spark.sql.adaptive.enabled", "spark.sql.codegen.wholeStage", "spark.ui.showConsoleProgress"):
        builder = builder.config(option, "false")  # they pay off in large jobs only
    session = builder.config("spark.sql.shuffle.partitions", "1").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_pairs_equal_brute_force(tmp_path, setting, seed):
    """Exactly, in scores and order, whether mined at once or in many parts."""
    log = random_log(seed)
    source, output = write_log(tmp_path / "log.parquet", log), str(tmp_path / "pairs.parquet")
    arguments = MiningArguments(str(source), output, candidates_per_part=[10**9, 150, 1][seed], **SETTINGS[setting])
    found, result = mined(arguments)
    assert found == brute_force(log, arguments)
    counts = list(result.sides["all"].values())
    assert counts[0] == len(log)
    assert counts[-1] == len(found) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {**SETTINGS["bounds"], **SETTINGS["sessions"], "top_targets": 2},
        {**SETTINGS["symmetric"], **SETTINGS["capped"]},
    ],
)
def test_spark_gives_the_same_pairs(tmp_path, spark, options):
    """Whole tables are equal, scores to the last bit, and so are all counts."""
    source = write_log(tmp_path / "log.parquet", random_log(7))
    results = {}
    for engine in ("duckdb", "pyspark"):
        output = str(tmp_path / f"{engine}.parquet")
        results[engine] = mined(
            MiningArguments(str(source), output, engine=engine, candidates_per_part=3000, **options)
        )
    assert results["pyspark"] == results["duckdb"]
    assert len(results["duckdb"][0]) > 5


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_unusable_rows_are_listed_by_both_engines(tmp_path, spark, suffix):
    log = random_log(1)
    source = write_log(tmp_path / f"log{suffix}", log)
    rows = [("x", "9", "yesterday"), ("x", "9", "1e300"), ("x", "", "5"), (" ", "9", "5"), ("x", "9", "")]
    with source.open("a") as stream:
        for row in rows:
            record = dict(zip(("user_id", "item_id", "timestamp"), row, strict=True))
            stream.write(",".join(row) + "\n" if suffix == ".csv" else json.dumps(record) + "\n")
        stream.write("x,9,5,6\nx,9\n" if suffix == ".csv" else '{"user_id": \n[1]\n')
    expected = {
        "timestamp is unreadable": 2,
        "item_id is missing": 1,
        "user_id is missing": 1,
        "timestamp is missing": 1,
    }
    for engine in ("duckdb", "pyspark"):
        with checked(source, tmp_path, engine=engine) as (raw, rows):
            rejected = write_rejects(raw.broken, rows.filter(rows.reason.notnull()), tmp_path / "rejects.jsonl")
            usable = rows.filter(rows.reason.isnull()).select("user_id", "item_id", "time").execute()
        assert {reason: rejected.pop(reason) for reason in expected} == expected
        assert sum(rejected.values()) == 2
        listed = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
        assert len(listed) == 7
        assert {"user_id": "x", "item_id": "9", "timestamp": "yesterday", "reason": "timestamp is unreadable"} in listed
        assert sorted(usable.itertuples(index=False, name=None)) == sorted(log)


@pytest.mark.slow
def test_every_way_to_write_a_time_is_the_same_time(tmp_path, spark):
    times = [-86_399_750, -1, 0, 1_250, 1_700_000_000_123, 253_402_300_799_000]
    moments = [datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time) for time in times]
    eastern = timezone(timedelta(hours=9))
    ways = {
        "s": pa.array([time / 1000 for time in times]),
        "ms": pa.array(times),
        "us": pa.array([time * 1000 for time in times]),
        "zone": pa.array(moments, pa.timestamp("us", "UTC")),
        "naive": pa.array([moment.replace(tzinfo=None) for moment in moments], pa.timestamp("us")),
        "iso": pa.array([moment.replace(tzinfo=None).isoformat() for moment in moments]),
        "offset": pa.array([moment.astimezone(eastern).isoformat() if moment.year < 9999 else moment.isoformat()
                            for moment in moments]),
        "text": pa.array([str(time / 1000) for time in times]),
    }  # fmt: skip
    ids = pa.array([str(number) for number in range(len(times))])
    for way, column in ways.items():
        source = tmp_path / f"{way}.parquet"
        pq.write_table(pa.table({"user_id": ids, "item_id": ids, "timestamp": column}), source)
        for engine in ("duckdb", "pyspark"):
            unit = way if way in ("ms", "us") else "s"
            with checked(source, tmp_path, engine=engine, timestamp_unit=unit) as (_, rows):
                assert rows.order_by("user_id").time.execute().tolist() == times, (way, engine)
    assert parse_time("1970-01-02", "s") == parse_time("86400", "s") == parse_time("1970-01-02T02:00+02:00", "ms")


@contextmanager
def checked(source, folder, **options):
    arguments = MiningArguments(str(source), "unused", **options)
    with opened(arguments, folder) as backend:
        raw = read_log(backend, arguments.interactions, folder)
        yield raw, check_rows(raw.rows, arguments.timestamp_unit)


def test_sides_of_a_split_know_nothing_of_each_other(tmp_path):
    """Each side's pairs are those of a log that holds this side alone; the split's own instant is test."""
    log = random_log(3, rows=400)
    source = write_log(tmp_path / "log.parquet", log)
    outputs = {"output": str(tmp_path / "train.parquet"), "test_output": str(tmp_path / "test.parquet")}
    options = {"popularity_cap": 0.7, "min_users": 2, "session_gap_minutes": 300}
    mine(MiningArguments(str(source), split_time="1970-01-01T05:00", **outputs, **options))
    alone = MiningArguments("", "", **options)
    before = [row for row in log if row[2] < 5 * HOUR]
    assert read(outputs["output"]) == brute_force(before, alone)
    assert read(outputs["test_output"]) == brute_force([row for row in log if row[2] >= 5 * HOUR], alone)
    assert 5 * HOUR in {time for *_, time in log}


def test_order_and_pieces_of_the_log_do_not_matter(tmp_path):
    log = random_log(4)
    folder = tmp_path / "log" / "day=1"
    folder.mkdir(parents=True)
    random.Random(0).shuffle(log)
    write_log(folder / "a.parquet", log[:100])
    write_log(folder / "b.parquet", log[100:] + log[:7])
    for source in (tmp_path / "log", folder / "*.parquet"):
        found, _ = mined(MiningArguments(str(source), str(tmp_path / "pairs.parquet")))
        assert found == brute_force(log, MiningArguments("", ""))


def test_a_log_that_gives_nothing_says_why_and_leaves_the_old_pairs(tmp_path):
    output = tmp_path / "pairs.parquet"
    mine(MiningArguments(str(write_log(tmp_path / "log.parquet", random_log(0))), str(output)))
    earlier = output.read_bytes()

    def fails(message, log, **options):
        with pytest.raises(MiningError, match=message):
            mine(MiningArguments(str(log), str(output), **options))
        assert output.read_bytes() == earlier
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    lacking = tmp_path / "lacking.csv"
    lacking.write_text("user_id,item,when\n1,2,3\n")
    fails("no column item_id, timestamp; it has user_id, item, when", lacking)
    unnamed = tmp_path / "unnamed.jsonl"
    unnamed.write_text('{"user_id": 1, "item": 2, "timestamp": 3}\n{"user_id": 1, "item": 3, "timestamp": 4}\n')
    fails(r"No row of the log is usable: item_id is missing \(2\)", unnamed)
    assert len(output.with_suffix(".rejects.jsonl").read_text().splitlines()) == 2
    log = tmp_path / "log.parquet"
    fails(r"no pair is left.*of at least 99 users 0", log, min_users=99)
    fails("no such file", tmp_path / "none-*.parquet")
    fails("a log is .parquet", lacking.rename(tmp_path / "lacking.xlsx"))
    fails("beyond the year 9999", log, split_time="1e15", test_output="unused")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really")
    fails("broken.parquet", broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_time": "5"}, "belong together"),
        ({"engine": "polars"}, "expected duckdb or pyspark"),
        ({"window_days": 0}, "at least a millisecond"),
        ({"popularity_cap": 1.5}, "popularity_cap is 1.5; it must be"),
        ({"lower_score": 2, "upper_score": 1}, "is above --upper_score"),
        ({"timestamp_unit": "h"}, "expected s, ms or us"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises((MiningError, OptionError), match=message):
        MiningArguments("log.parquet", "pairs.parquet", **options)


def test_command(tmp_path):
    log = write_log(tmp_path / "log.csv", random_log(0))
    command = [sys.executable, "training/mine.py", "--interactions", str(log), "--output", str(tmp_path / "p.parquet")]
    done = subprocess.run([*command, "--min_users", "2"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "of at least 2 users" in done.stdout
    assert read(tmp_path / "p.parquet") == brute_force(random_log(0), MiningArguments("", "", min_users=2))
    wrong = subprocess.run([*command, "--window_days", "-1"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--window_days is -1.0; it must be at least 0" in wrong.stderr
