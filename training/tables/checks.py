"""Which rows of an item table hold what: column by column where that decides, row by row where it doesn't.

`item_from_row` is the rule for what an item has; this gives its answers for whole columns of Arrow at once.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from modeling_notellm2.rows_notellm2 import ITEM_FIELDS, item_from_row
from training.tables.reading import LoadedTable, arrow_blocks


TOPIC_CHARACTER = r"""[^\s,，\[\]"]"""
"""What topics in a CSV's one text have besides separators."""


def content_faults(
    table: LoadedTable, usable: np.ndarray, folder: Path
) -> Iterator[tuple[str, np.ndarray, pa.Array | None]]:
    """Rows among the usable ones (a mask) whose fields can't be used, by reason.

    Only rows that the columns leave in doubt are looked at one by one.
    """
    fields = [name for name in ITEM_FIELDS if name in table.rows.column_names]
    found: dict[str, array[int]] = defaultdict(lambda: array("q"))
    unreadable: list[str] = []
    name = Path(table.source).name
    with tqdm(desc=f"Checking {name}", total=len(table.rows), unit="item") as progress:
        for start, block in arrow_blocks(table.rows, fields):
            doubtful = np.flatnonzero(usable[start : start + len(block)] & ~_surely_usable(block))
            for offset, raw in zip(doubtful.tolist(), block.take(pa.array(doubtful)).to_pylist(), strict=True):
                try:
                    if len(item_from_row(raw, folder)) == 1:
                        found[f"none of {', '.join(ITEM_FIELDS)} is filled"].append(start + offset)
                except (ValueError, TypeError) as error:
                    found["unreadable topics"].append(start + offset)
                    unreadable.append(str(error))
            progress.update(len(block))
    for reason, rows in found.items():
        details = pa.array(unreadable, pa.string()) if reason == "unreadable topics" else None
        yield reason, np.frombuffer(rows, dtype=np.int64), details


def _surely_usable(block: pa.Table) -> np.ndarray:
    """(rows,) bool: some field is filled and none needs parsing. False only means that the row must be looked at."""
    filled = np.zeros(len(block), dtype=bool)
    parsed = np.zeros(len(block), dtype=bool)
    for name in block.column_names:
        column = block[name].combine_chunks()
        filled |= field_present(name, column)
        if name == "topics" and not _is_list(column.type):
            parsed = pc.fill_null(pc.match_substring(column.cast(pa.string()), "["), False).to_numpy(False)
    return filled & ~parsed


def field_present(name: str, column: pa.Array) -> np.ndarray:
    """(rows,) bool: which rows have a field, as `item_from_row` decides it."""
    if name != "topics":
        return _filled(column)
    if _is_list(column.type):
        return _filled(column.cast(pa.list_(pa.string())), of_texts=_not_blank)
    return pc.fill_null(pc.match_substring_regex(column.cast(pa.string()), TOPIC_CHARACTER), False).to_numpy(False)


def _not_blank(texts: pa.Array) -> pa.Array:
    return pc.greater(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0)


def _not_empty(texts: pa.Array) -> pa.Array:
    return pc.greater(pc.binary_length(texts), 0)


def _filled(values: pa.Array, of_texts: Callable[[pa.Array], pa.Array] = _not_empty) -> np.ndarray:
    """(n,) bool: texts and bytes that are not empty, numbers but 0, and lists and structs that hold such a one."""
    kind = values.type
    if _is_list(kind):
        result = np.zeros(len(values), dtype=bool)
        owners = pc.list_parent_indices(values).to_numpy(zero_copy_only=False)
        result[owners[_filled(values.flatten(), of_texts)]] = True
        return result
    if pa.types.is_struct(kind):
        return np.any([_filled(part, of_texts) for part in values.flatten()], axis=0)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        found = pc.not_equal(values, 0)
    elif pa.types.is_null(kind):
        return np.zeros(len(values), dtype=bool)
    else:
        found = of_texts(values)
    return pc.fill_null(found, False).to_numpy(zero_copy_only=False)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
