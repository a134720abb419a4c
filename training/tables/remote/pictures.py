"""Pictures of item tables that lie elsewhere: paths of files that come into being when somebody asks for them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_notellm2.images_notellm2 import image_sources
from modeling_notellm2.prompts_notellm2 import ItemError
from training.tables.remote.limits import PICTURE
from training.tables.remote.places import Allowed, RemoteError
from training.tables.remote.store import key_of, scratch, store_folder


MOST_NOTED = 100_000
"""Addresses that a process knows it can't fetch, before it forgets them and would try again."""


@dataclass(frozen=True)
class RemotePicture(os.PathLike[str]):
    """A picture elsewhere, as a path: asked for it, it is fetched, and its copy kept.

    Args:
        address: of the picture.
        allow_remote: what the user allowed (`training.tables.remote.places`); None: nothing, and nothing is asked.
    """

    address: str
    allow_remote: str | None = None

    def __fspath__(self) -> str:
        """Path of the copy.

        Raises:
            ItemError: when it isn't allowed or can't be fetched; the message says why.
        """
        if not (_is_allowed(self) and self.is_here):
            fetch_pictures([self])
            if self in _failed:
                raise ItemError(f"image {_failed[self]}")
        return str(self.place)

    def __str__(self) -> str:
        return self.address

    @property
    def place(self) -> Path:
        """Of the copy, whether it is there or not."""
        key = key_of(self.address)
        return store_folder() / "pictures" / key[:2] / key

    @property
    def is_here(self) -> bool:
        """Whether its copy is there."""
        try:
            return self.place.stat().st_size > 0  # a power cut may leave an empty one
        except OSError:
            return False


_failed: dict[RemotePicture, str] = {}
"""Why pictures can't be fetched, so that this process asks once."""


def fetch_pictures_of(items: Iterable[Mapping[str, Any]]) -> None:
    """Have the pictures of items that lie elsewhere fetched, many at once; those that can't be say so when they are opened."""
    fetch_pictures(
        source for item in items for source in image_sources(item.get("image")) if isinstance(source, RemotePicture)
    )


def fetch_pictures(pictures: Iterable[RemotePicture]) -> None:
    """Fetch those that are not here yet.

    Raises:
        OSError: when a copy can't be written.
    """
    if len(_failed) > MOST_NOTED:
        _failed.clear()
    by_option: dict[str | None, dict[str, RemotePicture]] = {}
    for picture in pictures:
        if picture not in _failed and _is_allowed(picture) and not picture.is_here:
            by_option.setdefault(picture.allow_remote, {})[picture.address] = picture
    for named, wanted in by_option.items():
        _fetch(list(wanted.values()), Allowed.of(named))


def _is_allowed(picture: RemotePicture) -> bool:
    try:
        Allowed.of(picture.allow_remote).check(picture.address)
    except RemoteError as error:
        _failed[picture] = str(error)
        return False
    return True


def _fetch(pictures: list[RemotePicture], allowed: Allowed) -> None:
    from training.tables.remote.fetching import Wanted, fetch_all  # with what speaks http

    with scratch() as folder:
        wanted = [Wanted(picture.address, folder / str(number)) for number, picture in enumerate(pictures)]
        fetched = fetch_all(wanted, allowed, PICTURE)
        for each, picture in zip(wanted, pictures, strict=True):
            reason = fetched[each.address].error or _fault(each.place)
            if reason is not None:
                _failed[picture] = f"{reason}" if isinstance(reason, RemoteError) else f"{picture.address} {reason}"
                continue
            picture.place.parent.mkdir(parents=True, exist_ok=True)
            each.place.replace(picture.place)


def _fault(place: Path) -> str | None:
    """Why what has arrived is no picture, and not kept: a page that says there is none, for instance."""
    try:
        with Image.open(place):
            return None
    except Exception as error:  # decoders raise errors of every kind
        return f"is no picture that can be read ({type(error).__name__})"
