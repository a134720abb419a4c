"""Items as clients send them to the server, and its answers as they read them."""

import time

import httpx
import numpy as np

from tests.support.catalogue import make_items
from tests.support.server import data_url


SERVED_ITEMS = make_items(64)
"""Items of the index."""


def as_json(item: dict) -> dict:
    """An item as it is sent."""
    return {**item, "image": item["image"] and data_url(item["image"])}


def body_of(*items: dict) -> dict:
    return {"items": [as_json(item) for item in items]}


def read_vectors(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]], np.float32)


def error_of(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
