"""From an item's fields to its prompt, by the published rules (NoteLLM-2 paper, section 3.3 and figure 2).

A prompt is a list of pieces in which the slots (image, read-out) are separate objects: what users wrote can therefore
never be taken for a slot, whatever characters it has.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from .texts_notellm2 import CellError, is_missing, plain_text


ITEM_FIELDS = ("title", "topics", "content", "image")
"""What an item is made of, beside its `item_id`."""


class Slot(Enum):
    """A place in a prompt that is not text: an image's visual tokens, or the visual embedding's read-out."""

    IMAGE = "<IMG>"
    VISUAL_EMBEDDING = "<IMG_EMB>"


Piece = str | Slot


class ItemError(ValueError):
    """An item that can't be used; the message names its row in the batch and its `item_id`."""


@dataclass(frozen=True)
class Wording:
    """The fixed words of a prompt in one language."""

    note: str  # opens an item
    image: str  # the fields' names, as they stand in the braces
    title: str
    topics: str
    content: str
    separator: str  # between fields
    compress: str  # "compressed into one word", with its opening quote
    close: str  # closes the compressed word
    topic_separator: str
    newline: str  # stands for a line break in a text


WORDINGS = {
    "zh": Wording(
        note="笔记：",
        image='"图片":"',
        title='"标题":"',
        topics='"话题":"',
        content='"内容":"',
        separator=",",
        compress="，压缩为一个词：“",
        close="”。",
        topic_separator="，",
        newline="。",
    ),
    "en": Wording(
        note="Item: ",
        image='"image": "',
        title='"title": "',
        topics='"topics": "',
        content='"content": "',
        separator=", ",
        compress=', compressed into one word: "',
        close='". ',
        topic_separator=", ",
        newline=" ",
    ),
}

HASHTAG = re.compile(r"#([^#\s]+)#")
TOPIC_MARK = "[话题]"


@dataclass(frozen=True)
class FieldLimits:
    """How much of each field enters the prompt. Characters first, as published; tokens where a limit is set."""

    max_title_length: int = 20  # characters
    max_content_length: int = 80  # characters
    max_topics: int = 10
    max_topic_length: int = 16  # characters; a longer #word# stays in the content
    max_title_tokens: int | None = None
    max_topics_tokens: int | None = None
    max_content_tokens: int | None = None


@dataclass(frozen=True)
class ItemText:
    """The cleaned and cut texts of one item."""

    title: str
    topics: str
    content: str


def item_text(
    item: Mapping[str, Any], wording: Wording, limits: FieldLimits, cut: Callable[[str, int], str]
) -> ItemText:
    """Cleans the texts of an item by the published rules.

    NUL bytes are dropped; `[话题]` leaves the content; each `#word#` of at most 16 characters becomes a topic and leaves
    the content; line breaks become a full stop; texts are cut, then stripped. Given `topics` come before those found.

    Args:
        item: with `title`, `topics`, `content`; each may be missing, None or NaN.
        cut: cuts a text to a number of tokens.

    Raises:
        ItemError: for a field of a type that is no text.
    """
    title = _flatten(_field(item, "title"), wording)
    content = _field(item, "content").replace(TOPIC_MARK, "")
    hashtags = [word for word in HASHTAG.findall(content) if len(word) <= limits.max_topic_length]
    content = HASHTAG.sub(lambda match: "" if len(match[1]) <= limits.max_topic_length else match[0], content)
    content = _flatten(content, wording)
    given = [_flatten(topic, wording).strip()[: limits.max_topic_length] for topic in _topics(item)]
    all_topics = [topic for topic in given if topic] + hashtags
    topics = wording.topic_separator.join(all_topics[: limits.max_topics])
    fields = {
        "title": (title[: limits.max_title_length].strip(), limits.max_title_tokens),
        "topics": (topics, limits.max_topics_tokens),
        "content": (content[: limits.max_content_length].strip(), limits.max_content_tokens),
    }
    return ItemText(
        **{name: text if most is None else cut(text, most).strip() for name, (text, most) in fields.items()}
    )


def build_pieces(text: ItemText, num_images: int, mode: str, wording: Wording) -> list[Piece]:
    """The prompt of one item.

    Args:
        num_images: slots to put in the image field; 0 gives the text-only prompt whatever the mode.
        mode: "micl" (the image is compressed first), "basic" (image and text together) or "late_only" (text alone).
    """
    fields = wording.separator.join(
        [f'{wording.title}{text.title}"', f'{wording.topics}{text.topics}"', f'{wording.content}{text.content}"']
    )
    images: list[Piece] = [Slot.IMAGE] * num_images
    if num_images == 0 or mode == "late_only":
        pieces: list[Piece] = [f"{wording.note}{{{fields}}}"]
    elif mode == "micl":
        pieces = [f"{wording.note}{{{wording.image}", *images, f'"}}{wording.compress}', Slot.VISUAL_EMBEDDING]
        pieces.append(f"{wording.close}{wording.note}{{{fields}}}")
    elif mode == "basic":
        pieces = [f"{wording.note}{{{wording.image}", *images, f'"{wording.separator}{fields}}}']
    else:
        raise ValueError(f"Unknown prompt mode {mode!r}: expected micl, basic or late_only.")
    return [*pieces[:-1], f"{pieces[-1]}{wording.compress}"]


def split_slots(prompt: str) -> list[Piece]:
    """Reads a ready prompt, in which <IMG> and <IMG_EMB> do stand for slots, into pieces."""
    parts = re.split("(" + "|".join(re.escape(slot.value) for slot in Slot) + ")", prompt)
    slots: dict[str, Piece] = {slot.value: slot for slot in Slot}
    return [slots.get(part, part) for part in parts if part]


def join_pieces(pieces: Iterable[Piece]) -> str:
    """The prompt as a person reads it."""
    return "".join(piece.value if isinstance(piece, Slot) else piece for piece in pieces)


def _field(item: Mapping[str, Any], name: str) -> str:
    return _text(item.get(name), name)


def _text(value: Any, name: str) -> str:
    try:
        return plain_text(value).replace("\0", "")
    except CellError as error:
        raise ItemError(f"{name} is {error}") from error


def _topics(item: Mapping[str, Any]) -> list[str]:
    topics = item.get("topics")
    if is_missing(topics):
        return []
    if isinstance(topics, str):
        raise ItemError(f"topics is the string {topics[:40]!r}; a list of strings is expected")
    if not isinstance(topics, (list, tuple, np.ndarray)):  # a set has no order, a dict no topics, an iterator ends
        raise ItemError(f"topics is a {type(topics).__name__}; a list of strings is expected")
    return [_text(topic, "a topic") for topic in topics]


def _flatten(text: str, wording: Wording) -> str:
    return re.sub(r"\r\n|\r|\n", lambda _: wording.newline, text)
