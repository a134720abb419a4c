"""Copies of what was fetched, kept on disk under their addresses. It may be removed at any time, and is then fetched again."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from training.tables.commands.files import scratch_folder


def store_folder() -> Path:
    """Where copies lie: in the cache of `datasets`, beside those of local tables."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "notellm2_remote"


def key_of(address: str) -> str:
    """A file's name that only this address has."""
    return blake2b(address.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the store's disk for what is being fetched; a killed process' one goes with the next."""
    with scratch_folder(store_folder() / "arriving", "fetch") as folder:
        yield folder
