"""What a value is as text: one rule for an item's fields, and for the cells of every kind of table.

Binary UTF-8 is text. None and NaN are empty. Whole floats are integers, truth values are `true` and `false`, dates and times
are written as ISO 8601 with a blank. Lists and structs are no text, and neither is what isn't valid Unicode: nothing is ever
replaced.
"""

import datetime
import numbers
import uuid
from decimal import Decimal
from typing import Any

import numpy as np


EXACT = 2**53
"""Integers beyond it are not all there as float64: a whole float up to here is an integer, one beyond has lost digits."""


class CellError(ValueError):
    """A value that can't be what its field or column is; the message says why."""


def plain_text(value: Any) -> str:
    """The text of one value, blanks around it included; "" for what is missing.

    Raises:
        CellError: for a list or struct that holds something, and for what isn't valid Unicode.
    """
    if isinstance(value, str):
        return _valid(value)
    if is_missing(value):
        return ""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decoded(bytes(value))
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, numbers.Integral):
        return _integer_text(int(value))
    if isinstance(value, (float, np.floating)):
        return _float_text(value)
    if isinstance(value, Decimal):
        return str(int(value)) if value == value.to_integral_value() else f"{value:f}"
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, np.datetime64, uuid.UUID)):
        return str(value)
    if hasattr(value, "as_py"):  # Arrow's own scalar, which tables leave where Python has no such time
        raise CellError("a date or time that can't be read")
    if hasattr(value, "__len__") and not len(value):
        return ""
    raise CellError(f"a {_kind(value)} where a text is expected")


def is_missing(value: Any) -> bool:
    """None, NaN and pandas' NaT and NA."""
    if value is None:
        return True
    if isinstance(value, (str, bytes, list, tuple, dict, np.ndarray)):
        return False
    different = value != value
    return different is True or different is np.True_ or type(value).__name__ == "NAType"


def _integer_text(number: int) -> str:
    try:
        return str(number)
    except ValueError as error:  # Python writes no longer ones
        raise CellError("an integer of thousands of digits") from error


def _float_text(value: Any) -> str:
    number = float(value)
    if number.is_integer() and abs(number) <= EXACT:
        return str(int(number))
    return repr(number) if isinstance(value, float) else str(value)  # numpy writes float32 as short as it can


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CellError(f"not valid Unicode: half of a surrogate pair at character {error.start}") from error
    return text


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CellError(f"not UTF-8: byte 0x{content[error.start]:02x} at {error.start}") from error


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "struct"
    return "list" if isinstance(value, (list, tuple, np.ndarray)) else type(value).__name__
