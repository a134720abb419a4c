"""What an id is: text, exactly as written, without the blanks around it. One rule for every table, log and tool.

`007`, `1e5`, `1.10`, `NA` and `null` stay what they are where they are text. Binary UTF-8 is text. Integers of any width
are their digits; whole floats are integers (pandas' `7.0` is `7`, `-0.0` is `0`), other floats as Python writes them
(`1.5`, `1e-05`). Decimals: whole ones are integers, others as written (`1.10`). Truth values are `true` and `false`, dates ISO
8601. Null, NaN, empty text and blanks alone are a missing id: `""`, or null in a column. No id at all, and a reason to
reject the row: infinities, whole floats beyond 2^53 (beyond 2^24 as float32), whose last digits are lost, lists and
structs, and what isn't valid Unicode.

A single value, and a column of Arrow (of any type: string_view, dictionary, binary, uint64, decimal, ...):

    id_of(7.0)                                     # "7"; raises CellError for what can't be an id
    ids, faults = ids_of(pa.array([7.0, None]))    # ids: string ["7", null]; faults: {row: reason}

Engines that read ids in SQL (mining) cast by the same rule: text trimmed of `training.tables.texts.BLANKS`, whole floats by
way of BIGINT, binary decoded, and they may pass what is left, distinct, through `ids_of`.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling_notellm2.texts_notellm2 import EXACT, CellError, plain_text
from training.tables.texts import BLANKS, Faults, is_infinite, texts_of


LOST_DIGITS = "a float too large to be exact, whose last digits are lost; write ids as integers or text"
EXACT_TO = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): EXACT}


def id_of(value: Any) -> str:
    """The id that a value is; "" for none.

    Raises:
        CellError: for what can't be an id.
    """
    if is_infinite(value):
        raise CellError("an infinite number")
    if isinstance(value, (float, np.floating)):
        exact = EXACT_TO[pa.from_numpy_dtype(value.dtype)] if isinstance(value, np.floating) else EXACT
        if abs(float(value)) > exact:
            raise CellError(LOST_DIGITS)
    return plain_text(value).strip()


def ids_of(column: pa.Array, names: list[str] | None = None) -> tuple[pa.Array, Faults]:
    """A column's ids.

    Args:
        column: (n,) of any type.
        names: of the classes, where the column holds numbers of classes (`datasets.ClassLabel`).

    Returns:
        (n,) string, null where an id is missing or can't be one; and the rows of the latter, with the reason.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        return _of_floats(column)
    texts, faults = texts_of(column, names)
    return pc.utf8_trim(texts, characters=BLANKS), faults


def _of_floats(column: pa.Array) -> tuple[pa.Array, Faults]:
    exact = EXACT_TO[column.type]
    numbers = pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy(zero_copy_only=False)
    lost = np.isinf(numbers) | (np.abs(numbers) > exact)
    faults = {
        row: "an infinite number" if np.isinf(numbers[row]) else LOST_DIGITS for row in np.flatnonzero(lost).tolist()
    }
    with np.errstate(invalid="ignore"):
        whole = ~lost & (np.floor(numbers) == numbers)
    if (whole | lost | np.isnan(numbers)).all():
        integers = np.where(whole, numbers, 0).astype(np.int64)
        return pa.array(integers, mask=~whole).cast(pa.string()), faults
    texts, _ = texts_of(column)
    return pc.if_else(pa.array(~lost), texts, pa.scalar(None, pa.string())), faults
