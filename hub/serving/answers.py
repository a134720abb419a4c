"""The bodies of answers, as the OpenAPI page shows them, and how vectors stand in them."""

import base64
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from hub.serving.batching import Embedded
from hub.serving.limits import RequestError


class Usage(BaseModel):
    """Tokens that the LLM read: the whole prompts, and the pictures' placeholders."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbedding(BaseModel):
    """One of a list; in base64 it is float32, little-endian."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(BaseModel):
    """Of `POST /v1/embeddings`."""

    object: str = "list"
    data: list[OpenAIEmbedding]
    model: str
    usage: Usage


class ItemEmbedding(BaseModel):
    """One of a list; `visual_embedding` is null for an item without a picture."""

    item_id: str | None
    embedding: list[float]
    visual_embedding: list[float] | None = None


class EmbedAnswer(BaseModel):
    """Of `POST /embed`."""

    data: list[ItemEmbedding]
    usage: Usage


class Found(BaseModel):
    """A neighbour; the score is the inner product, of unit vectors the cosine."""

    item_id: str
    score: float
    title: str | None


class SearchAnswer(BaseModel):
    """Of `POST /search`, best first."""

    results: list[Found]


class Health(BaseModel):
    """Of `GET /health`."""

    status: str
    model: str
    dimensions: int
    indexed_items: int | None


def usage_of(embedded: Sequence[Embedded]) -> Usage:
    """The tokens of a request."""
    tokens = sum(of_item.tokens for of_item in embedded)
    return Usage(prompt_tokens=tokens, total_tokens=tokens)


def shortened(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The leading dimensions of a vector, of unit length again, as `--matryoshka_dims` trains them; zeros stay zeros.

    Raises:
        RequestError: for more dimensions than there are.
    """
    if dimensions is None:
        return vector
    if dimensions > len(vector):
        raise RequestError(400, f"{dimensions} of {len(vector)} dimensions were asked for.", "dimensions")
    length = np.linalg.norm(vector[:dimensions])
    return vector[:dimensions] / length if length else vector[:dimensions]


def encoded(vector: np.ndarray, encoding_format: str) -> list[float] | str:
    """A vector as OpenAI's client asks for it: "float" or "base64"."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
