"""The bodies that the routes take, and the items in them: OpenAI's forms, and the project's own item as a dict."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, TypeAdapter, ValidationError, model_validator

from hub.serving.limits import Limits, RequestError, describe_validation
from hub.serving.pictures import Pictures
from training.tables.columns import item_from_values
from training.tables.items import Item


MOST = 10_000
"""Entries of a list that are looked at: thousands of thousands would hold up all other requests. Smaller limits come later."""


Id = Annotated[str, Field(max_length=1024)]
"""The length has pydantic read it as Unicode too: half of a surrogate pair could not be sent back."""


class Body(BaseModel):
    """A part of a request: a name that is not known is a mistake of the sender."""

    model_config = ConfigDict(extra="forbid")


class ItemBody(Body):
    """An item; every key may be missing, but not all."""

    item_id: Id | None = None
    title: str | None = None
    topics: list[str] | None = Field(default=None, max_length=MOST)
    content: str | None = None
    image: str | Annotated[list[str], Field(max_length=MOST)] | None = Field(
        default=None, description="Data URL (base64), or several."
    )


class TextPart(BaseModel):
    """Text of an item, in the form of a chat message's part."""

    type: Literal["text", "input_text"]
    text: str


class ImageAddress(BaseModel):
    """Where a picture is."""

    url: str


class ImagePart(BaseModel):
    """A picture of an item, in the form of a chat message's part."""

    type: Literal["image_url", "input_image"]
    image_url: ImageAddress | str = Field(description="Data URL (base64).")


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
PART = TypeAdapter[TextPart | ImagePart](Part)
Dimensions = Annotated[int | None, Field(ge=1, description="Leading dimensions to keep, scaled to unit length again.")]


class EmbeddingsRequest(Body):
    """`POST /v1/embeddings`. `input` is a text, a list of parts (one item), or a list of texts and lists of parts."""

    input: SkipValidation[
        str | list[str | list[Part]] | list[Part]
    ]  # read by `items_of_input`, which says what is wrong
    model: str | None = None
    dimensions: Dimensions = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class EmbedRequest(Body):
    """`POST /embed`."""

    items: list[ItemBody] = Field(min_length=1, max_length=MOST)
    dimensions: Dimensions = None
    visual: bool = Field(default=False, description="Give the embedding of the pictures alone too.")


class SearchRequest(Body):
    """`POST /search`: the neighbours of an item of the index, or of any other."""

    id: Id | None = None
    item: ItemBody | None = None
    k: int = Field(default=20, ge=1, le=1000)

    @model_validator(mode="after")
    def check(self) -> "SearchRequest":
        """Either of them."""
        if (self.id is None) == (self.item is None):
            raise ValueError("pass either id or item")
        return self


def items_of_input(content: Any, limits: Limits) -> dict[str, ItemBody]:
    """The items of OpenAI's `input`, by where they stand in it.

    Raises:
        RequestError: naming the first that is none.
    """
    if isinstance(content, str):
        return {"input": ItemBody(content=content)}
    if not isinstance(content, list) or not content:
        raise RequestError(400, "expected a text, a list of parts, or a list of texts and lists of parts.", "input")
    if all(isinstance(entry, dict) for entry in content):
        return {"input": item_of_parts(content, "input", limits)}
    check_count(len(content), limits)
    return {
        f"input[{number}]": _item_of_entry(entry, f"input[{number}]", limits) for number, entry in enumerate(content)
    }


def _item_of_entry(entry: Any, where: str, limits: Limits) -> ItemBody:
    if isinstance(entry, str):
        return ItemBody(content=entry)
    if isinstance(entry, int) or (isinstance(entry, list) and any(isinstance(token, int) for token in entry)):
        raise RequestError(400, "token ids are not taken, as an item's prompt is made here; send text.", where)
    if isinstance(entry, list) and entry:
        return item_of_parts(entry, where, limits)
    raise RequestError(400, "expected a text, or a list of parts of text and image_url.", where)


def item_of_parts(parts: Sequence[Any], where: str, limits: Limits) -> ItemBody:
    """One item of a message's parts: its texts, with line ends between them, are the content.

    Raises:
        RequestError: naming the part; or for too many of them.
    """
    if len(parts) > limits.parts:
        raise RequestError(400, f"{len(parts):,} parts; an item has at most {limits.parts}.", where)
    texts, pictures = [], []
    for number, raw in enumerate(parts):
        try:
            part = PART.validate_python(raw)
        except ValidationError as error:
            raise RequestError(400, describe_validation(error.errors()[:1]).message, f"{where}[{number}]") from error
        if isinstance(part, TextPart):
            texts.append(part.text)
        else:
            pictures.append(part.image_url if isinstance(part.image_url, str) else part.image_url.url)
    return ItemBody(content="\n".join(texts), image=pictures)


async def open_items(bodies: dict[str, ItemBody], pictures: Pictures, limits: Limits) -> dict[str, Item]:
    """Items as the processor takes them, by where they stand in their request; their pictures open.

    Raises:
        RequestError: naming the first item that can't be taken.
    """
    check_count(len(bodies), limits)
    async with asyncio.TaskGroup() as tasks:
        opened = {where: tasks.create_task(_opened(body, where, pictures, limits)) for where, body in bodies.items()}
    for task in opened.values():
        if isinstance(result := task.result(), RequestError):
            raise result
    return {where: item for where, task in opened.items() if not isinstance(item := task.result(), RequestError)}


def check_count(items: int, limits: Limits) -> None:
    """Refuse too many items.

    Raises:
        RequestError: naming the limit.
    """
    if items > limits.items:
        raise RequestError(400, f"{items:,} items; a request has at most {limits.items:,}.")


async def _opened(body: ItemBody, where: str, pictures: Pictures, limits: Limits) -> Item | RequestError:
    texts = [body.title or "", body.content or "", *(body.topics or [])]
    characters = sum(map(len, texts))
    addresses = [body.image] if isinstance(body.image, str) else body.image or []
    item = item_from_values(body.model_dump(include={"title", "topics", "content"}), Path())
    try:
        if characters > limits.characters:
            raise RequestError(400, f"{characters:,} characters; an item has at most {limits.characters:,}.")
        if len(addresses) > limits.pictures:
            raise RequestError(400, f"{len(addresses)} pictures; an item has at most {limits.pictures}.")
        if addresses:
            opened = [await pictures.open(address) for address in addresses]
            pixels = sum(picture.width * picture.height for picture in opened)
            if pixels > limits.pixels:
                raise RequestError(400, f"{pixels:,} pixels; an item's pictures have at most {limits.pixels:,} in all.")
            item["image"] = opened
    except RequestError as error:
        return RequestError(error.status, error.message, where)
    return item
