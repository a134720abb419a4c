"""Pictures from elsewhere, and batches, without a server around them."""

import asyncio
import io
import socket
from dataclasses import replace

import httpx
import numpy as np
import pytest
from PIL import Image

from hub.catalogue.encoder import ItemEncoder
from hub.serving import pictures as pictures_module
from hub.serving.batching import Batcher, BatchSizes
from hub.serving.limits import Limits, RequestError
from hub.serving.metrics import Metrics
from hub.serving.pictures import Pictures
from tests.support.catalogue import make_items, png
from training.tables.remote.places import Allowed, is_public


PUBLIC = "93.184.215.14"
LIMITS = Limits()


def fetch(address: str, answer=None, limits: Limits = LIMITS, transport=None):
    """A picture from example.com, which alone is allowed, as a stand-in for the net answers."""
    allowed = Allowed.of("example.com, localhost")

    async def opened():
        return await Pictures(limits, allowed, transport or httpx.MockTransport(answer)).open(address)

    return asyncio.run(opened())


@pytest.fixture
def names(monkeypatch):
    """What names mean, to be changed by a test."""
    meaning = {"example.com": [PUBLIC]}
    found = socket.getaddrinfo

    def look_up(host, port, *args, **settings):
        if host not in meaning:
            return found(host, port, *args, **settings)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in meaning[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return meaning


def test_a_picture_of_an_allowed_host_comes_from_the_address_that_was_checked(names):
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((str(request.url), request.headers["Host"], request.extensions["sni_hostname"]))
        return httpx.Response(200, content=png(1))

    assert fetch("https://example.com/a.png?b=1", answer).size == (25, 24)
    assert asked == [(f"https://{PUBLIC}/a.png?b=1", "example.com", "example.com")]


@pytest.mark.parametrize(
    "address",
    [
        "http://evil.com/a.png",
        "http://example.com.evil.com/a.png",
        "http://example.com@evil.com/a.png",
        "http://user@example.com/a.png",
        "http://example.com:22/a.png",
        "http://evil.com#example.com/a.png",
        "http://[::1]/a.png",
        "ftp://example.com/a.png",
        "http://",
        "http://exa mple.com/",
    ],
)
def test_no_other_address_is_asked(names, address):
    def answer(request: httpx.Request) -> httpx.Response:
        raise AssertionError(f"{request.url} was asked")

    with pytest.raises(RequestError):
        fetch(address, answer)


@pytest.mark.parametrize(
    "inside",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("224.0.0.1", "::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:93.184.215.14"),
        *("64:ff9b::7f00:1", "2002:7f00:1::"),
    ],
)
def test_a_name_that_means_a_machine_inside_is_refused(names, inside):
    assert not is_public(inside) and is_public(PUBLIC)
    names["example.com"] = [PUBLIC, inside]
    with pytest.raises(RequestError, match="not a public address"):
        fetch("http://example.com/a.png", lambda request: httpx.Response(200, content=png(1)))


def test_an_allowed_name_of_this_machine_is_not_asked():
    with pytest.raises(RequestError, match="not a public address"):
        fetch("http://localhost/a.png", transport=httpx.AsyncHTTPTransport())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (httpx.Response(302, headers={"Location": "http://127.0.0.1/a.png"}), "redirects are not followed"),
        (httpx.Response(404), "answered 404"),
        (httpx.Response(200, content=b"x" * 2000), "more than 1,000 bytes"),
        (httpx.Response(200, content=b"no picture"), "no picture"),
        (httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=b""), "answered 200"),
    ],
)
def test_what_a_host_may_not_answer(names, answer, words):
    asked = []

    def once(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answer

    with pytest.raises(RequestError, match=words):
        fetch("http://example.com/a.png", once, replace(LIMITS, body_bytes=1000))
    assert len(asked) == 1


def test_a_host_that_is_slow_is_left(names, monkeypatch):
    monkeypatch.setattr(pictures_module, "SECONDS", 0.1)

    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        return httpx.Response(200)

    with pytest.raises(RequestError, match="did not answer within"):
        fetch("http://example.com/a.png", never)


@pytest.fixture
def batcher(tiny_model_folder):
    encoder = ItemEncoder(str(tiny_model_folder), batch_size=64, visual=True)
    made = Batcher(encoder, BatchSizes(tokens=400, wait=0.2), 2, Metrics())
    made.load()
    return made


def embed_all(batcher: Batcher, items: list[dict]) -> list:
    """Each item as a request of its own, all at once; what was raised in place of a result."""

    async def ask():
        running = asyncio.create_task(batcher.run())
        opened = [{name: value for name, value in item.items() if value} for item in items]
        results = await asyncio.gather(*(batcher.embed({"item": item}) for item in opened), return_exceptions=True)
        running.cancel()
        return results

    try:
        return asyncio.run(ask())
    finally:
        batcher.close()


def test_batches_keep_to_their_tokens(batcher, monkeypatch):
    sizes = []
    embed = ItemEncoder.embed

    def watched(self, block):
        sizes.append((len(block.input_ids), max(map(len, block.input_ids))))
        return embed(self, block)

    monkeypatch.setattr(ItemEncoder, "embed", watched)
    results = embed_all(batcher, make_items(12))
    assert all(len(result) == 1 for result in results) and sum(count for count, _ in sizes) == 12
    assert all(count == 1 or count * longest <= 400 for count, longest in sizes)
    assert max(count for count, _ in sizes) > 1


def test_no_picture_keeps_its_pixels_while_its_request_waits(batcher):
    items = [{"title": "a", "image": [Image.open(io.BytesIO(png(number))) for number in (1, 2)]} for _ in range(3)]
    assert all(len(result) == 1 for result in embed_all(batcher, items))
    for picture in (picture for item in items for picture in item["image"]):
        with pytest.raises(ValueError, match="closed"):
            picture.getpixel((0, 0))


def test_where_the_model_fails_for_one_the_others_of_its_batch_are_answered(batcher, monkeypatch):
    items = make_items(4)
    good = np.stack([result[0].embedding for result in embed_all(batcher, items)])
    again = Batcher(batcher.encoder, BatchSizes(wait=0.2), 2, Metrics())
    again.load()
    embed = ItemEncoder.embed
    broken = again.encoder.processor(items[2], padding=False)["input_ids"][0]
    sizes = []

    def breaks(self, block):
        sizes.append(len(block.input_ids))
        if broken in block.input_ids:
            raise RuntimeError("out of memory")
        return embed(self, block)

    monkeypatch.setattr(ItemEncoder, "embed", breaks)
    results = embed_all(again, items)
    assert sizes == [4, 1, 1, 1, 1]
    assert isinstance(results[2], RuntimeError)
    for number in (0, 1, 3):
        np.testing.assert_allclose(results[number][0].embedding, good[number], rtol=0, atol=2e-6)


def test_an_embedding_that_is_not_finite_is_an_error_of_its_item_alone(batcher, monkeypatch):
    embed = ItemEncoder._embed_batch

    def spoiled(self, batch):
        embeddings, visual = embed(self, batch)
        embeddings[1] = np.nan
        return embeddings, visual

    monkeypatch.setattr(ItemEncoder, "_embed_batch", spoiled)
    results = embed_all(replace_sizes(batcher), make_items(3))
    failed = [result for result in results if isinstance(result, RequestError)]
    assert len(failed) == 1 and "not finite" in failed[0].message and failed[0].where == "item"
    assert sum(isinstance(result, list) for result in results) == 2


def replace_sizes(batcher: Batcher) -> Batcher:
    """With room for all in one batch."""
    batcher.sizes = BatchSizes(wait=0.2)
    return batcher
