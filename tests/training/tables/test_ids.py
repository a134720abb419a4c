"""An id and a text are the same for single values and for columns of every type of Arrow."""

import datetime
import decimal
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from modeling_notellm2.texts_notellm2 import CellError, plain_text
from training.tables.ids import id_of, ids_of
from training.tables.texts import BLANKS, texts_of


NO_ID = object()
NS = pa.timestamp("ns", "Asia/Shanghai")
BERLIN = datetime.timezone(datetime.timedelta(hours=1))
IDS = [
    (
        pa.string(),
        ["007", "1e5", "1.10", "NA", "null", " x\u3000", " ", None],
        ["007", "1e5", "1.10", "NA", "null", "x", "", ""],
    ),
    (pa.large_string(), ["a", None, "书"], ["a", "", "书"]),
    (pa.string_view(), ["a", None, "书"], ["a", "", "书"]),
    (pa.binary(), ["书".encode(), b"", b"\xff", None], ["书", "", NO_ID, ""]),
    (pa.large_binary(), [b"a", b"\xe9 1"], ["a", NO_ID]),
    (pa.binary_view(), [b"a", b"b"], ["a", "b"]),
    (pa.binary(2), [b"ab", b"\xff\xfe"], ["ab", NO_ID]),
    (pa.int8(), [-3, 0, None], ["-3", "0", ""]),
    (pa.uint64(), [2**64 - 1, None], [str(2**64 - 1), ""]),
    (pa.float64(), [7.0, 12345678901.0, -0.0, float("nan"), None], ["7", "12345678901", "0", "", ""]),
    (pa.float64(), [1.5, 1e-05, 1.1, 3.0], ["1.5", "1e-05", "1.1", "3"]),
    (pa.float64(), [1e300, float("inf"), -float("inf"), 2.0**53, 5.0], [NO_ID, NO_ID, NO_ID, str(2**53), "5"]),
    (pa.float64(), [1e300, 0.5], [NO_ID, "0.5"]),
    (pa.float32(), [7.0, 0.1, 2.0**25], ["7", "0.1", NO_ID]),
    (pa.float16(), [np.float16(0.5), np.float16(8)], ["0.5", "8"]),
    (pa.decimal128(20, 2), [decimal.Decimal("7.00"), decimal.Decimal("1.10")], ["7", "1.10"]),
    (pa.decimal256(60, 0), [decimal.Decimal(10) ** 50], [str(10**50)]),
    (pa.dictionary(pa.int32(), pa.string()), ["a", None, "b", "a"], ["a", "", "b", "a"]),
    (pa.dictionary(pa.int8(), pa.float64()), [7.0, None], ["7", ""]),
    (pa.bool_(), [True, False, None], ["true", "false", ""]),
    (pa.null(), [None, None], ["", ""]),
    (pa.list_(pa.string()), [["a"], None], [NO_ID, ""]),
    (pa.struct({"a": pa.int32()}), [{"a": 1}], [NO_ID]),
    (pa.date32(), [datetime.date(2024, 7, 1)], ["2024-07-01"]),
    (pa.uuid(), [uuid.UUID(int=5).bytes], [str(uuid.UUID(int=5))]),
]
TEXTS = [
    (pa.float64(), [7.0, 1.25, float("nan"), float("inf"), None], ["7", "1.25", "", "inf", ""]),
    (pa.timestamp("us"), [datetime.datetime(2024, 7, 1, 12, 30), None], ["2024-07-01 12:30:00", ""]),
    (NS, [pd.Timestamp("2024-07-01T12:00", tz="Asia/Shanghai")], ["2024-07-01 12:00:00+08:00"]),
    (pa.timestamp("ns"), [pd.Timestamp(1)], ["1970-01-01 00:00:00.000000001"]),
    (pa.duration("s"), [datetime.timedelta(days=1)], ["1 day, 0:00:00"]),
    (pa.time64("us"), [datetime.time(9, 5)], ["09:05:00"]),
    (pa.list_(pa.string()), [[], None], ["", ""]),
    (pa.string(), [" \n", " kept ", "\u2003"], ["", " kept ", ""]),
]


@pytest.mark.parametrize(
    ("kind", "values", "expected"), IDS, ids=lambda case: str(case) if isinstance(case, pa.DataType) else ""
)
def test_ids_of_every_type(kind, values, expected):
    column = pa.array(values, kind)
    ids, faults = ids_of(column)
    assert ids.type == pa.string()
    assert [
        fault_or(text) for text in zip(ids.to_pylist(), range(len(values)), [faults] * len(values), strict=True)
    ] == expected
    sliced, _ = ids_of(pa.concat_arrays([column, column])[len(column) :])
    assert sliced.to_pylist() == ids.to_pylist()
    for value, text in zip(values, expected, strict=True):
        if isinstance(kind, pa.BaseExtensionType):
            continue  # given as its storage
        single = np.float32(value) if kind == pa.float32() else value
        if text is NO_ID:
            with pytest.raises(CellError):
                id_of(single)
        else:
            assert id_of(single) == text


@pytest.mark.parametrize(
    ("kind", "values", "expected"), TEXTS, ids=lambda case: str(case) if isinstance(case, pa.DataType) else ""
)
def test_texts_of_every_type(kind, values, expected):
    texts, faults = texts_of(pa.array(values, kind))
    assert [text or "" for text in texts.to_pylist()] == expected
    assert not faults
    if kind != NS:  # a zone has several objects of Python
        assert [text if text.strip() else "" for text in map(plain_text, values)] == expected


def test_what_is_no_unicode_is_a_fault_and_never_replaced():
    broken = pa.array([b"ok", b"\xe9t\xe9", b"caf\xc3\xa9"]).view(pa.string())
    texts, faults = texts_of(broken)
    assert texts.to_pylist() == ["ok", None, "café"]
    assert faults == {1: "not UTF-8: byte 0xe9 at 0"}
    with pytest.raises(CellError, match="surrogate"):
        id_of("half\ud800")


def test_classes_are_their_names():
    texts, faults = texts_of(pa.array([0, 1, -1, None, 5]), ["cat", "dog"])
    assert (texts.to_pylist(), list(faults)) == (["cat", "dog", None, None, None], [4])


def test_blanks_are_what_python_strips():
    assert ids_of(pa.array([f"{blank}x y{blank}" for blank in BLANKS]))[0].to_pylist() == ["x y"] * len(BLANKS)
    assert ids_of(pa.array(["\u200bx\ufeff"]))[0].to_pylist() == ["\u200bx\ufeff"]


def fault_or(cell: tuple[str | None, int, dict[int, str]]):
    text, row, faults = cell
    assert text is None or row not in faults
    return NO_ID if row in faults else text or ""
