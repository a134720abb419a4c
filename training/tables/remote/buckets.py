"""Addresses of other schemes than http: whatever file system fsspec knows for them (s3, gs, abfs, hf, memory, ...).

Keys and settings are those of the file system's own library: its environment variables and files, and fsspec's.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from training.tables.remote.places import RemoteError, shown
from training.tables.remote.web import PassingError


PIECE = 2**20
"""Bytes that are read at once."""


def pieces(address: str) -> Generator[bytes, None, None]:
    """The content of a file.

    Raises:
        PassingError: for a fault that may be over soon.
        RemoteError: where there is none, or a library is missing.
    """
    with _explained(address):
        system, path = _system(address)
        with system.open(path, "rb") as stream:
            while piece := stream.read(PIECE):
                yield piece


def version(address: str) -> str:
    """What is another text when a file's content is another.

    Raises:
        RemoteError: as of `pieces`.
    """
    with _explained(address):
        system, path = _system(address)
        return str(system.ukey(path))


def is_file(address: str) -> bool:
    """Whether there is a file at an address, and no folder.

    Raises:
        RemoteError: where a library is missing.
    """
    with _explained(address):
        system, path = _system(address)
        system.invalidate_cache()
        return system.isfile(path)


def names_below(folder: str, pattern: str | None = None) -> list[str]:
    """Files below a folder, relative to it, sorted: all, or those that a pattern finds.

    Raises:
        RemoteError: as of `pieces`.
    """
    with _explained(folder):
        system, path = _system(folder)
        start = f"{path.rstrip('/')}/"
        names = system.find(path) if pattern is None else system.glob(start + pattern)
        return sorted(name.removeprefix(start) for name in names)


def _system(address: str) -> tuple[Any, str]:
    return fsspec.url_to_fs(address)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns the errors of file systems, which are of every kind, into ours."""
    try:
        yield
    except RemoteError:
        raise
    except FileNotFoundError as error:
        raise RemoteError(f"{shown(address)}: there is no such file") from error
    except ImportError as error:  # it names the package
        raise RemoteError(f"{shown(address)}: {error}") from error
    except (PermissionError, ValueError) as error:
        raise RemoteError(f"{shown(address)} can't be read ({error})") from error
    except Exception as error:
        raise PassingError(f"{shown(address)} could not be fetched ({error!r:.300})") from error
