"""Texts to ids by any tokenizer, so that no text gives a slot's id: encoded, cut to a number of tokens, opened, padded."""

from collections.abc import Mapping
from typing import Any


def encode(tokenizer: Any, texts: list[str], **kwargs: Any) -> Mapping[str, Any]:
    """Tokenizes texts in which no special token is recognised."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, **kwargs)


def cut(tokenizer: Any, text: str, most: int) -> str:
    """The longest beginning of a text that has at most `most` tokens."""
    if not tokenizer.is_fast:
        ids = encode(tokenizer, [text])["input_ids"][0]
        return text if len(ids) <= most else tokenizer.decode(ids[:most]).rstrip("\ufffd")
    offsets = encode(tokenizer, [text], return_offsets_mapping=True)["offset_mapping"][0]
    return text if len(offsets) <= most else text[: offsets[most][0]]


def start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text (a BOS token in Llama's), and nothing of what it puts behind.

    Asked with `split_special_tokens`, as `encode` asks: it is a state of the tokenizer, which all threads share.
    """
    bare = tokenizer("a", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    full = tokenizer("a", split_special_tokens=True)["input_ids"]
    return next((full[:at] for at in range(len(full)) if full[at : at + len(bare)] == bare), [])


def end_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts behind a text (an EOS token in some)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return next((full[at + len(bare) :] for at in range(len(full)) if full[at : at + len(bare)] == bare), [])


def pad(
    tokenizer: Any,
    input_ids: list[list[int]],
    padding: bool | str,
    padding_side: str | None,
    max_length: int | None,
    multiple: int | None,
) -> dict[str, list[list[int]]]:
    """Rows of ids with their mask, padded as tokenizers pad but never cut; arguments as of the processor."""
    longest = max(map(len, input_ids), default=0)
    if padding == "max_length":
        longest = max(longest, max_length or 0)
    if multiple:
        longest = -(-longest // multiple) * multiple
    if padding in (False, "do_not_pad"):
        return {"input_ids": input_ids, "attention_mask": [[1] * len(ids) for ids in input_ids]}
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    gaps = [longest - len(ids) for ids in input_ids]
    if (padding_side or tokenizer.padding_side) == "left":
        return {
            "input_ids": [[filler] * gap + ids for ids, gap in zip(input_ids, gaps, strict=True)],
            "attention_mask": [[0] * gap + [1] * (longest - gap) for gap in gaps],
        }
    return {
        "input_ids": [ids + [filler] * gap for ids, gap in zip(input_ids, gaps, strict=True)],
        "attention_mask": [[1] * (longest - gap) + [0] * gap for gap in gaps],
    }
