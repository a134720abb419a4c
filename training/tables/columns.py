"""From the cells of any table to an item's fields: ids and texts as text, topics as a list, pictures as bytes or a path.

The rules for one cell are functions (`topics_of`, `pictures_of`, and those of `ids` and `texts`); whole columns of Arrow go
the fast way where their type allows it and else cell by cell through the same functions. A cell that can't be what its
column is costs its row: the row has a fault, the reason.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling_notellm2.texts_notellm2 import CellError, is_missing, plain_text
from training.tables.ids import id_of, ids_of
from training.tables.remote.pictures import RemotePicture
from training.tables.remote.places import RemoteFolder, is_address
from training.tables.texts import (
    BLANKS,
    Faults,
    class_name,
    each_text,
    is_stringlike,
    texts_of,
    unwrapped,
    values_of,
)


ITEM_FIELDS = ("title", "topics", "content", "image")
FILE_COLUMNS = ("file_name", "file_names", "image_file_name", "image_file_names")
"""How an image folder's metadata names the picture."""
PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
ID_TYPE, TEXT_TYPE, TOPICS_TYPE, IMAGE_TYPE = pa.large_string(), pa.string(), pa.list_(pa.string()), pa.list_(PICTURE)

Classes = dict[str, list[str]]
"""Names of the classes by column, for columns of `datasets.ClassLabel`, alone or in lists."""


@dataclass(frozen=True)
class Form:
    """What a column of some name holds.

    Attributes:
        type: of Arrow, as the table's copy has it.
        of_value: a cell's value in that type.
        of_column: a whole column, and its faults.
    """

    type: pa.DataType
    of_value: Callable[[Any], Any]
    of_column: Callable[[pa.Array, list[str] | None], tuple[pa.Array, Faults]]


def form_of(name: str) -> Form | None:
    """The form of a column of an item or pair table; None for one that is the user's own."""
    if name in ("item_id", "query_id", "target_id") or re.fullmatch(r"negative_\d+", name):
        return Form(ID_TYPE, id_of, ids_of)
    if name in ("title", "content"):
        return Form(TEXT_TYPE, plain_text, texts_of)
    if name == "topics":
        return Form(TOPICS_TYPE, topics_of, topics_column)
    if name == "image" or name in FILE_COLUMNS:
        return Form(IMAGE_TYPE, pictures_of, image_column)
    return None


def topics_of(value: Any) -> list[str]:
    """Topics without blanks around them, empty ones left out. A text is a JSON list or words with commas between them.

    Raises:
        CellError: for what is neither a text nor a list of texts.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = plain_text(value)
    if isinstance(value, str):
        value = _split(plain_text(value).strip())
    if is_missing(value):
        return []
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise CellError(f"topics must be text or a list of texts, not {value!r:.80}")
    return [text for text in (plain_text(topic).strip() for topic in value) if text]


def pictures_of(value: Any, deepest: int = 16) -> list[dict[str, Any]]:
    """The pictures of a cell, each with its `bytes` or its `path`: a path, bytes, `{"bytes", "path"}`, or a list of such.

    Args:
        deepest: how many lists may stand in each other; how deep Python itself goes differs from version to version.

    Raises:
        CellError: for what is no picture.
    """
    if isinstance(value, (list, tuple)):
        if not deepest:
            raise CellError("image has too many lists in lists (recursion)")
        return [picture for part in value for picture in pictures_of(part, deepest - 1)]
    if is_missing(value):
        return []
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [{"bytes": bytes(value), "path": None}] if len(value) else []
    if isinstance(value, (str, os.PathLike)):
        path = plain_text(os.fspath(value))
        return [{"bytes": None, "path": path}] if path.strip() else []
    if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
        content, path = value.get("bytes"), plain_text(value.get("path"))
        if content is not None and not isinstance(content, (bytes, bytearray, memoryview)):
            raise CellError(f"image has bytes that are a {type(content).__name__}")
        return [{"bytes": bytes(content) if content else None, "path": path or None}] if content or path else []
    raise CellError(f"image must be a path, bytes, a dict of bytes and path, or a list of them, not {value!r:.80}")


def other_of(value: Any) -> str:
    """The text of a cell of the user's own columns; lists and objects as JSON."""
    if isinstance(value, (list, tuple, dict)):
        return plain_text(json.dumps(value, ensure_ascii=False, default=str))
    return plain_text(value)


def item_of(raw: Mapping[str, Any], folder: Path, allow_remote: str | None = None) -> dict[str, Any]:
    """A single item by the rules of tables, for instance one that came as JSON.

    Args:
        raw: `item_id` and fields of an item; empty ones may be missing, others are ignored.
        folder, allow_remote: as of `item_from_values`.

    Raises:
        CellError: naming the field that can't be what it is.
    """
    cells = dict(raw)
    if not pictures_of(cells.get("image")):
        cells["image"] = next((cells[name] for name in FILE_COLUMNS if cells.get(name)), None)
    values: dict[str, Any] = {}
    for name in ("item_id", *ITEM_FIELDS):
        form = form_of(name)
        assert form is not None
        try:
            values[name] = form.of_value(cells.get(name))
        except CellError as error:
            raise CellError(reason_of(name, error)) from error
    return item_from_values(values, folder, allow_remote)


def item_from_values(
    values: Mapping[str, Any], folder: Path | RemoteFolder, allow_remote: str | None = None
) -> dict[str, Any]:
    """An item as the processor takes it, from cells in their forms: empty fields left out, one picture or a list of them.

    Args:
        folder: where relative paths of pictures start.
        allow_remote: what may be asked for pictures that lie elsewhere.
    """
    item: dict[str, Any] = {"item_id": values.get("item_id") or ""}
    for name in ("title", "content"):
        text = values.get(name)
        if text and not text.isspace():
            item[name] = text
    if values.get("topics"):
        item["topics"] = values["topics"]
    pictures = [
        picture["bytes"] or _picture_at(picture["path"], folder, allow_remote) for picture in values.get("image") or ()
    ]
    if pictures:
        item["image"] = pictures[0] if len(pictures) == 1 else pictures
    return item


def reason_of(name: str, fault: object) -> str:
    """A cell's fault as the reason of its row."""
    if name == "topics":
        return f"unreadable topics: {fault}"
    return str(fault) if str(fault).startswith(name) else f"{name} is {fault}"


def _picture_at(path: str, folder: Path | RemoteFolder, allow_remote: str | None) -> str | RemotePicture:
    """Where a picture lies."""
    place = path if is_address(path) else str(folder / path)
    return RemotePicture(place, allow_remote) if is_address(place) else place


def topics_column(column: pa.Array, names: list[str] | None = None) -> tuple[pa.Array, Faults]:
    """A whole column by `topics_of`; null where there are none."""
    column = unwrapped(column)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), TOPICS_TYPE), {}
    inner = _as_list(column)
    if inner is None or inner.type.value_type == pa.null():
        return each(values_of(column), topics_of, TOPICS_TYPE)
    owners, flat = _flat(inner)
    texts, broken = texts_of(flat, names)
    texts = pc.utf8_trim(texts, characters=BLANKS)
    faults = {int(owners[row]): reason for row, reason in reversed(broken.items())}
    return _grouped(owners, texts, len(column)), faults


def image_column(column: pa.Array, names: list[str] | None = None) -> tuple[pa.Array, Faults]:
    """A whole column by `pictures_of`; null where there are none."""
    column = unwrapped(column)
    inner = _as_list(column)
    if inner is not None and inner.type.value_type != pa.null():
        owners, flat = _flat(inner)
    else:
        owners, flat = np.arange(len(column)), column
    pictures = _pictures(unwrapped(flat))
    if pictures is None:
        return each(values_of(column), pictures_of, IMAGE_TYPE)
    return _grouped(owners, pictures, len(column)), {}


def each(values: Iterable[Any], of_value: Callable[[Any], list[Any]], kind: pa.DataType) -> tuple[pa.Array, Faults]:
    """Lists of values one by one, null for an empty one; and the rows whose value is none."""
    lists: list[list[Any] | None] = []
    faults: Faults = {}
    for row, value in enumerate(values):
        lists.append(None)
        try:
            lists[-1] = of_value(value) or None
        except (CellError, RecursionError) as error:  # the latter for lists in lists in lists
            faults[row] = str(error)
    return pa.array(lists, kind), faults


def cells_column(name: str, cells: Sequence[Any]) -> tuple[pa.Array, Faults]:
    """A column from Python values of mixed types, in the form of its name; the user's own as text."""
    form = form_of(name)
    if form is None:
        return each_text(cells, other_of)
    if pa.types.is_list(form.type):
        return each(cells, form.of_value, form.type)
    column, faults = each_text(cells, form.of_value)
    return column.cast(form.type), faults


def arrow_column(
    name: str, column: pa.Array, kind: pa.DataType | None, names: list[str] | None
) -> tuple[pa.Array, Faults]:
    """A column of Arrow in the form of its name; the user's own in the type `kind`, None for text."""
    form = form_of(name)
    if form is not None:
        result, faults = form.of_column(column, names)
        return result.cast(form.type), faults
    if kind is None or names is not None:
        column = unwrapped(column)
        if pa.types.is_nested(column.type) and names is None:
            return each_text(values_of(column), other_of)
        return texts_of(column, names)
    column = unwrapped(column).cast(kind)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        texts, faults = texts_of(column) if is_stringlike(kind) else each_text(values_of(column), other_of)
        broken = np.isin(np.arange(len(column)), list(faults))
        return (texts if kind == pa.string() else pc.if_else(pa.array(broken), pa.scalar(None, kind), column)), faults
    return column, {}


def own_type(kind: pa.DataType) -> pa.DataType:
    """In which type the copy holds a column of the user's own."""
    if pa.types.is_dictionary(kind):
        return own_type(kind.value_type)
    if kind in (pa.large_string(), pa.string_view()):
        return pa.string()
    if isinstance(kind, pa.BaseExtensionType):
        return pa.string() if is_stringlike(kind.storage_type) else kind.storage_type
    return pa.binary() if kind in (pa.large_binary(), pa.binary_view()) else kind


def _split(text: str) -> Any:
    """The list that a text holds."""
    if not text.startswith("["):
        return text.replace("，", ",").split(",")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CellError(f"neither a JSON list nor words with commas ({error})") from error


def _as_list(column: pa.Array) -> pa.Array | None:
    """A column of lists of any kind as one of plain lists; None for another column."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return column
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return column.cast(pa.large_list(kind.value_type))
    return None


def _flat(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Row of each value in a column of lists, and the values."""
    return pc.list_parent_indices(lists).to_numpy(zero_copy_only=False), pc.list_flatten(lists)


def _grouped(owners: np.ndarray, values: pa.Array, rows: int) -> pa.Array:
    """Lists of the values that are not null, by the row that owns them; null for a row without."""
    there = values.is_valid().to_numpy(zero_copy_only=False)
    counts = np.bincount(owners[there], minlength=rows)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), values if there.all() else values.filter(pa.array(there)), mask=pa.array(counts == 0)
    )


def _pictures(column: pa.Array) -> pa.Array | None:
    """(n,) `PICTURE`, null for none; None when some value can't be told to be one without looking at it."""
    kind = column.type
    nothing = pa.nulls(len(column))
    content, path = nothing.cast(pa.binary()), nothing.cast(pa.string())
    if pa.types.is_null(kind):
        return pa.nulls(len(column), PICTURE)
    if is_stringlike(kind):
        if kind in (pa.string(), pa.large_string(), pa.string_view()):
            path, faults = texts_of(column)
        else:
            content, faults = column.cast(pa.binary()), {}
    elif pa.types.is_struct(kind) and {field.name for field in kind} & {"bytes", "path"}:
        columns = dict(zip((field.name for field in kind), column.flatten(), strict=True))
        content = columns.get("bytes", content)
        if not (is_stringlike(content.type) or pa.types.is_null(content.type)):
            return None
        content = content.cast(pa.binary())
        path, faults = texts_of(columns.get("path", path))
    else:
        return None
    if faults:
        return None
    has_content = pc.fill_null(pc.greater(pc.binary_length(content), 0), False)
    content = pc.if_else(has_content, content, pa.scalar(None, pa.binary()))
    there = pc.or_(has_content, path.is_valid())
    return pa.StructArray.from_arrays([content, path], fields=list(PICTURE), mask=pc.invert(there))


__all__ = [
    "ITEM_FIELDS",
    "CellError",
    "Form",
    "class_name",
    "form_of",
    "item_from_values",
    "item_of",
    "own_type",
    "pictures_of",
    "topics_of",
]
