"""Wrong bodies, and clients that misbehave: each gets its error, and nobody else waits for it."""

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest

from tests.support.catalogue import png
from tests.support.server import data_url
from tests.support.serving import SERVED_ITEMS as ITEMS
from tests.support.serving import body_of, error_of, read_vectors, wait_for


CLOSE = {"rtol": 0, "atol": 2e-6}


WRONG = {
    "no JSON": (b"{", None, "not JSON"),
    "deep": (b"[" * 100_000, None, "body"),
    "a list": (b"[]", None, "dictionary"),
    "no input": ({"model": "tiny"}, "input", "required"),
    "null": ({"input": None}, "input", "expected a text"),
    "an empty list": ({"input": []}, "input", "expected a text"),
    "an empty text": ({"input": ["a", " "]}, "input[1]", "neither text nor image"),
    "token ids": ({"input": [1, 2, 3]}, "input[0]", "token ids"),
    "lists of token ids": ({"input": [[1, 2], [3]]}, "input[0]", "token ids"),
    "a number among texts": ({"input": ["a", 2.5]}, "input[1]", "expected a text"),
    "an unknown part": ({"input": ["a", [{"type": "audio"}]]}, "input[1][0]", "audio"),
    "half a surrogate pair": (b'{"input": ["a", "\\ud800"]}', "input[1]", "Unicode"),
    "half a pair in a name": (b'{"input": "a", "\\ud800": 1}', None, "unicode string"),
    "another model": ({"input": "a", "model": "gpt"}, "model", "'gpt'"),
    "negative dimensions": ({"input": "a", "dimensions": -1}, "dimensions", "greater"),
    "an unknown format": ({"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_body_is_named_in_openais_form(server, name):
    content, where, words = WRONG[name]
    sent = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/embeddings", content=sent, headers=headers)
    error = error_of(answer, 404 if name == "another model" else 400)
    assert words in error["message"] and error["param"] == where and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("/etc/hostname", "paths and other schemes are refused"),
        ("file:///etc/hostname", "paths and other schemes are refused"),
        ("", "paths and other schemes are refused"),
        ("http://127.0.0.1/a.png", "http://127.0.0.1/a.png is not fetched"),
        ("https://example.com/a.png", "https://example.com/a.png is not fetched"),
        ("data:image/png;base64,####", "no base64"),
        ("data:image/png,abc", "a data URL is"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no picture"),
        (data_url(png(2)[:-300]), "image can't be read"),
        ([data_url(png(1)), "a.png"], "paths and other schemes are refused"),
    ],
)
def test_a_picture_that_is_none_names_its_item(server, image, words):
    body = {"items": [{"title": "fine"}, {"title": "not", "image": image}]}
    error = error_of(httpx.post(f"{server.url}/embed", json=body), 400)
    assert words in error["message"] and error["param"] == "items[1]"
    parts = [{"type": "image_url", "image_url": {"url": one}} for one in ([image] if isinstance(image, str) else image)]
    error = error_of(httpx.post(f"{server.url}/v1/embeddings", json={"input": ["fine", parts]}), 400)
    assert words in error["message"] and error["param"] == "input[1]"


@pytest.mark.parametrize("name", ["path", "file_name", "image_file_name", "bytes"])
def test_an_item_has_no_other_place_for_a_path(server, name):
    error = error_of(httpx.post(f"{server.url}/embed", json={"items": [{"title": "a", name: "/etc/hostname"}]}), 400)
    assert error["param"] == f"items[0].{name}"
    error = error_of(httpx.post(f"{server.url}/search", json={"item": {"title": "a", name: "/etc/hostname"}}), 400)
    assert error["param"] == f"item.{name}"


def test_a_bad_item_spoils_no_other_of_its_batch(tight, by_auto_model):
    good, bad = body_of(ITEMS[1]), {"items": [{"title": "x", "image": data_url(png(2)[:-300])}]}
    before = tight.metric("batch_items_count")
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda body: httpx.post(f"{tight.url}/embed", json=body), [good, bad, good]))
    error_of(answers[1], 400)
    for answer in (answers[0], answers[2]):
        np.testing.assert_allclose(read_vectors(answer), by_auto_model(ITEMS[1]), **CLOSE)
    assert tight.metric("batch_items_count") - before == 1


def test_a_full_queue_answers_429_and_openais_client_waits(tight):
    with ThreadPoolExecutor(8) as pool:
        body = {"input": ["a", "b", "c"]}
        answers = list(pool.map(lambda _: httpx.post(f"{tight.url}/v1/embeddings", json=body), range(8)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {200, 429} and len(refused) >= 6
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        patient = openai.OpenAI(base_url=f"{tight.url}/v1", api_key="any", max_retries=10)
        results = list(pool.map(lambda _: patient.embeddings.create(model="model", input=["a", "b", "c"]), range(4)))
    assert all(len(result.data) == 3 for result in results)
    assert tight.metric("queue_items") == 0


def test_limits_of_a_request(tight):
    def refused(route: str, body: dict, status: int = 400) -> str:
        return error_of(httpx.post(f"{tight.url}{route}", json=body), status)["message"]

    assert "at most 100" in refused("/v1/embeddings", {"input": ["a", "b" * 101]})
    assert "at most 4" in refused("/v1/embeddings", {"input": ["a"] * 5})
    assert "at most 2,000" in refused("/embed", {"items": [{"image": data_url(png(1, side=64))}]})
    assert "at most 16" in refused("/embed", {"items": [{"image": [data_url(png(1))] * 17}]})
    assert "more than 1,048,576 bytes" in refused("/v1/embeddings", {"input": "a" * 2_000_000}, 413)


def test_lists_of_thousands_of_thousands_hold_up_no_other(server):
    """They are refused before their entries are looked at."""
    many = 200_000
    for route, body, words in (
        ("/v1/embeddings", {"input": ["a"] * many}, "at most 256"),
        ("/v1/embeddings", {"input": [{"type": "text", "text": ""}] * many}, "at most 256"),
        ("/v1/embeddings", {"input": ["a", [{"type": "text", "text": ""}] * many]}, "at most 256"),
        ("/embed", {"items": [{}] * many}, "at most 10000"),
        ("/embed", {"items": [[]] * 3 * many}, "more than 500,000 brackets"),
        ("/embed", {"items": [{"title": "a", "topics": [""] * many}]}, "at most 10000"),
        ("/embed", {"items": [{"image": [""] * many}]}, "items[0].image"),
    ):
        answer = httpx.post(server.url + route, json=body, timeout=60)
        assert words in error_of(answer, 400)["message"], answer.text


def test_the_pixels_of_an_items_pictures_are_counted_together(tight):
    one = data_url(png(1, side=30))
    assert httpx.post(f"{tight.url}/embed", json={"items": [{"image": [one, one]}]}).status_code == 200
    error = error_of(httpx.post(f"{tight.url}/embed", json={"items": [{"image": [one, one, one]}]}), 400)
    assert error["param"] == "items[0]" and "at most 2,000 in all" in error["message"]


def test_an_answer_quotes_little_of_what_was_sent(server):
    for route, body in (
        ("/search", {"id": "x" * 1_000_000}),
        ("/v1/embeddings", {"input": "a", "model": "x" * 1_000_000}),
        ("/v1/embeddings", {"input": "a", "x" * 1_000_000: 1}),
    ):
        answer = httpx.post(server.url + route, json=body)
        assert answer.status_code in (400, 404) and len(answer.content) < 3000
    for sent in (b'{"items": [{"title": "a", "item_id": "\\ud800"}]}', b'{"items": [{"item_id": "\\ud800"}]}'):
        headers = {"Content-Type": "application/json"}
        error = error_of(httpx.post(f"{server.url}/embed", content=sent, headers=headers), 400)
        assert error["param"] == "items[0].item_id" and "unicode string" in error["message"]


def test_a_body_of_unknown_length_is_cut_off(tight):
    refused = tight.metric("requests_total", route="other", status="413")
    chunks = (b"a" * 65_536 for _ in range(40))
    with contextlib.suppress(httpx.TransportError):  # the server closes while the client still sends
        error_of(httpx.post(f"{tight.url}/v1/embeddings", content=chunks), 413)
    wait_for(lambda: tight.metric("requests_total", route="other", status="413") == refused + 1)


def test_a_slow_client_is_let_go(tight):
    with socket.create_connection(tight.address) as slow:
        slow.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
        slow.settimeout(30)
        answer = slow.makefile("rb").read()  # until the server closes
    assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 1 s" in answer


def test_a_head_that_does_not_arrive_is_let_go(tight):
    """Of a connection's first request or a later one, though a byte comes now and then; an idle connection stays."""
    request = b"GET /health HTTP/1.1\r\nHost: a\r\n"
    for before in (b"", request + b"\r\n"):
        with socket.create_connection(tight.address) as slow, socket.create_connection(tight.address) as idle:
            idle.sendall(request + b"\r\n")
            slow.sendall(before)
            start = time.monotonic()
            with pytest.raises(OSError):  # the server has closed
                for number in range(300):
                    slow.sendall(request if number == 0 else b"X")
                    time.sleep(0.1)
            assert time.monotonic() - start > 0.9
            idle.sendall(request + b"Connection: close\r\n\r\n")
            assert idle.makefile("rb").read().count(b"HTTP/1.1 200") == 2


def test_nothing_is_encoded_for_a_client_that_has_gone(tight):
    encoded, gone = (tight.metric("items_total"), tight.metric("requests_total", route="/embed", status="499"))
    sent = json.dumps(body_of(ITEMS[1])).encode()
    head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
    with socket.create_connection(tight.address) as client:
        client.sendall(head.encode() + sent)
        wait_for(lambda: tight.metric("queue_items") == 1)
    wait_for(lambda: tight.metric("requests_total", route="/embed", status="499") == gone + 1)
    assert tight.metric("queue_items") == 0
    time.sleep(0.4)  # the wait of its batch
    assert tight.metric("items_total") == encoded
