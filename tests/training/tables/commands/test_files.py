"""Nothing that is written is ever half there, and what killed writers left is removed by the next one."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from training.tables.commands.files import atomic_write, check_replaceable, write_json, write_text


KILLED = """
import os, signal, sys
from training.tables.commands.files import atomic_write
with atomic_write(sys.argv[1]) as place:
    place.write_text("half")
    print("writing", flush=True)
    sys.stdin.read() if sys.argv[2] == "wait" else os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_json_and_folders_appear_whole_and_alone(tmp_path):
    write_text("日本\n", tmp_path / "deep" / "a.txt")
    write_json({"name": "é"}, tmp_path / "b.json")
    with atomic_write(tmp_path / "model") as place:
        place.mkdir()
        (place / "weights").write_bytes(b"1")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "日本\n"
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == {"name": "é"}
    assert names(tmp_path) == ["b.json", "deep", "model"]
    assert names(tmp_path / "deep") == ["a.txt"]


def test_a_folder_takes_the_place_of_an_older_one_with_nothing_of_it_left(tmp_path):
    for content in ("old", "new"):
        with atomic_write(tmp_path / "model") as place:
            place.mkdir()
            (place / content).write_text(content)
    assert names(tmp_path / "model") == ["new"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_failed_write_leaves_the_older_content(tmp_path, folder):
    target = tmp_path / "result"
    with atomic_write(target) as place:
        place.mkdir() if folder else place.write_text("old")
    before = target.stat().st_ino
    with pytest.raises(RuntimeError), atomic_write(target) as place:
        place.mkdir() if folder else place.write_text("half")
        raise RuntimeError("disk full")
    with pytest.raises(FileNotFoundError), atomic_write(target):
        pass
    assert target.stat().st_ino == before
    assert names(tmp_path) == ["result"]


def test_files_have_the_usual_permissions_and_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real.txt")
    mask = os.umask(0o022)
    try:
        write_text("text", tmp_path / "link")
    finally:
        os.umask(mask)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real.txt").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path / "disk") == ["real.txt"]


def writer(target: Path, how: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_killed_writers_leftover_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path):
    assert writer(tmp_path / "killed.txt", "kill").wait(30) == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".killed.txt.")
    living = writer(tmp_path / "living.txt", "wait")
    write_text("text", tmp_path / "other.txt")
    (leftover,) = tmp_path.glob(".*.partial")
    assert leftover.name.startswith(".living.txt.")
    living.communicate("", timeout=30)
    assert names(tmp_path) == ["living.txt", "other.txt"]


def test_an_older_folder_that_was_moved_away_by_a_killed_writer_comes_back(tmp_path):
    partial = tmp_path / ".model.abcd1234.partial"
    (partial / "old" / "model").mkdir(parents=True)
    (partial / "lock").touch()
    (tmp_path / ".mine.partial").mkdir()  # not ours
    write_text("text", tmp_path / "other.txt")
    assert names(tmp_path) == [".mine.partial", "model", "other.txt"]


def test_many_writers_of_one_file_never_mix(tmp_path):
    texts = [str(number) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(text, tmp_path / "one.txt")) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "one.txt").read_text() in texts
    assert names(tmp_path) == ["one.txt"]


def test_only_a_commands_own_result_is_replaceable(tmp_path):
    check_replaceable(tmp_path / "nothing", "record.json")
    with pytest.raises(ValueError, match="no result of this command"):
        check_replaceable(tmp_path, "record.json")
    (tmp_path / "record.json").touch()
    check_replaceable(tmp_path, "record.json")
