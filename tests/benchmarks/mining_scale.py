"""Mining a large synthetic log in bounded memory, and a small one beside the plain query.

    python -m tests.benchmarks.mining_scale [--interactions 100000000] [--memory_limit 5GB] [--folder DIR]

The log has 30 days, 20 interactions a user in the mean (a Pareto tail up to 500), and items of Zipf's law, exponent 1.
First `training/mine.py` runs on it in a process of its own: time, CPU time, peak of resident memory and of the spill
folder. Then, on a log of `plain_interactions`, it runs against the textbook query in DuckDB, one self-join of every
user's history, with the same memory: `of_plain` are its time and memory as shares of the plain query's.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
from transformers import HfArgumentParser


PLAIN = """
COPY (
    WITH log AS (SELECT CAST(user_id AS TEXT) AS u, CAST(item_id AS TEXT) AS i, timestamp AS t FROM '{log}'),
    n AS (SELECT u, COUNT(DISTINCT i) AS n FROM log GROUP BY u),
    both_items AS (
        SELECT DISTINCT a.u, a.i AS query_id, b.i AS target_id FROM log a JOIN log b
        ON a.u = b.u AND b.t > a.t AND b.t <= a.t + INTERVAL 7 DAY AND a.i <> b.i
    ),
    pairs AS (
        SELECT query_id, target_id, SUM(1 / n) AS score, COUNT(*) AS users FROM both_items JOIN n USING (u) GROUP BY ALL
    )
    FROM pairs WHERE users >= 2
    QUALIFY ROW_NUMBER() OVER (PARTITION BY query_id ORDER BY score DESC, target_id) <= 10
    ORDER BY query_id, score DESC, target_id
) TO '{output}' (FORMAT parquet)
"""
QUERY = "import sys, duckdb; c = duckdb.connect(config=dict(memory_limit=sys.argv[2], temp_directory=sys.argv[3])); \
c.execute('SET enable_progress_bar = false'); c.execute(sys.argv[1])"


@dataclass
class Options:
    """Sizes of the benchmark."""

    interactions: int = field(default=100_000_000, metadata={"help": "Rows of the large log, about; 0: leave it out."})
    plain_interactions: int = field(default=2_000_000, metadata={"help": "Rows of the log of the comparison, about."})
    memory_limit: str = field(default="5GB", metadata={"help": "DuckDB's memory in both."})
    folder: str | None = field(default=None, metadata={"help": "Where the logs and all spilling go; some 60 GB."})


def write_log(path: Path, interactions: int) -> None:
    """The synthetic log, as Parquet in random order; drawn anew in every run."""
    users, items = interactions // 20, max(interactions // 100, 1000)
    connection = duckdb.connect(config={"memory_limit": "3GB", "temp_directory": str(path.parent / "spill")})
    connection.execute(f"""
        COPY (
            WITH users AS (
                SELECT range AS user_id, LEAST(500, CEIL(6.6 * POW(1 - RANDOM(), -1 / 1.45)))::INT AS n
                FROM range({users})
            ),
            log AS (SELECT user_id, UNNEST(RANGE(n)) FROM users)
            SELECT user_id, FLOOR(POW({items}, RANDOM()))::INT - 1 AS item_id,
                TO_TIMESTAMP(1_700_000_000 + FLOOR(RANDOM() * 30 * 86400)) AS timestamp
            FROM log ORDER BY RANDOM()
        ) TO '{path}' (FORMAT parquet)""")
    connection.close()


def measure(command: list[str], spill: Path) -> dict[str, Any]:
    """Run a command; seconds, CPU seconds, peak of resident memory and of the spill folder in GiB."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(1):
            sizes = (path.stat().st_blocks * 512 for path in spill.rglob("*") if path.is_file())
            try:
                peak[0] = max(peak[0], sum(sizes))
            except FileNotFoundError:  # a spill file that went away while it was counted
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    done.set()
    watcher.join()
    if os.waitstatus_to_exitcode(status) not in (0, 3):  # 3: with rejects
        raise SystemExit(f"failed: {command[:3]}")
    return {
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "spill_gib": round(peak[0] / 2**30, 2),
    }


def measure_mine(log: Path, output: Path, spill: Path, memory_limit: str) -> dict[str, Any]:
    """`training/mine.py` with the pairs of at least two users."""
    command = [sys.executable, "training/mine.py", "--interactions", str(log), "--output", str(output)]
    return measure(
        [*command, "--min_users", "2", "--memory_limit", memory_limit, "--temp_directory", str(spill)], spill
    )


def same_pairs(first: Path, second: Path) -> float:
    """Share of the first table's pairs that the second has too: ties and rounding may swap the tenth target."""
    query = "SELECT COUNT(*) / (SELECT COUNT(*) FROM '{0}') FROM '{0}' a JOIN '{1}' b USING (query_id, target_id)"
    return round(duckdb.sql(query.format(first, second)).fetchall()[0][0], 4)


def main() -> None:
    """One line of JSON for each part."""
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    spill = folder / "spill"
    spill.mkdir()
    try:
        if options.interactions:
            write_log(folder / "large.parquet", options.interactions)
            measured = measure_mine(folder / "large.parquet", folder / "pairs.parquet", spill, options.memory_limit)
            rows = duckdb.sql(f"SELECT COUNT(*) FROM '{folder}/large.parquet'").fetchall()[0][0]
            print(json.dumps({"interactions": rows, **measured}), flush=True)
        log, ours, plain = (folder / f"{name}.parquet" for name in ("small", "ours", "plain"))
        write_log(log, options.plain_interactions)
        mined = measure_mine(log, ours, spill, options.memory_limit)
        query = PLAIN.format(log=log, output=plain)
        textbook = measure([sys.executable, "-c", QUERY, query, options.memory_limit, str(spill)], spill)
        shares = {key: round(mined[key] / textbook[key], 2) for key in ("seconds", "cpu_seconds", "peak_gib")}
        print(json.dumps({"mine": mined, "plain": textbook, "of_plain": shares, "same": same_pairs(ours, plain)}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
