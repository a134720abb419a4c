"""Tables that lie elsewhere, as copies on this machine: a file; of schemes other than http also a folder of files."""

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from training.tables.commands.files import write_json
from training.tables.commands.hashes import file_xxh3
from training.tables.remote import buckets
from training.tables.remote.fetching import Fetched, Wanted, fetch_all
from training.tables.remote.limits import TABLE
from training.tables.remote.places import Allowed, RemoteError, RemoteFolder, is_web, name_of, shown, suffix_of
from training.tables.remote.store import key_of, scratch, store_folder


MAGIC = re.compile(r"[*?\[]")
NOTE = "current.json"
"""Beside the copy of a table: its name, and by what the host tells whether it is still the present one."""
DAY = 86_400


@dataclass(frozen=True)
class RemoteFile:
    """A file of a table: its copy, its name relative to the table's folder, and where paths of its pictures start."""

    copy: Path
    name: str
    folder: RemoteFolder


def remote_files(address: str, allow_remote: str | None, chosen: Callable[[list[str]], list[str]]) -> list[RemoteFile]:
    """The files of a table, as they are now.

    Args:
        address: of a file, or, but for http, of a folder or a pattern (`s3://bucket/items/*.parquet`).
        allow_remote: what the user allowed.
        chosen: which files of a folder count, by their names relative to it.

    Raises:
        RemoteError: when it isn't allowed, is not there, or can't be fetched.
    """
    allowed = Allowed.of(allow_remote)
    allowed.check(address)
    if is_web(address) or buckets.is_file(address):
        (copy,) = table_copies([address], allowed)
        parent = address.partition("?")[0].rpartition("/")[0] if is_web(address) else address.rpartition("/")[0]
        return [RemoteFile(copy, name_of(address), RemoteFolder(parent))]
    parts = address.rstrip("/").split("/")
    fixed = next((number for number, part in enumerate(parts) if MAGIC.search(part)), len(parts))
    folder, pattern = "/".join(parts[:fixed]), "/".join(parts[fixed:]) or None
    names = chosen(buckets.names_below(folder, pattern))
    if not names:
        raise RemoteError(f"{shown(address)}: no such table")
    copies = table_copies([f"{folder}/{name}" for name in names], allowed)
    place = RemoteFolder(folder)
    return [RemoteFile(copy, name, place) for copy, name in zip(copies, names, strict=True)]


def table_copies(addresses: list[str], allowed: Allowed) -> list[Path]:
    """Files with the present content of tables; each is asked whether it has changed, and copied where it has.

    A copy is named by its content, so that who reads an older one goes on with it.

    Raises:
        RemoteError: for the first that can't be fetched.
    """
    with scratch() as folder, tqdm(desc="Fetching tables", total=len(addresses), unit="file") as progress:
        notes = {address: _note(address) for address in addresses}
        wanted = []
        for number, address in enumerate(addresses):
            allowed.check(address)
            if not is_web(address):
                present = buckets.version(address)
                if notes[address].get("version") == present:
                    progress.update()
                    continue
                notes[address] = {"version": present}
            wanted.append(Wanted(address, folder / str(number), _conditions(notes[address])))
        fetched = fetch_all(wanted, allowed, TABLE, progress.update)
        for each in wanted:
            result = fetched[each.address]
            if result.error is not None:
                raise result.error
            if result.changed:
                notes[each.address] = _kept(each, result, notes[each.address])
    return [_folder_of(address) / notes[address]["file"] for address in addresses]


def _note(address: str) -> dict[str, str]:
    """What is known of the copy of an address; nothing where there is none."""
    with suppress(OSError, ValueError):
        note: dict[str, str] = json.loads((_folder_of(address) / NOTE).read_text(encoding="utf-8"))
        if (_folder_of(address) / note["file"]).is_file():
            return note
    return {}


def _conditions(note: dict[str, str]) -> dict[str, str]:
    headers = {"etag": "If-None-Match", "last-modified": "If-Modified-Since"}
    return {headers[name]: note[name] for name in headers if name in note}


def _kept(wanted: Wanted, fetched: Fetched, note: dict[str, str]) -> dict[str, str]:
    """Put a table that has arrived into its place; older ones go after a day, when nobody opens them any more."""
    folder = _folder_of(wanted.address)
    folder.mkdir(parents=True, exist_ok=True)
    name = file_xxh3(wanted.place) + suffix_of(wanted.address)
    wanted.place.replace(folder / name)
    told = {**note, **fetched.headers}
    made = {"address": shown(wanted.address), "file": name}
    made |= {key: told[key] for key in ("etag", "last-modified", "version") if key in told}
    write_json(made, folder / NOTE)
    for other in folder.iterdir():
        if other.name not in (name, NOTE) and other.is_file():
            with suppress(OSError):  # another process was quicker
                if other.stat().st_mtime < time.time() - DAY:
                    other.unlink()
    return made


def _folder_of(address: str) -> Path:
    return store_folder() / "tables" / key_of(address)
