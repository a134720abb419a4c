"""Texts of users inside Markdown: they show as they were written, and shape nothing of the page."""

import re


SHAPING = re.compile(
    r"[\\`*~$<>&|]"  # code, emphasis, formulas, HTML, entities, cells
    r"|(?<![^\W_])_+|_+(?![^\W_])"  # emphasis; inside a word it is none
    r"|!?\[(?=[^\]]*\]\s*[(\[:])"  # links and pictures
)
DIRECTIONS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that turn the direction of what follows."""


def as_text(text: str) -> str:
    """A user's text for a cell or the middle of a line, with a backslash before what would be read as markup."""
    line = " ".join(DIRECTIONS.sub("", text).split())
    line = "".join(character if character.isprintable() else " " for character in line)
    return SHAPING.sub(lambda match: "".join(f"\\{character}" for character in match[0]), line)
