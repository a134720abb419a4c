"""Ratios of process time, measured in turns, as one table and one JSON file.

Both sides of a ratio run alternately in one process, so that a busy machine is busy for both, and CPU seconds are counted
beside wall time. The spread is that of the rounds.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.tables.commands.files import write_json


@dataclass(frozen=True)
class Ratio:
    """How many times the CPU seconds of a baseline something takes.

    Attributes:
        name: of what is measured.
        baseline: what it is divided by.
        rounds: ratio of process time of each round.
        wall: median ratio of wall time.
        seconds: median process time of what is measured.
        target: of the median; None: no target.
    """

    name: str
    baseline: str
    rounds: list[float]
    wall: float
    seconds: float
    target: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def compare(
    name: str,
    measured: Callable[[], Any],
    baseline_name: str,
    baseline: Callable[[], Any],
    rounds: int,
    target: float | None = None,
) -> Ratio:
    """Runs both in turns; the first round warms up and doesn't count."""
    times = [(_seconds(measured), _seconds(baseline)) for _ in range(rounds + 1)][1:]
    return Ratio(
        name,
        baseline_name,
        [ours[0] / bare[0] for ours, bare in times],
        statistics.median(ours[1] / bare[1] for ours, bare in times),
        statistics.median(ours[0] for ours, _ in times),
        target,
    )


def table(ratios: list[Ratio]) -> str:
    """One line for each ratio: median, least and most of the rounds, wall time, target."""
    lines = [f"{'':56}{'ratio':>7}{'least':>7}{'most':>7}{'wall':>7}{'target':>8}{'CPU s':>8}"]
    for ratio in ratios:
        figures = (ratio.median, min(ratio.rounds), max(ratio.rounds), ratio.wall)
        target = "" if ratio.target is None else f"{ratio.target:.2f}"
        label = f"{ratio.name} / {ratio.baseline}"
        lines.append(f"{label:56}" + "".join(f"{f:7.2f}" for f in figures) + f"{target:>8}{ratio.seconds:8.2f}")
    return "\n".join(lines)


def write(ratios: list[Ratio], path: Path) -> None:
    """All figures, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(json.loads(json.dumps([asdict(ratio) | {"median": ratio.median} for ratio in ratios])), path)


def _seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of this process and those that it has waited for, and seconds, of one call."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    function()
    return _cpu_seconds() - cpu, time.perf_counter() - wall


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
