"""What a user's word for a table stands for: a file, all files of a folder, a saved data set, or a data set of the Hub,
or, where `--allow_remote` says so, one that lies elsewhere.

Local tables never ask the network. What can't be found is said at once, and the Hub is asked only for what can be an id of
it and is no mistyped path.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import huggingface_hub

from training.tables.commands.files import write_json
from training.tables.commands.hashes import file_sha256
from training.tables.rejects import TableError
from training.tables.remote.places import RemoteError, RemoteFolder, is_address, is_web, shown, suffix_of


if TYPE_CHECKING:  # it brings pandas; in functions, so that commands that read no table start without both
    import datasets


SUFFIXES = (".parquet", ".jsonl", ".csv")
LANCE, LANCE_VERSIONS = ".lance", "_versions"
"""What the folder of a Lance table is called, and what is in it."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in files' names that stand for a split, as in `datasets`."""
SETTLED = 2.0
"""Seconds after which a change of a file is sure to change its times."""


@dataclass(frozen=True)
class TableFile:
    """One file of a table.

    Attributes:
        path: of the file, or of the copy of one that lies elsewhere.
        name: as messages call it: relative to the table's folder.
        folder: where relative paths of its pictures start.
    """

    path: Path
    name: str
    folder: Path | RemoteFolder


@dataclass(frozen=True)
class TableSplit:
    """One split of a data set, mapped by `datasets`."""

    dataset: "datasets.Dataset"
    name: str
    folder: Path = Path()


def cache_folder() -> Path:
    """Where copies of tables lie: in the cache of `datasets`."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "notellm2_tables"


def parts_of(
    source: str, split: str | None = None, allow_remote: str | None = None
) -> list[TableFile] | list[TableSplit]:
    """The files or splits of a table.

    Args:
        source: a .parquet, .jsonl or .csv file; a folder of such files, or an image folder with metadata files, in both of
            which everything below counts but what is hidden or begins with "_"; the address of either; a folder that
            `save_to_disk` wrote, or a Lance table; a data set of the Hub, ORG/DATA or ORG/DATA:CONFIG.
        split: of a data set, or of a folder by its files' names; None: all. A data set that has a single one gives that.
        allow_remote: hosts and places that are asked (`training.tables.remote.places`); None: none are.

    Raises:
        TableError: when there is no such table or split.
    """
    if is_address(source):
        return _remote_files(source, split, allow_remote)
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise TableError(f"{source}: a table is a {', '.join(SUFFIXES)} file, a folder, or a Hub data set id.")
        return [TableFile(path, path.name, path.parent)]
    if path.is_dir():
        if path.suffix.lower() == LANCE or (path / LANCE_VERSIONS).is_dir():
            return [TableFile(path, path.name, path.parent)]
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            import datasets

            return _splits(source, _loaded(source, lambda: datasets.load_from_disk(source)), split)
        files = _files_of(path)
        return files if split is None else _files_of_split(source, files, split)
    if _is_path(source):
        raise TableError(f"{source}: no such table.")
    return _hub_splits(source, split)


def noted_sha256(path: Path) -> str:
    """SHA-256 of a file's content, noted beside the copies for a file that nothing has touched since."""
    state = path.stat()
    identity = [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    note = (
        cache_folder() / "hashes" / f"{hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()}.json"
    )
    if note.is_file():
        noted = json.loads(note.read_text())
        if noted["identity"] == identity:
            return noted["sha256"]
    begun = time.time()
    digest = file_sha256(path)
    if (
        max(state.st_mtime, state.st_ctime) < begun - SETTLED
    ):  # else a change right now could leave the times as they are
        write_json({"identity": identity, "sha256": digest}, note)
    return digest


def _is_path(source: str) -> bool:
    """Whether a name that doesn't exist was meant as a path."""
    head = source.split("/")[0]
    return (
        Path(source).suffix.lower() in SUFFIXES
        or not HUB_ID.fullmatch(source)
        or head in (".", "..", "~")
        or ("/" in source and Path(head).exists())
    )


def _remote_files(source: str, split: str | None, allow_remote: str | None) -> list[TableFile]:
    from training.tables.remote.tables import remote_files  # with what speaks http

    if is_web(source) and suffix_of(source) not in SUFFIXES:
        raise TableError(f"{shown(source)}: the address of a table ends with {', '.join(SUFFIXES)}.")
    try:
        copies = remote_files(source, allow_remote, lambda names: _tables_of(filter(is_shown, names)))
    except RemoteError as error:
        raise TableError(f"{error}.") from error
    files = [
        TableFile(file.copy, file.name, file.folder.around(file.name) if _is_metadata(file.name) else file.folder)
        for file in copies
    ]
    return files if split is None or len(files) == 1 else _files_of_split(source, files, split)


def _files_of(folder: Path) -> list[TableFile]:
    """An image folder's metadata files, or else all tables."""
    names = _tables_of(_shown(folder))
    if not names:
        raise TableError(
            f"{folder}: no Parquet file and no metadata.csv, .jsonl or .parquet of an image folder in it, nor any other "
            f"{', '.join(SUFFIXES)} file."
        )
    return [TableFile(folder / name, name, (folder / name).parent if _is_metadata(name) else folder) for name in names]


def _tables_of(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that are the table: metadata files of pictures, or else all."""
    tables = list(names)
    return [name for name in tables if _is_metadata(name)] or tables


def _is_metadata(name: str) -> bool:
    return PurePosixPath(name).stem == "metadata"


def is_shown(name: str) -> bool:
    """Whether a file of a folder counts, by its name relative to that."""
    hidden = any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)
    return not hidden and PurePosixPath(name).suffix.lower() in SUFFIXES


def _shown(folder: Path) -> Iterator[str]:
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in sorted(names):
            path = Path(place) / name
            if is_shown(name) and path.is_file():
                yield path.relative_to(folder).as_posix()


def _files_of_split(source: str, files: list[TableFile], split: str) -> list[TableFile]:
    words = next((words for words in SPLITS.values() if split in words), (split,))
    named = re.compile(rf"(?:^|[-._ /0-9])(?:{'|'.join(map(re.escape, words))})(?:$|[-._ /0-9])")
    chosen = [file for file in files if named.search(file.name.lower())]
    if not chosen:
        names = ", ".join(file.name for file in files[:10])
        raise TableError(f"{source}: no split '{split}': no file's name has that word; there are {names}.")
    return chosen


def _hub_splits(source: str, split: str | None) -> list[TableSplit]:
    import datasets

    name, _, config = source.partition(":")
    _check_at_hub(source, name)

    def load() -> Any:
        wanted = split
        if wanted is not None and "[" not in wanted:
            names = datasets.get_dataset_split_names(name, config or None)
            wanted = names[0] if len(names) == 1 else wanted
        return datasets.load_dataset(name, config or None, split=wanted)

    return _splits(source, _loaded(source, load), split)


def _check_at_hub(source: str, name: str) -> None:
    """Asks once whether there is such a data set, for `datasets` asks again and again where nobody answers."""
    import datasets

    cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if huggingface_hub.constants.HF_HUB_OFFLINE or cached.exists():
        return
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except Exception as error:  # the HTTP client has errors of its own, which change with its library
        reason = " ".join(str(error).split())
        raise TableError(
            f"{source}: neither a file or folder nor a data set that can be loaded ({reason:.300})."
        ) from error


def _loaded(source: str, load: Callable[[], Any]) -> Any:
    import datasets

    try:
        return load()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise TableError(
            f"{source}: neither a file or folder nor a data set that can be loaded ({reason:.300})."
        ) from error


def _splits(source: str, loaded: Any, split: str | None) -> list[TableSplit]:
    if not isinstance(loaded, dict):
        return [TableSplit(loaded, split or str(loaded.split or "train"))]
    if split is not None and split not in loaded:
        raise TableError(f"{source}: no split '{split}'; there are {', '.join(loaded)}.")
    return [TableSplit(dataset, name) for name, dataset in loaded.items() if split in (None, name)]
