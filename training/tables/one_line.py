"""An item as one line of text, for models that know no fields: title, topics and content, cleaned as for our prompt, uncut."""

from collections.abc import Mapping
from typing import Any

from modeling_notellm2.prompts_notellm2 import WORDINGS, FieldLimits, item_text


UNLIMITED = FieldLimits(max_title_length=2**30, max_content_length=2**30, max_topics=2**15, max_topic_length=2**15)
"""In effect: as much as a field holds."""


def one_line(item: Mapping[str, Any]) -> str:
    """All that an item says, in the order of our prompt; fields that are empty are left out."""
    text = item_text(item, WORDINGS["en"], UNLIMITED, cut=lambda field, most: field[:most])
    return ", ".join(filter(None, (text.title, text.topics, text.content)))
