"""A catalogue's job that is killed, shared or run by another engine ends with the same shards."""

import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from hub.catalogue.shards import REJECTS
from hub.encode import EncodeArguments, encode
from tests.support.catalogue import arguments, checksums, make_items, read_shards, write_items
from training.tables.commands.handler import FileError


def encode_in_child(job: EncodeArguments, renames: int | None) -> None:
    """The job, killed by itself right before a rename in its output, the only act that makes a file appear there."""
    done = 0
    rename = os.replace

    def counted(source, target):
        nonlocal done
        if Path(target).is_relative_to(job.output):  # and not the table's copy in the cache
            if done == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
        rename(source, target)

    os.replace = counted
    encode(job)


def check_what_a_kill_left(folder: Path, uninterrupted: dict[str, bytes]) -> int:
    """Each shard that is there is the whole one; returns their number."""
    there = list(folder.glob("shard-*.parquet"))
    for path in there:
        assert path.read_bytes() == uninterrupted[path.name]
    return len(there)


def run_child(
    processes, job: EncodeArguments, renames: int | None = None, kill_at: tuple[int, float] | None = None
) -> int:
    """Exit code of the job in a process of its own; it kills itself before this many renames, or is killed so many seconds
    after its folder has this many shards."""
    child = processes.Process(target=encode_in_child, args=(job, renames))
    child.start()
    if kill_at:
        shards, seconds = kill_at
        while child.is_alive() and len(list(Path(job.output).glob("shard-*.parquet"))) < shards:
            time.sleep(0.002)
        child.join(seconds)
        child.kill()
    child.join()
    return child.exitcode


@pytest.mark.slow
def test_killed_at_random_moments_and_started_again(processes, tiny_model_folder, tmp_path):
    """The shards come out as if nothing had happened."""
    items = make_items(240)
    items[100]["image"], items[200]["item_id"] = b"broken", "n0"
    table = write_items(items, tmp_path / "items.parquet")
    job = arguments(tiny_model_folder, table, tmp_path / "killed", num_workers=1)
    whole = replace(job, output=str(tmp_path / "whole"))
    assert run_child(processes, replace(whole, output=str(tmp_path / "warm"))) == 0
    start = time.monotonic()
    assert run_child(processes, whole) == 0
    seconds = time.monotonic() - start
    uninterrupted = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.parquet")}

    moments = random.Random(7)
    codes, progress = [], [0]
    for _ in range(7):
        kill_at = (progress[-1] + moments.randrange(4), moments.uniform(0, 0.1) * seconds)
        codes.append(run_child(processes, job, kill_at=kill_at))
        progress.append(check_what_a_kill_left(tmp_path / "killed", uninterrupted))
    assert codes.count(-signal.SIGKILL) >= 4
    assert progress == sorted(progress)
    assert any(0 < shards < 15 for shards in progress)

    assert run_child(processes, job) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").glob("*.parquet")} == uninterrupted
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.partial"))
    ids = read_shards(tmp_path / "killed").column("item_id").to_pylist()
    assert ids == [f"n{number}" for number in range(240) if number not in (100, 200)]


@pytest.mark.slow
def test_killed_right_before_each_rename(processes, messy_encoded, messy, tiny_model_folder, tmp_path):
    """The worst moments there are: what was written is whole, and not yet in its place."""
    uninterrupted = {path.name: path.read_bytes() for path in messy_encoded.glob("*.parquet")}
    job = arguments(tiny_model_folder, messy, tmp_path / "shards")
    progress = []
    for renames in (0, 1, 1, 1, 0, 1):  # manifest; a shard at each start; rejects.parquet; the complete manifest
        assert run_child(processes, job, renames) == -signal.SIGKILL
        assert list((tmp_path / "shards").glob(".*.partial"))
        progress.append(check_what_a_kill_left(tmp_path / "shards", uninterrupted))
    assert progress == [0, 0, 1, 2, 2, 3]
    assert run_child(processes, job, renames=1) == -signal.SIGKILL
    assert run_child(processes, job) == 0
    assert checksums(tmp_path / "shards") == checksums(messy_encoded)
    assert (tmp_path / "shards" / REJECTS).read_bytes() == uninterrupted[REJECTS]


def test_two_jobs_do_not_share_a_folder(processes, table, tiny_model_folder, tmp_path):
    job = arguments(tiny_model_folder, table, tmp_path / "shared", rows_per_block=4, batch_size=1)
    first = processes.Process(target=encode_in_child, args=(job, None))
    first.start()
    while not (tmp_path / "shared" / "shard-00000.parquet").exists():
        assert first.is_alive()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        with pytest.raises(FileError, match="another process is writing there"):
            encode(job)
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0


@pytest.fixture
def local_ray():
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_ray_gives_the_same_shards(local_ray, messy, messy_encoded, tiny_model_folder, tmp_path):
    """And goes on where the other engine was stopped: the engine is no part of what the job is."""
    shutil.copytree(messy_encoded, tmp_path / "ray")
    (tmp_path / "ray" / "shard-00001.parquet").unlink()
    (tmp_path / "ray" / "shard-00002.parquet").unlink()
    (tmp_path / "ray" / REJECTS).unlink()
    job = arguments(tiny_model_folder, messy, tmp_path / "ray", engine="ray", num_workers=1)
    encode(job)
    assert checksums(tmp_path / "ray") == checksums(messy_encoded)
    assert (tmp_path / "ray" / REJECTS).read_bytes() == (messy_encoded / REJECTS).read_bytes()
    with pytest.raises(ValueError, match="The actors need 4 CPUs and Ray has 2"):
        encode(replace(job, output=str(tmp_path / "too_much"), ray_actors=3))
