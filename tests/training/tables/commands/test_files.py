"""Nothing that is written is ever half there, and what killed writers left is removed by the next one."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from training.tables.commands.files import (
    atomic_write,
    atomic_writes,
    scratch_folder,
    write_json,
    write_text,
)


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


def replace_folder(target: Path, content: str) -> None:
    with atomic_write(target) as place:
        place.mkdir()
        (place / "content").write_text(content)


def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path):
    replace_folder(tmp_path / "index", "0")
    writer = threading.Thread(target=lambda: [replace_folder(tmp_path / "index", str(n)) for n in range(1, 200)])
    writer.start()
    seen = set()
    while writer.is_alive():
        folder = os.open(tmp_path / "index", os.O_RDONLY)  # fails when it isn't there
        seen.update(os.listdir(folder))
        os.close(folder)
    assert seen - {"content"} == set()
    assert (tmp_path / "index" / "content").read_text() == "199"
    assert names(tmp_path) == ["index"]


def test_where_folders_cant_swap_names_one_is_moved_away_first(tmp_path, monkeypatch):
    monkeypatch.setattr("training.tables.commands.files.ctypes.CDLL", lambda name: None)
    for content in ("old", "new"):
        replace_folder(tmp_path / "index", content)
    assert (tmp_path / "index" / "content").read_text() == "new"
    assert names(tmp_path) == ["index"]


KILLED_IN_A_GROUP = """
import os, signal, sys
from training.tables.commands.files import atomic_writes
left = int(sys.argv[3])
def counted(call):
    def run(path, *others, **more):
        global left
        if "/old/" not in str(path) and str(others[0] if others else path) in sys.argv[1:3]:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return call(path, *others, **more)
    return run
os.unlink, os.replace = counted(os.unlink), counted(os.replace)
with atomic_writes(*sys.argv[1:3]) as places:
    for place in places:
        place.write_text("new")
"""


def test_files_that_belong_together_never_stand_beside_older_ones(tmp_path):
    """Killed before each step that removes an older one or puts a new one in place."""
    train, test = tmp_path / "train", tmp_path / "elsewhere" / "test"
    test.parent.mkdir()
    ends = []
    for steps in range(6):
        train.write_text("old"), test.write_text("old")
        command = [sys.executable, "-c", KILLED_IN_A_GROUP, str(train), str(test), str(steps)]
        ends.append(subprocess.run(command).returncode)
        contents = {path.read_text() for path in (train, test) if path.exists()}
        assert len(contents) <= 1, steps
    assert ends == [-signal.SIGKILL] * 4 + [0] * 2
    assert names(test.parent) == ["test"]


def test_of_files_that_belong_together_none_is_replaced_when_one_is_missing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_writes(tmp_path / "a", tmp_path / "b") as (first, _):
        first.write_text("new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_killed_process_scratch_folder_goes_with_the_next_write_there(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom training.tables.commands.files import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1]), 'mine') as folder:\n"
        "    (folder / 'spill').write_text('much')\n    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    with scratch_folder(tmp_path, "mine") as folder:
        assert folder.is_dir()
        assert not leftover.exists()
    assert names(tmp_path) == []


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
