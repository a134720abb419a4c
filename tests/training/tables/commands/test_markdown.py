"""Texts of users in Markdown render as they were written."""

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from training.tables.commands.markdown import as_text


HOSTILE = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://example.org/p.png)",
    "a | b",
    "`code`",
    "**bold** _soft_ __init__ snake_case ~~gone~~",
    "# heading",
    "- list",
    "1. list",
    "&lt;b&gt; &amp;",
    "\\*",
    "line\n\n# two\n---",
    "{{ x }} {% y %}",
    "$x^2$",
]


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").enable("strikethrough").render(f"| a |\n|---|\n| {text} |\n")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_markup_comes_of_it(text):
    cell = re.search("<td>(.*?)</td>", rendered(as_text(text)), re.S)[1]
    assert html.unescape(cell) == " ".join(text.split())
    alone = MarkdownIt("commonmark").render(f"Title: {as_text(text)}")
    assert html.unescape(alone) == f"<p>Title: {' '.join(text.split())}</p>\n"


def test_directions_and_control_characters_go():
    assert as_text("a\u202eb\x1b[31mc\u2066d") == "ab [31mcd"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1))
def test_any_text_renders_as_itself(text):
    page = rendered(as_text(text))
    assert re.sub(r"</?(?:table|thead|tbody|tr|th|td)>", "", page).count("<") == 0
    assert html.unescape(re.search("<td>(.*?)</td>", page, re.S)[1]) == " ".join(text.split())
