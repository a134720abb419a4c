"""Sends prepared files to the Hub in one commit; sent again after a break, only what is missing travels.

The large files go first (git LFS, or Xet where hf_xet is installed), by their hashes: what the Hub has already is not sent.
The commit that names them all comes last, so that a break leaves the repository as it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from rich.table import Table


@dataclass(frozen=True)
class Publication:
    """What is published.

    Attributes:
        kind: "model", "dataset" or "space".
        files: on this machine, by path in the repository.
        replaces: patterns of paths; what matches there and is not in `files` is deleted in the same commit. Weights of an
            earlier version would otherwise be loaded in place of the new ones.
        sdk: of a space.
    """

    kind: str
    files: dict[str, Path]
    replaces: tuple[str, ...] = ()
    sdk: str | None = None


@dataclass(frozen=True)
class Destination:
    """Where it goes.

    Attributes:
        repo: ORG/NAME; made if it isn't there.
        private: make it private. A public one that is there is not written to.
        revision: branch, made from main if it isn't there; None: main.
        create_pr: open a pull request in place of a commit to main.
        message: first line of the commit.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str = "Upload with NoteLLM-2's hub/publish.py"


class UploadError(OSError):
    """An upload broke; the message says how to go on."""


def push(publication: Publication, destination: Destination) -> CommitInfo:
    """Creates the repository or branch if need be, and commits all files at once.

    Raises:
        ValueError: for a repository that is public where a private one was asked for.
        UploadError: when the Hub refused something or the network broke; nothing was committed then.
    """
    api = HfApi()
    repo, kind = destination.repo, publication.kind
    try:
        api.create_repo(
            repo, repo_type=kind, private=destination.private or None, exist_ok=True, space_sdk=publication.sdk
        )
        if destination.private and not api.repo_info(repo, repo_type=kind).private:
            raise ValueError(f"{destination.repo} is public. Make it private in its settings, or leave out --private.")
        if destination.revision:
            api.create_branch(repo, repo_type=kind, branch=destination.revision, exist_ok=True)
        there = api.list_repo_files(repo, repo_type=kind, revision=destination.revision)
        stale = sorted(path for path in there if path not in publication.files and _matches(path, publication.replaces))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path, file.resolve()) for path, file in publication.files.items()),
            *(CommitOperationDelete(path) for path in stale),
        ]
        return api.create_commit(
            repo,
            operations,
            repo_type=kind,
            commit_message=destination.message,
            revision=destination.revision,
            create_pr=destination.create_pr,
        )
    except ValueError:
        raise
    except Exception as error:  # of the Hub's client, its HTTP library or the network: all end the same way
        cause = f"{error} {error.__cause__ or ''}".strip()
        raise UploadError(
            f"The upload to {destination.repo} broke: {cause}\nNothing was committed. Run the same command again; files that "
            f"arrived are not sent again."
        ) from error


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    """In the pattern's own folder alone: `*` stands for no `/`."""
    return any(path.count("/") == pattern.count("/") and fnmatch(path, pattern) for pattern in patterns)


def listing(publication: Publication, destination: Destination) -> Table:
    """All files with their sizes, for people."""
    table = Table(title=f"{publication.kind} {destination.repo}, branch {destination.revision or 'main'}")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    sizes = {path: file.stat().st_size for path, file in publication.files.items()}
    for path, size in sorted(sizes.items()):
        table.add_row(path, f"{size:,}")
    table.add_section()
    table.add_row(f"{len(sizes)} files", f"{sum(sizes.values()):,}")
    return table


def samples(publication: Publication, rows: int = 3) -> Iterator[Table]:
    """The first rows of each table that goes, so that somebody sees what others will; pictures as their name and size."""
    for path, file in sorted(publication.files.items()):
        if not path.endswith("-00000.parquet"):
            continue
        first = next(pq.ParquetFile(file).iter_batches(rows)).to_pylist()
        table = Table(title=f"{path}: the first {len(first)} rows", show_lines=True)
        for column in first[0]:
            table.add_column(column, overflow="fold")
        for row in first:
            table.add_row(*(_shown(value) for value in row.values()))
        yield table


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict) and "bytes" in value:
        return f"{value['path'] or 'picture'} ({len(value['bytes'] or b''):,} bytes)"
    text = "" if value is None else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
