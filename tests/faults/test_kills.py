"""Jobs that are killed or stopped at any moment: nothing half-written is seen, and the next start ends with the same bytes."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.support.jobs import (
    JOBS,
    files_of,
    prepare,
    read_lines,
    result_of,
    run_job,
    start_job,
    strangers_of,
    workers_of,
)


KILLED = ("train", "encode", "mine", "index", "publish_data")
"""Jobs that CI kills; the others are killed nightly."""
FEW, MANY = 3, 20
WITH_WORKER = {
    "train": "--dataloader_num_workers 1",
    "encode": "--num_workers 1",
    "evaluate": "--num_workers 1 --batch_size 1",
}
"""Jobs that open pictures in another process, with options for which it has work until near the end."""
STOPPED = [name if name in (*KILLED, "gallery") else pytest.param(name, marks=pytest.mark.nightly) for name in JOBS]


def check_what_stands(name: str, place: Path, finished: Path, result: dict[str, bytes]) -> None:
    """Whatever has its name is whole."""
    for path in strangers_of(name, place):
        if not any(part.startswith(".") for part in path.split("/")):
            assert path in files_of(finished)
            assert path not in result or (place / path).read_bytes() == result[path], path


def check_end(name: str, processes, inputs: Path, place: Path, result: dict[str, bytes]) -> None:
    """The next start ends as if nothing had happened, and removes what the others left."""
    code, lines = run_job(processes, name, inputs, place)
    assert code in (0, 3), lines[-5:]
    found = result_of(name, place)
    assert found.keys() == result.keys()
    assert [path for path in result if found[path] != result[path]] == []
    assert [path for path in files_of(place) if path.startswith(".") or "/." in path] == []


def ended_at_random(processes, name, inputs, place, signal_number, moment: float) -> tuple[int, list[str]]:
    """Exit code and lines of a job that gets a signal after some seconds."""
    child, errors = start_job(processes, name, inputs, place)
    child.join(moment)
    if child.is_alive():
        os.kill(child.pid, signal_number)
    lines = read_lines(errors)
    child.join()
    return child.exitcode, lines


def kill_again_and_again(name, times, processes, inputs, undisturbed, place) -> None:
    """Kill a job so many times. One that was done before begins anew, every second time beside the older result."""
    finished, result = undisturbed(name)
    prepare(name, inputs, place)
    moments = random.Random(f"{name} {times}")
    seconds, kills, ends = 1.0, 0, 0
    while kills < times:
        code, lines = ended_at_random(processes, name, inputs, place, signal.SIGKILL, moments.uniform(0, seconds))
        check_what_stands(name, place, finished, result)
        if code == -signal.SIGKILL:
            kills += 1
            seconds *= 1.2
            continue
        assert code in (0, 3), lines[-5:]
        seconds *= 0.7
        ends += 1
        if ends % 2:
            clear(place)
            prepare(name, inputs, place)
    check_end(name, processes, inputs, place, result)


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_random_moments(name, processes, inputs, undisturbed, tmp_path):
    kill_again_and_again(name, FEW, processes, inputs, undisturbed, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("name", JOBS)
def test_killed_at_many_random_moments(name, processes, inputs, undisturbed, tmp_path):
    kill_again_and_again(name, MANY, processes, inputs, undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPED)
def test_sigterm_ends_a_job_with_one_line(name, processes, inputs, undisturbed, tmp_path):
    finished, result = undisturbed(name)
    prepare(name, inputs, tmp_path)
    code, moment = None, 0.2
    while code != 143 and moment > 0.001:  # jobs are over so soon
        code, lines = ended_at_random(processes, name, inputs, tmp_path, signal.SIGTERM, moment)
        assert code in (143, 0, 3, -signal.SIGTERM), lines[-5:]  # the last one: it had not begun
        check_what_stands(name, tmp_path, finished, result)
        moment = moment / 2 if code in (0, 3) else moment * 1.3
    assert code == 143
    assert "Traceback" not in "\n".join(lines)
    assert sum(": stopped. " in line for line in lines) == 1, lines
    assert [path for path in files_of(tmp_path) if path.startswith(".") or "/." in path] == []
    check_end(name, processes, inputs, tmp_path, result)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_WORKER)
def test_a_killed_worker_is_named_in_one_line(name, processes, inputs, undisturbed, tmp_path):
    _, result = undisturbed(name)
    child, errors = start_job(processes, name, inputs, tmp_path, more=WITH_WORKER[name])
    workers: set[int] = set()
    while not workers:
        assert child.is_alive()
        before = set(workers_of(child.pid))
        time.sleep(0.02)  # by then another program that is about to start has begun
        workers = before & set(workers_of(child.pid))
    os.kill(min(workers), signal.SIGKILL)
    lines = read_lines(errors)
    child.join()
    said = [line for line in lines if line.startswith(("training/", "hub/"))]
    assert child.exitcode == 1
    assert "Traceback" not in "\n".join(lines)
    assert len(said) == 1, lines
    assert "A worker process" in said[0] and "use fewer --num_workers" in said[0]
    check_end(name, processes, inputs, tmp_path, result)
