"""Files and folders that are there as a whole or not at all: written beside their place, then renamed.

What a killed process leaves behind is a hidden folder `.NAME.XXXXXXXX.partial` beside the place. It holds a lock as long as
its process lives; the next write into the same folder removes those whose lock is free.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


PARTIAL = re.compile(r"\..+\.[a-z0-9_]{8}\.partial")
LOCK, NEW, OLD = "lock", "new", "old"


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a place to write a file or a folder to, which becomes `path` when the block ends well.

    The place has `path`'s name and does not exist yet. An older file or folder stays until the new one is on the disk;
    where the block fails it stays for good. A link is followed. Missing parent folders are made.

    Raises:
        FileNotFoundError: when the block ends well and has written nothing.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    with _partial_folder(path) as partial:
        place = partial / NEW / path.name
        yield place
        _sync(place)
        if place.is_dir() and path.is_dir():
            path.rename(partial / OLD / path.name)
        place.replace(path)
        _sync_entry(path.parent)


def write_text(text: str, path: str | Path) -> None:
    """Write a text as UTF-8, whole or not at all."""
    with atomic_write(path) as place:
        place.write_text(text, encoding="utf-8")


def write_json(content: Any, path: str | Path) -> None:
    """Write what JSON can hold, indented and in UTF-8, whole or not at all."""
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)


def check_replaceable(output: Path, record: str) -> None:
    """Let a folder be replaced only where a command's own result stands.

    Args:
        record: a file that every result of this command has.

    Raises:
        ValueError: when `output` is there and is something else.
    """
    if output.exists() and not (output / record).is_file():
        raise ValueError(f"{output} exists and is no result of this command; choose another --output.")


@contextlib.contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A locked folder beside `path`, with folders for the new and the old content; it goes at the end."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        with (partial / LOCK).open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: its leftovers stay
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (partial / LOCK).exists():  # taken for a leftover before it was locked
                continue
            try:
                (partial / NEW).mkdir()
                (partial / OLD).mkdir()
                yield partial
            finally:
                _remove(partial)
            return


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left; an old folder that was moved away for a new one that never came goes back."""
    for partial in (path for path in folder.glob(".*.partial") if PARTIAL.fullmatch(path.name)):
        # It stays where its process lives, has just removed it itself, or is another user's.
        with contextlib.suppress(OSError), (partial / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for old in (partial / OLD).glob("*"):
                if not (folder / old.name).exists():
                    old.rename(folder / old.name)
            _remove(partial)


def _remove(partial: Path) -> None:
    """Remove a partial folder; its lock goes last, so that a removal that is cut off is ended by the next write."""
    for content in (NEW, OLD):
        shutil.rmtree(partial / content, ignore_errors=True)
    shutil.rmtree(partial)


def _sync(place: Path) -> None:
    """Wait until a file, or everything in a folder, is on the disk: else a power cut leaves names without content."""
    for entry in (place, *place.rglob("*")):
        if not entry.is_symlink():
            _sync_entry(entry)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
