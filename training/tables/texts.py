"""What whole columns are as text, by the rule for one value in `modeling_notellm2.texts_notellm2`; blanks alone are empty."""

import math
import numbers
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling_notellm2.texts_notellm2 import CellError, is_missing, plain_text


BLANKS = "".join(chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace())
"""Every character that `str.strip` takes off; engines that trim ids in SQL must take off the same."""


Faults = dict[int, str]
"""Reason by row of a column."""


def texts_of(column: pa.Array, names: list[str] | None = None) -> tuple[pa.Array, Faults]:
    """A whole column by `plain_text`.

    Args:
        column: (n,) of any type.
        names: of the classes, where the column holds numbers of classes (`datasets.ClassLabel`).

    Returns:
        (n,) string, null where there is no text; and the rows whose value is none, with the reason.
    """
    if names is not None:
        return each_text(values_of(column), lambda value: class_name(value, names))
    column = unwrapped(column)
    kind = column.type
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.string()), {}
    if pa.types.is_integer(kind):
        return column.cast(pa.string()), {}
    if is_stringlike(kind):
        texts = _as_strings(column)
        if texts is not None:
            return _without_blank(texts), {}
    return each_text(_unboxed(column), plain_text)


def values_of(column: pa.Array) -> Iterator[Any]:
    """Python values of a column; bytes in place of a text that isn't UTF-8, Arrow's own in place of a time beyond Python's."""
    try:
        return iter(column.to_pylist())
    except UnicodeDecodeError:
        return iter(_binary_inside(column).to_pylist())
    except (OverflowError, ValueError, KeyError):  # years beyond 9999, time zones that nobody knows
        return map(_value_of, column)


def _value_of(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (OverflowError, ValueError, KeyError):
        return scalar


def is_stringlike(kind: pa.DataType) -> bool:
    """Text or binary of any width."""
    return kind in (
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
    ) or pa.types.is_fixed_size_binary(kind)


def each_text(values: Iterable[Any], text_of: Callable[[Any], str]) -> tuple[pa.Array, Faults]:
    """Texts of values one by one, null for what is empty or blank; and the rows whose value is none."""
    texts: list[str | None] = []
    faults: Faults = {}
    for row, value in enumerate(values):
        text = None
        try:
            text = text_of(value)
        except (CellError, RecursionError) as error:  # the latter for lists in lists in lists
            faults[row] = str(error)
        texts.append(text if text and not text.isspace() else None)
    return pa.array(texts, pa.string()), faults


def _unboxed(column: pa.Array) -> Iterator[Any]:
    """Values with narrow floats as they are written (0.1, where Python's float has 0.10000000149011612)."""
    if column.type in (pa.float16(), pa.float32()):
        valid = column.is_valid().to_pylist()
        numbers_there = column.to_numpy(zero_copy_only=False)
        return (value if there else None for value, there in zip(numbers_there, valid, strict=True))
    return values_of(column)


def unwrapped(column: pa.Array) -> pa.Array:
    """Without dictionary and extension types."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if isinstance(column.type, pa.BaseExtensionType) and is_stringlike(column.type.storage_type):
        is_uuid = column.type.extension_name == "arrow.uuid"
        return column if is_uuid else column.storage
    return column


def _as_strings(column: pa.Array) -> pa.Array | None:
    """A column of text or binary as string; None when some value isn't UTF-8."""
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    wide = column.type in (pa.large_string(), pa.large_binary())
    binary = column.cast(pa.large_binary() if wide else pa.binary())
    try:
        texts = binary.view(pa.large_string() if wide else pa.string())
        texts.validate(full=True)
        return texts.cast(pa.string())
    except pa.ArrowInvalid:
        return None


def _without_blank(texts: pa.Array) -> pa.Array:
    """Null in place of what is empty or blanks alone."""
    filled = pc.greater(pc.binary_length(pc.utf8_trim(texts, characters=BLANKS)), 0)
    return pc.if_else(pc.fill_null(filled, False), texts, pa.scalar(None, pa.string()))


def _binary_inside(column: pa.Array) -> pa.Array:
    """Strings as binary, inside lists and structs too."""
    return column.cast(_binary_type(column.type))


def _binary_type(kind: pa.DataType) -> pa.DataType:
    if kind in (pa.string(), pa.string_view()):
        return pa.binary()
    if kind == pa.large_string():
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_binary_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_binary_type(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_binary_type(kind.value_type))
    return kind


def class_name(value: Any, names: list[str]) -> str:
    """Name of a class by its number; "" for none.

    Raises:
        CellError: for what is not a number of a class.
    """
    if is_missing(value):
        return ""
    number = int(value) if isinstance(value, numbers.Integral) else len(names)
    if not -1 <= number < len(names):
        raise CellError(f"class {value} where there are {len(names)} classes")
    return names[number] if number >= 0 else ""  # -1: datasets' "no label"


def is_infinite(value: Any) -> bool:
    """Whether a number is one of the infinities."""
    return isinstance(value, (float, np.floating)) and math.isinf(value)
