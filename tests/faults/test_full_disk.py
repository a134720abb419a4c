"""A disk that runs full, a file that may not grow, a read-only folder, a file in its place: one line, nothing half-written,
and a second start with room enough goes on to the same result."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.jobs import JOBS, files_of, prepare, result_of, run_job, strangers_of


DISK = [pytest.param(name, marks=pytest.mark.nightly) if name == "publish_model" else name for name in JOBS]
"""publish_model takes long: it loads the model in another process."""
SMALL = 1_000
"""Bytes that a file may grow to: less than every job writes."""


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A file system in memory at `place`."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", place], capture_output=True)
    if done.returncode:
        pytest.skip(f"may not mount: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def check_failed(name: str, place: Path, code: int | None, lines: list[str], reason: str) -> None:
    """One line that says why, and nothing half-written."""
    assert code == 1, lines[-5:]
    assert "Traceback" not in "\n".join(lines)
    said = [line for line in lines if line.startswith(("training/", "hub/"))]
    assert len(said) == 1 and reason in said[0], lines[-5:]
    assert strangers_of(name, place) == []


def check_same(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """The same files with the same bytes."""
    assert found.keys() == wanted.keys()
    for path in wanted:
        assert found[path] == wanted[path], path


def limit_files(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize("name", DISK)
def test_a_disk_that_runs_full(name, processes, inputs, undisturbed, tmp_path):
    """There is room for half of what the job writes."""
    finished, result = undisturbed(name)
    sizes = [(finished / path).stat().st_size for path in files_of(finished) if not (finished / path).is_symlink()]
    needed = sum(-(-size // 4096) for size in sizes) * 4096
    with mounted(tmp_path, "size=64m"):
        prepare(name, inputs, tmp_path)
        disk = os.statvfs(tmp_path)
        (tmp_path / "filler").write_bytes(bytes(disk.f_bavail * disk.f_bsize - needed // 2))
        code, lines = run_job(processes, name, inputs, tmp_path)
        (tmp_path / "filler").unlink()
        check_failed(name, tmp_path, code, lines, "disk is full")
        code, lines = run_job(processes, name, inputs, tmp_path)
        assert code in (0, 3), lines[-5:]
        check_same(result_of(name, tmp_path), result)


@pytest.mark.parametrize("name", DISK)
def test_files_that_may_not_grow(name, processes, inputs, undisturbed, tmp_path):
    _, result = undisturbed(name)
    prepare(name, inputs, tmp_path)
    code, lines = run_job(processes, name, inputs, tmp_path, partial(limit_files, SMALL))
    check_failed(name, tmp_path, code, lines, "ulimit -f")
    code, lines = run_job(processes, name, inputs, tmp_path)
    assert code in (0, 3), lines[-5:]
    check_same(result_of(name, tmp_path), result)


@pytest.mark.parametrize("name", JOBS)
def test_a_read_only_folder(name, processes, inputs, undisturbed, tmp_path):
    undisturbed(name)  # which has warmed the caches
    with mounted(tmp_path, "size=4m"):
        prepare(name, inputs, tmp_path)
        before = files_of(tmp_path)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        code, lines = run_job(processes, name, inputs, tmp_path)
        check_failed(name, tmp_path, code, lines, "read-only")
        assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", [name for name in JOBS if name not in ("publish_model", "card", "report")])
def test_a_file_where_a_folder_should_be(name, processes, inputs, tmp_path):
    (tmp_path / "place").write_text("the user's own\n")
    code, lines = run_job(processes, name, inputs, tmp_path / "place")
    assert code == 1, lines[-5:]
    assert "Traceback" not in "\n".join(lines)
    assert str(tmp_path / "place") in lines[-1] and "file is where a folder should be" in lines[-1], lines[-3:]
    assert (tmp_path / "place").read_text() == "the user's own\n"


@pytest.fixture(autouse=True)
def room(tmp_path):
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
