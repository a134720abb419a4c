"""`make bench` measures what it says: work counts wherever it is done, and the JSON file holds all that the table shows."""

import json
import statistics
import subprocess
import sys

import pytest

from tests.benchmarks.ratios import compare, table, write


def spin(rounds: int) -> int:
    return sum(number * number for number in range(rounds))


def test_the_json_holds_every_round_and_the_tables_figures(tmp_path):
    ratios = [
        compare("thrice the work", lambda: spin(600_000), "once", lambda: spin(200_000), 5, target=1.5),
        compare("without a target", lambda: spin(1000), "the same", lambda: spin(1000), 2),
    ]
    write(ratios, tmp_path / "folder" / "bench.json")
    first, second = json.loads((tmp_path / "folder" / "bench.json").read_text(encoding="utf-8"))
    assert (first["name"], first["baseline"], first["target"], second["target"]) == (
        "thrice the work",
        "once",
        1.5,
        None,
    )
    assert len(first["rounds"]) == 5 and len(second["rounds"]) == 2
    assert first["median"] == statistics.median(first["rounds"])
    assert first["seconds"] > 0 and first["wall"] > 0
    line = table(ratios).splitlines()[1]
    assert line.startswith("thrice the work / once ")
    figures = (first["median"], min(first["rounds"]), max(first["rounds"]), first["wall"], 1.5, first["seconds"])
    assert line.split()[-6:] == [f"{figure:.2f}" for figure in figures]


@pytest.mark.parametrize("where", ["here", "in a process of its own"])
def test_work_is_counted_wherever_it_is_done(where):
    """Ten million additions are no fewer CPU seconds in a child; a sleep is none."""
    code = "sum(range(10_000_000))"
    work = (lambda: exec(code)) if where == "here" else lambda: subprocess.run([sys.executable, "-c", code], check=True)
    idle = [sys.executable, "-S", "-c", "import time; time.sleep(0.2)"]
    ratio = compare("work", work, "sleep", lambda: subprocess.run(idle, check=True), 3)
    assert ratio.median > 1
