"""Any accepted form of an item as a dict, and its place in the words of an error."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from .prompts_notellm2 import ITEM_FIELDS, ItemError


def as_item(raw: Any) -> Mapping[str, Any]:
    """Any accepted form of an item as a dict: a string is its content, a PIL image or a path its picture.

    Raises:
        ItemError: for anything else, also a dict whose keys hold nothing of an item: it would be an empty one in silence.
    """
    if isinstance(raw, Mapping):
        if raw.keys() - {"item_id"} and raw.keys().isdisjoint(ITEM_FIELDS):
            raise ItemError(f"a dict of {', '.join(map(str, raw))} has none of {', '.join(sorted(ITEM_FIELDS))}")
        return raw
    if isinstance(raw, str):
        return {"content": raw}
    if isinstance(raw, (Image.Image, os.PathLike, np.ndarray)):
        return {"image": raw}
    raise ItemError(f"an item is a {type(raw).__name__}; expected a dict, a string, a PIL image or a path")


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts the item's place before an error about it."""
    try:
        yield
    except ItemError as error:
        raise ItemError(f"{where}: {error}") from error


__all__ = ["as_item", "naming"]
