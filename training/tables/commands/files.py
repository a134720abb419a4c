"""Files and folders that are there as a whole or not at all: written beside their place, then renamed.

A folder takes an older one's place in one step: the two swap names. Where the system can't (only Linux can, NFS can't), the
older one is moved away first; after a kill in between, the next write into the same folder brings it back.

What a killed process leaves behind is a hidden folder `.NAME.XXXXXXXX.partial` beside the place. It holds a lock as long as
its process lives; the next write into the same folder removes those whose lock is free.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


PARTIAL = re.compile(r"\..+\.[a-z0-9_]{8}\.partial")
LOCK, NEW, OLD = "lock", "new", "old"
AT_WORKING_FOLDER, EXCHANGE = -100, 2
"""Linux' AT_FDCWD and RENAME_EXCHANGE."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a place to write a file or a folder to, which becomes `path` when the block ends well.

    The place has `path`'s name and does not exist yet. An older file or folder stays until the new one is on the disk;
    where the block fails it stays for good. A link is followed. Missing parent folders are made.

    Raises:
        FileNotFoundError: when the block ends well and has written nothing.
    """
    with atomic_writes(path) as (place,):
        yield place


@contextlib.contextmanager
def atomic_writes(*paths: str | Path) -> Iterator[list[Path]]:
    """Give places for files that belong together, which become `paths` when the block ends well.

    As `atomic_write` does for one of them. Before the first new file of several appears, all older ones are gone: a kill may
    leave some of the new ones, but never an older one beside them.

    Raises:
        FileNotFoundError: when the block ends well and has left one of them out.
    """
    targets = [Path(path).resolve() for path in paths]
    folders = sorted({target.parent for target in targets})
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
    with contextlib.ExitStack() as stack:
        partials = [stack.enter_context(_partial_folder(target)) for target in targets]
        places = [partial / NEW / target.name for partial, target in zip(partials, targets, strict=True)]
        yield places
        for place in places:
            _sync(place)
        if len(targets) > 1:
            for target in targets:
                target.unlink(missing_ok=True)
        for place, target, partial in zip(places, targets, partials, strict=True):
            _put(place, target, partial)
        for folder in folders:
            _sync_entry(folder)


def take_place(folder: Path, target: Path) -> None:
    """Let a finished folder take the place of an older one beside it, which goes, as `atomic_write` does."""
    with _partial_folder(target) as partial:
        _sync(folder)
        _put(folder, target, partial)
        _sync_entry(target.parent)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(place: Path, name: str) -> Iterator[Path]:
    """Give a folder in `place` for what is needed until the block ends; a killed process' one goes with the next write there.

    Args:
        name: is part of its name, for people.
    """
    place.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(place)
    with _partial_folder(place / name) as partial:
        yield partial / NEW


def write_text(text: str, path: str | Path) -> None:
    """Write a text as UTF-8, whole or not at all."""
    with atomic_write(path) as place:
        place.write_text(text, encoding="utf-8")


def write_json(content: Any, path: str | Path) -> None:
    """Write what JSON can hold, indented and in UTF-8, whole or not at all."""
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove those of some files of a folder that are there."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


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


def _put(place: Path, target: Path, partial: Path) -> None:
    """Move what was written to its place; an older folder goes into `partial`."""
    if place.is_dir() and target.is_dir():
        if _exchange(place, target):
            return
        target.rename(partial / OLD / target.name)
    place.replace(target)


def _exchange(folder: Path, other: Path) -> bool:
    """Let two folders of a file system swap names in one step; False where that can't be done."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # no Linux
        return False
    return rename(AT_WORKING_FOLDER, os.fsencode(folder), AT_WORKING_FOLDER, os.fsencode(other), EXCHANGE) == 0


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left; an old folder that was moved away for a new one that never came goes back."""
    for partial in (path for path in folder.glob(".*.partial") if PARTIAL.fullmatch(path.name)):
        # It stays where its process lives, has just removed it itself, or is another user's, as in /tmp.
        with contextlib.suppress(OSError), (partial / LOCK).open("r+") as lock:
            if os.fstat(lock.fileno()).st_uid != os.getuid():
                continue
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
