"""What the stand-in for the Hub keeps: repositories whose commits are snapshots, and contents by their hashes on disk."""

import base64
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".jpg", ".faiss", ".index", ".npy", ".bin", ".arrow")
LFS_BYTES = 10 * 2**20
"""Files of these endings and all larger ones are large files, as the .gitattributes that the Hub writes say."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit.

    Attributes:
        oid: git's hash of the content, or of the pointer that stands for a large file.
        size: of the content, in bytes.
        sha256: of a large file's content; None for others.
    """

    oid: str
    size: int
    sha256: str | None = None

    @property
    def key(self) -> str:
        """Name of its content in the store, and its ETag."""
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files of a repository."""

    oid: str
    parent: str | None
    title: str
    files: dict[str, StoredFile]


@dataclass
class Repo:
    """A model, dataset or space: commits by hash, and full ref names with the commits they point to."""

    kind: str
    name: str
    private: bool = False
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, tag, full ref or hash."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        oid = next((self.refs[name] for name in names if name in self.refs), revision)
        return self.commits.get(oid)

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of a branch, newest first."""
        commits, commit = [], self.find(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.commits.get(commit.parent or "")
        return commits


class HubStore:
    """Repositories by kind ("model", "dataset", "space") and id, with their contents in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.repos: dict[tuple[str, str], Repo] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def create(self, kind: str, name: str, private: bool, sdk: str | None) -> Repo:
        """A repository with its first commit, which holds .gitattributes."""
        repo = self.repos[kind, name] = Repo(kind, name, private, sdk)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit(repo, "refs/heads/main", "initial commit", {".gitattributes": self.add(attributes.encode())})
        return repo

    def add(self, content: bytes) -> StoredFile:
        """Stores a regular file."""
        oid = git_hash(content)
        self.write(oid, content)
        return StoredFile(oid, len(content))

    def large(self, sha256: str) -> StoredFile:
        """A large file that was uploaded before."""
        size = self.path(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return StoredFile(git_hash(pointer.encode()), size, sha256)

    def path(self, key: str) -> Path:
        """Where a content lies."""
        return self.folder / key

    def write(self, key: str, content: bytes) -> None:
        """A content is there whole or not at all."""
        beside = self.folder / f"{key}.{os.urandom(4).hex()}"
        beside.write_bytes(content)
        os.replace(beside, self.path(key))

    def commit(self, repo: Repo, ref: str, title: str, files: dict[str, StoredFile]) -> Commit:
        """Puts a snapshot on top of a ref."""
        parent = repo.refs.get(ref)
        shown = json.dumps([parent, title, {path: file.key for path, file in files.items()}])
        oid = hashlib.sha1(f"{shown}{len(repo.commits)}".encode()).hexdigest()
        repo.commits[oid] = Commit(oid, parent, title, dict(sorted(files.items())))
        repo.refs[ref] = oid
        return repo.commits[oid]


def git_hash(content: bytes) -> str:
    """Git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def changed(store: HubStore, files: dict[str, StoredFile], operation: dict[str, Any]) -> dict[str, StoredFile]:
    """Files after one line of a commit's newline-delimited JSON.

    Raises:
        KeyError: for a file to delete that isn't there, or a large file that wasn't uploaded.
    """
    key, value = operation["key"], operation["value"]
    path = value["path"]
    if key == "file":
        return {**files, path: store.add(base64.b64decode(value["content"]))}
    if key == "lfsFile":
        if not store.path(value["oid"]).exists():
            raise KeyError(path)
        return {**files, path: store.large(value["oid"])}
    prefix = path.rstrip("/") + "/" if key == "deletedFolder" else path
    gone = {name for name in files if name == path or (key == "deletedFolder" and name.startswith(prefix))}
    if key not in ("deletedFile", "deletedFolder") or not gone:
        raise KeyError(path)
    return {name: file for name, file in files.items() if name not in gone}
