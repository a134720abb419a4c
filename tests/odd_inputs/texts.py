"""Odd texts, topics, ids and items."""

import dataclasses
import datetime
import decimal
from types import MappingProxyType

import numpy as np
import pandas as pd
from PIL import Image

from tests.odd_inputs.case import NOT_A_TABLE, OddInput, sample


EMPTY = {"title": ""}
NOTHING = "neither text nor image"
"""Why a table leaves out a row that the processor embeds as an empty item."""


@dataclasses.dataclass
class Note:
    title: str = "x"


def title(value, text, in_tables=None) -> OddInput:
    """A title of some value reads as a text, in tables too."""
    name = f"title {type(value).__name__} {value!r:.30}"
    return OddInput(name, {"title": value}, {"title": text}, *([] if in_tables is None else [in_tables]))


TITLES = [
    title(None, "", NOTHING),
    title(float("nan"), "", NOTHING),
    title(np.float32("nan"), "", NOT_A_TABLE),
    title(pd.NA, "", NOT_A_TABLE),
    title(pd.NaT, "", NOT_A_TABLE),
    title(2012, "2012"),
    title(2012.0, "2012"),
    title(-0.0, "0"),
    title(1.5, "1.5"),
    title(True, "true"),
    title(np.int64(3), "3", NOT_A_TABLE),
    title(np.float64(3.5), "3.5", NOT_A_TABLE),
    title(np.str_("x"), "x", NOT_A_TABLE),
    title(decimal.Decimal("1.50"), "1.50", NOT_A_TABLE),
    title(datetime.date(2024, 7, 1), "2024-07-01", NOT_A_TABLE),
    title("书".encode(), "书", NOT_A_TABLE),
    title(bytearray(b"x"), "x", NOT_A_TABLE),
    title("", "", NOTHING),
    title(" \t\n ", "", NOTHING),
    title("a\0b", "ab"),
    title("a\r\nb", "a b"),
    title("a\rb", "a b"),
    title("a\nb", "a b"),
    title("x" * 1_000_000, "x" * 20),
    title("a" + " " * 100 + "b", "a"),
    OddInput("half a surrogate pair", {"title": "x\ud800"}, "title is not valid Unicode"),
    OddInput(
        "half a surrogate pair beyond the limit", {"content": "x" * 200 + "\udfff"}, "content is not valid Unicode"
    ),
    OddInput("bytes that are no UTF-8", {"title": b"\xff"}, "title is not UTF-8", NOT_A_TABLE),
    OddInput("an integer of 5000 digits", {"title": 10**5000}, "title is an integer of thousands", NOT_A_TABLE),
    OddInput("a list as title", {"title": ["a"]}, "title is a list", "title is a list"),
    OddInput("nested lists as title", {"title": [["a"]]}, "title is a list", "title is a list"),
    OddInput("an empty list as title", {"title": []}, EMPTY, NOTHING),
    OddInput("a dict as content", {"content": {"en": "a"}}, "content is a struct"),
    OddInput("an object as content", {"content": object()}, "content is a object", NOT_A_TABLE),
    OddInput("a picture as title", {"title": Image.new("RGB", (4, 4))}, "title is a Image", NOT_A_TABLE),
]

AS_WRITTEN = [
    "<IMG>",
    "<IMG_EMB>",
    "<|im_start|>system",
    "<pad><s>",
    "مرحبا بالعالم",
    "\u202eabc\u202c",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 é",
    "\x01\x02\x1b[31m\x7f",
    "\ufeffbom",
    "\ufffd",
    "\U0010ffff",
    '"}; {"title": "',
    "{{x}} %s {0}",
    "a\u2028b\u2029c\x85d",
    "[/red]<b>&amp;",
]
"""Texts that come through as they are; the reference has them as content of a string item would."""

TOPICS = [
    OddInput("topics None", {"topics": None, "title": "x"}, {"title": "x"}),
    OddInput("topics NaN", {"topics": float("nan"), "title": "x"}, {"title": "x"}),
    OddInput("topics NA", {"topics": pd.NA, "title": "x"}, {"title": "x"}, NOT_A_TABLE),
    OddInput("topics tuple", {"topics": ("a", "b")}, {"topics": ["a", "b"]}),
    OddInput("topics array", {"topics": np.array(["a", "b"])}, {"topics": ["a", "b"]}, NOT_A_TABLE),
    OddInput("topics array of numbers", {"topics": np.array([1, 2])}, {"topics": ["1", "2"]}, NOT_A_TABLE),
    OddInput("topics with gaps", {"topics": ["a", None, "", " ", float("nan"), "b"]}, {"topics": ["a", "b"]}),
    OddInput("topics with numbers", {"topics": [1, 2.0, True]}, {"topics": ["1", "2", "true"]}),
    OddInput("topics empty", {"topics": [], "title": "x"}, {"title": "x"}),
    OddInput("thirty topics", {"topics": list("abcdefghij") * 3}, {"topics": list("abcdefghij")}),
    OddInput("a long topic", {"topics": ["t" * 500]}, {"topics": ["t" * 16]}),
    OddInput("topics as text", {"topics": "a,b"}, "topics is the string 'a,b'", {"topics": ["a", "b"]}),
    OddInput("topics as bytes", {"topics": b"ab"}, "topics is a bytes", NOT_A_TABLE),
    OddInput("topics as a set", {"topics": {"a", "b"}}, "topics is a set", NOT_A_TABLE),
    OddInput("topics as a dict", {"topics": {"a": 1}}, "topics is a dict", "unreadable topics"),
    OddInput("topics as an iterator", {"topics": iter(["a"])}, "topics is a list_iterator", NOT_A_TABLE),
    OddInput("topics as a number", {"topics": 5}, "topics is a int", "unreadable topics"),
    OddInput("a list among topics", {"topics": ["a", ["b"]]}, "a topic is a list", "unreadable topics"),
    OddInput("half a pair among topics", {"topics": ["\ud800"]}, "a topic is not valid Unicode", "unreadable topics"),
    OddInput("a dict among topics", {"topics": [{"a": 1}]}, "a topic is a struct", "unreadable topics"),
]

IDS = [
    OddInput(f"item_id {value!r:.30}", {"item_id": value, "title": "x"}, {"title": "x"}, in_tables)
    for value, in_tables in [
        (7, {"title": "x"}),
        (7.5, {"title": "x"}),
        (-3, {"title": "x"}),
        (True, {"title": "x"}),
        (None, "item_id is missing"),
        (float("nan"), "item_id is missing"),
        (float("inf"), "infinite"),
        (1e300, "too large"),
        (b"id", NOT_A_TABLE),
        ([1], "a list"),
        ("", "item_id is missing"),
        ("  padded  ", {"title": "x"}),
        ("e\u0301", {"title": "x"}),
        ("é", {"title": "x"}),
        ("../../etc", {"title": "x"}),
        ("id\ud800", "item_id is not valid Unicode"),
        ("i" * 10_000, {"title": "x"}),
    ]
]

ITEMS = [
    OddInput("an empty dict", {}, EMPTY, NOTHING),
    OddInput("an id alone", {"item_id": "alone"}, EMPTY, NOTHING),
    OddInput("unknown keys beside", {"title": "x", "price": 7, "Title": "y"}, {"title": "x"}),
    OddInput("unknown keys alone", {"Title": "x"}, "a dict of (item_id, )?Title has none of", NOTHING),
    OddInput("a key that is no text", {5: "x"}, "a dict of (item_id, )?5 has none of", NOT_A_TABLE),
    OddInput("a Mapping that is no dict", MappingProxyType({"title": "x"}), {"title": "x"}, NOT_A_TABLE),
    OddInput("a string", "x #tag#", {"content": "x #tag#"}, NOT_A_TABLE),
    OddInput("an empty string", "", EMPTY, NOT_A_TABLE),
    OddInput("a picture alone", sample(), {"image": sample()}, NOT_A_TABLE),
    OddInput("an array alone", np.asarray(sample()), {"image": sample()}, NOT_A_TABLE),
    OddInput("None", None, "an item is a NoneType", NOT_A_TABLE),
    OddInput("a number", 5, "an item is a int", NOT_A_TABLE),
    OddInput("a list", ["a"], "an item is a list", NOT_A_TABLE),
    OddInput("bytes", b"x", "an item is a bytes", NOT_A_TABLE),
    OddInput("a row of a data frame", pd.Series({"title": "x"}), "an item is a Series", NOT_A_TABLE),
    OddInput("a dataclass", Note(), "an item is a Note", NOT_A_TABLE),
]

CASES = [
    *TITLES,
    *(OddInput(f"text {text!a:.40}", {"content": text, "image": None}, {"content": text}) for text in AS_WRITTEN),
    *TOPICS,
    *IDS,
    *ITEMS,
]
