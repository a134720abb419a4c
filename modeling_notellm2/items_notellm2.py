"""Any accepted form of an item as a dict, and its place in the words of an error."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
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


def as_batch(items: Any) -> list[Any]:
    """One item, or many in any order that holds, as a list.

    Raises:
        ItemError: for what is neither; a data frame would give its columns' names.
    """
    if isinstance(items, np.ndarray) and items.ndim != 1:
        return [items]
    if isinstance(items, (Mapping, str, Image.Image, os.PathLike)):
        return [items]
    if isinstance(items, (bytes, bytearray, set, frozenset)) or not isinstance(items, Iterable):
        raise ItemError(f"items are a {type(items).__name__}; expected one item or a list of items")
    if hasattr(items, "iterrows"):
        raise ItemError('items are a data frame; pass its rows: frame.to_dict("records")')
    return list(items)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts the item's place before an error about it."""
    try:
        yield
    except ItemError as error:
        raise ItemError(f"{where}: {error}") from error


__all__ = ["as_batch", "as_item", "naming"]
