"""Where a command may write: never over its inputs, never over what this program didn't make, never two at once.

    with claimed([Output("--output", path)], [arguments.items, arguments.model]):
        ...

How a result of this program is known, from its content alone, so that it may be moved and renamed:

- a file has `MARK` in its first 4 KiB (JSON, HTML, Markdown, PNG) or as a key of its Parquet schema;
- a list of rejects is JSON lines whose first has a "reason"; an empty file has nothing to lose;
- a folder that is replaced as a whole has a record of ours, and no file of another kind than those that stand beside it.
"""

import contextlib
import fcntl
import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from training.tables.commands.handler import FileError, OptionError


MARK = "written by notellm2"
GENERATOR = {"generator": MARK}
"""First entry of the JSON objects that commands write."""
HEAD = 4096
"""Bytes of a file that are looked at."""
LOCK = ".lock"

MODEL_FILES = (
    *("*.safetensors", "*.json", "*.py", "*.jinja", "*.model", "*.tiktoken", "vocab.*", "merges.txt"),
    *("README.md", "assets/*.png", "__pycache__/*.pyc"),
)
CARD_MARKS = ("written by hub/card.py", "[More Information Needed]")
"""Of hub/card.py's cards, and of PEFT's own that nobody filled in."""


@dataclass(frozen=True)
class Output:
    """A place that an option names.

    Attributes:
        option: as it is typed.
        path: a file; or a folder.
        parts: files and folders that are written into this folder, beside others; none: `path` is replaced as a whole.
    """

    option: str
    path: Path
    parts: tuple[str, ...] = ()

    @property
    def replaced(self) -> list[Path]:
        """What is written anew."""
        return [self.path / part for part in self.parts] or [self.path]

    @property
    def lock(self) -> Path:
        """In a folder that stays, beside what is replaced."""
        path = self.path.resolve()
        return path / LOCK if self.parts else path.parent / f".{path.name}{LOCK}"


@contextlib.contextmanager
def claimed(outputs: Sequence[Output], inputs: Iterable[str | Path | None]) -> Iterator[None]:
    """Check a command's outputs and hold them until the block ends, or the process, however that ends.

    Args:
        inputs: files, folders, globs; Hub ids, URLs and None are passed over.

    Raises:
        OptionError: for an output that is an input or another output, or a folder around one; also through links.
        FileError: for an output that this program didn't make, or that another process is writing.
    """
    check_inputs(outputs, inputs)
    check_strangers(outputs)
    with contextlib.ExitStack() as stack:
        for output in outputs:
            stack.enter_context(locked(output.lock, output.path))
        check_strangers(outputs)  # once more: another process may have written there until now
        yield


def check_inputs(outputs: Sequence[Output], inputs: Iterable[str | Path | None]) -> None:
    """Let no output be an input or another output, or a folder around one.

    Raises:
        OptionError: naming the option.
    """
    places = [(output.option, place) for output in outputs for place in output.replaced]
    for (option, place), (other, second) in combinations(places, 2):
        if _holds(place, second) or _holds(second, place):
            raise OptionError(f"{option} and {other} would both write {second}; choose two places.")
    read = [path for source in inputs if source for path in _paths(str(source))]
    for option, place in places:
        for path in read:
            if _holds(place, path):
                raise OptionError(f"{option} would write over {path}, which is read; choose another {option}.")


def check_strangers(outputs: Sequence[Output]) -> None:
    """Let nothing be replaced that this program didn't make.

    Raises:
        FileError: naming the first such file.
    """
    for option, place in [(output.option, place) for output in outputs for place in output.replaced]:
        stranger = stranger_at(place)
        if stranger is not None:
            raise FileError(
                f"{stranger} was not made by this program and would be lost; move it away, or choose another {option}."
            )


def stranger_at(place: Path) -> Path | None:
    """The file at or below an output's place that this program didn't make, or None."""
    if not place.is_dir():
        return place if place.exists() and not _made_here(place) else None
    files = sorted(path for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
    if not files:
        return None
    kinds = _kinds_of(place)
    names = ((path, path.relative_to(place).as_posix()) for path in files)
    return next(
        (path for path, name in names if not any(fnmatch(name, kind) for kind in kinds) or _others_card(path)), None
    )


@contextlib.contextmanager
def locked(lock: Path, place: Path) -> Iterator[None]:
    """Hold a lock file, made with its folder and removed at the end. It is free as soon as its process is gone.

    Raises:
        FileError: when another process holds it.
    """
    made = not lock.parent.exists()
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _take(lock, place):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # there is something in it
                    lock.parent.rmdir()


@contextlib.contextmanager
def _take(lock: Path, place: Path) -> Iterator[None]:
    while True:
        with lock.open("a") as stream:
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone, not of its workers
            except (BlockingIOError, PermissionError) as error:
                raise FileError(f"{place}: another process is writing there; wait until it ends.") from error
            except OSError:  # a file system without locks
                pass
            if not _is_at(stream, lock):  # its holder has just removed it
                continue
            yield
            return


def _is_at(stream: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def marked(schema: pa.Schema) -> pa.Schema:
    """A Parquet file's schema that says who wrote it."""
    return schema.with_metadata({**(schema.metadata or {}), MARK.encode(): b""})


def _paths(source: str) -> list[Path]:
    """What of a source lies on this machine."""
    path = Path(source)
    return [path] if path.exists() else [Path(name) for name in glob.glob(source, recursive=True)]


def _holds(place: Path, path: Path) -> bool:
    """Whether `path` is `place` or lies below it."""
    real, inner = place.resolve(), path.resolve()
    if real == inner or real in inner.parents:
        return True
    return place.exists() and path.exists() and place.samefile(path)


def _made_here(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    if head.startswith(b"PAR1"):
        try:
            return MARK.encode() in (pq.read_schema(path).metadata or {})
        except pa.ArrowException:
            return False
    return not head or MARK.encode() in head or _is_rejects(path)


def _is_rejects(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline(1_000_000))
    except ValueError:
        return False
    return isinstance(first, dict) and "reason" in first


def _kinds_of(folder: Path) -> tuple[str, ...]:
    """Names of the files that a folder of ours may hold; none for another's."""
    if (folder / "index.json").is_file() and (folder / "index.faiss").is_file():
        return ("index.json", "index.faiss", "ids.arrow")
    if (folder / "semantic_ids.json").is_file():
        return ("semantic_ids.json", "codes.parquet", "codebooks.safetensors")
    if (folder / "_export.json").is_file():
        return ("_export.json", "_items.parquet", "_deletes.parquet", "vectors-*.parquet")
    if _is_model(folder):
        return MODEL_FILES
    return ()


def _is_model(folder: Path) -> bool:
    """A NoteLLM-2 model, or an adapter of one."""
    try:
        if (folder / "adapter_config.json").is_file():
            return "processor_config.json" in os.listdir(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("model_type", "")).startswith("notellm2")


def _others_card(path: Path) -> bool:
    if path.name != "README.md":
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return not any(mark in text for mark in CARD_MARKS)
