"""The server as its clients meet it: a real process, OpenAI's own client, many clients at once, clients that misbehave."""

import asyncio
import base64
import contextlib
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from hub.encode import encode
from hub.index import BuildArguments, Index, build
from hub.serve import ServeArguments, load_service, main
from tests.support.catalogue import arguments, make_items, png, write_items
from tests.support.models import make_model
from tests.support.server import Running, data_url, serving


KEY = "a key"
ITEMS = make_items(64)
CLOSE = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def index(tiny_model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    items = write_items(ITEMS, folder / "items.parquet")
    encode(arguments(tiny_model_folder, items, folder / "vectors"))
    build(BuildArguments(str(folder / "vectors"), str(folder / "index"), items=str(items)))
    return folder / "index"


@pytest.fixture(scope="module")
def server(tiny_model_folder, index):
    with serving(tiny_model_folder, "--index", index, "--name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def tight(tiny_model_folder):
    """Items wait 300 ms, four may wait, and little may be sent."""
    options = ["--wait_ms", 300, "--queue_items", 4, "--max_items", 4, "--max_body_mb", 1, "--max_pixels", 2000]
    with serving(tiny_model_folder, *options, "--max_characters", 100, "--body_seconds", 1) as running:
        yield running


@pytest.fixture(scope="module")
def by_auto_model(tiny_model_folder):
    """What AutoModel gives of items, each alone."""
    model = AutoModel.from_pretrained(tiny_model_folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tiny_model_folder, trust_remote_code=True)

    def embed(*items):
        with torch.inference_mode():
            outputs = [model(**processor([item], return_tensors="pt")) for item in items]
        return np.concatenate([output.embeddings.numpy() for output in outputs])

    return embed


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


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


def test_openais_client_gets_auto_models_embeddings(client, by_auto_model):
    texts = ["a red panda", "ein Text, länger als der andere", "/etc/passwd"]
    expected = by_auto_model(*texts)
    for encoding_format in (openai.omit, "float", "base64"):
        answer = client.embeddings.create(model="tiny", input=texts, encoding_format=encoding_format)
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        read = [entry.embedding for entry in answer.data]
        read = [np.frombuffer(base64.b64decode(one), "<f4") if isinstance(one, str) else one for one in read]
        np.testing.assert_allclose(read, expected, **CLOSE)
    one = client.embeddings.create(model="tiny", input=texts[0]).data[0].embedding
    np.testing.assert_allclose(one, expected[0], **CLOSE)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_parts_of_text_and_picture_are_one_item(client, by_auto_model):
    picture = png(3)
    parts = [{"type": "text", "text": "a stone"}, {"type": "image_url", "image_url": {"url": data_url(picture)}}]
    expected = by_auto_model({"content": "a stone", "image": picture}, "a stone")
    (one,) = client.embeddings.create(model="tiny", input=parts).data
    several = client.embeddings.create(model="tiny", input=[parts, "a stone"]).data
    np.testing.assert_allclose(one.embedding, expected[0], **CLOSE)
    np.testing.assert_allclose([entry.embedding for entry in several], expected, **CLOSE)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_dimensions_are_sentence_transformers_truncation(client, tiny_model_folder):
    model = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True, device="cpu")
    expected = model.encode(["a text"], truncate_dim=8, normalize_embeddings=True)
    answer = client.embeddings.create(model="tiny", input="a text", dimensions=8)
    np.testing.assert_allclose(answer.data[0].embedding, expected[0], rtol=0, atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="999 of 24 dimensions"):
        client.embeddings.create(model="tiny", input="a text", dimensions=999)


def test_usage_is_the_tokens_that_the_model_reads(server, client, tiny_model_folder):
    processor = AutoProcessor.from_pretrained(tiny_model_folder, trust_remote_code=True)
    tokens = [len(processor([item])["input_ids"][0]) for item in ("short", "a longer one", ITEMS[1])]
    assert client.embeddings.create(model="tiny", input=["short", "a longer one"]).usage.prompt_tokens == sum(
        tokens[:2]
    )
    usage = httpx.post(f"{server.url}/embed", json=body_of(ITEMS[1])).json()["usage"]
    assert usage == {"prompt_tokens": tokens[2], "total_tokens": tokens[2]}


def test_items_as_dicts(server, tiny_model_folder, by_auto_model):
    answer = httpx.post(f"{server.url}/embed", json={**body_of(*ITEMS[4:7]), "visual": True})
    np.testing.assert_allclose(read_vectors(answer), by_auto_model(*ITEMS[4:7]), **CLOSE)
    data = answer.json()["data"]
    assert [entry["item_id"] for entry in data] == ["n4", "n5", "n6"]
    assert data[1]["visual_embedding"] is None  # n5 has no picture
    model = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True, device="cpu")
    expected = model.encode([ITEMS[4]], output="visual")[0]
    np.testing.assert_allclose(data[0]["visual_embedding"], expected, rtol=0, atol=1e-5)


def test_search_by_id_and_by_item_is_the_indexs(server, index):
    loaded = Index.load(index)
    (expected,) = loaded.search(["n3"], 5)
    answer = httpx.post(f"{server.url}/search", json={"id": "n3", "k": 5}).json()["results"]
    assert [(near["item_id"], near["title"]) for near in answer] == [(near.item_id, near.title) for near in expected]
    by_item = httpx.post(f"{server.url}/search", json={"item": as_json(ITEMS[3]), "k": 6}).json()["results"]
    assert by_item[0]["item_id"] == "n3" and by_item[0]["score"] == pytest.approx(1, abs=1e-5)
    assert [near["item_id"] for near in by_item[1:]] == [near.item_id for near in expected]
    unknown = error_of(httpx.post(f"{server.url}/search", json={"id": "nowhere"}), 404)
    assert "nowhere" in unknown["message"] and unknown["param"] == "id"
    assert "either id or item" in error_of(httpx.post(f"{server.url}/search", json={"k": 5}), 400)["message"]


def test_64_clients_at_once_get_what_auto_model_gives(server, by_auto_model):
    before = server.metric("batch_items_count")

    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as http:
            return await asyncio.gather(*(http.post("/embed", json=body_of(item)) for item in ITEMS))

    answers = asyncio.run(ask_all())
    np.testing.assert_allclose(np.concatenate(list(map(read_vectors, answers))), by_auto_model(*ITEMS), **CLOSE)
    assert server.metric("batch_items_count") - before < len(ITEMS) / 2, "requests were not joined"
    assert server.metric("queue_items") == 0


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


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def post_quietly(running: Running) -> httpx.Response | None:
    """An answer; None where the connection was refused or cut."""
    try:
        return httpx.post(f"{running.url}/embed", json=body_of(ITEMS[1]), headers={"Authorization": f"Bearer {KEY}"})
    except httpx.TransportError:
        return None


def test_the_key_a_stop_and_a_kill_under_load(tiny_model_folder, by_auto_model):
    with serving(tiny_model_folder, "--wait_ms", 1000, NOTELLM2_API_KEY=KEY) as running:
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": KEY}):
            for route in ("/embed", "/v1/embeddings", "/search"):
                answer = httpx.post(running.url + route, json=body_of(ITEMS[1]), headers=headers)
                assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert httpx.get(f"{running.url}/metrics", headers=headers).status_code == 401
        assert httpx.get(f"{running.url}/health").json()["status"] == "ok"
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(post_quietly, running) for _ in range(8)]
            with_key = {"Authorization": f"Bearer {KEY}"}
            metrics = f"{running.url}/metrics"
            wait_for(lambda: "notellm2_queue_items 8.0" in httpx.get(metrics, headers=with_key).text)
            running.process.send_signal(signal.SIGTERM)
            expected = by_auto_model(ITEMS[1])
            for answer in answers:
                np.testing.assert_allclose(read_vectors(answer.result()), expected, **CLOSE)
        assert running.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/health")
        port = running.address[1]
    with serving(tiny_model_folder, "--port", port, NOTELLM2_API_KEY=KEY) as running, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post_quietly, running) for _ in range(100)]
        assert answers[0].result() is not None
        running.process.kill()
        assert None in [answer.result() for answer in answers]
        with socket.create_server(("127.0.0.1", port)):  # is free again
            pass


def test_a_port_that_cant_be_had_is_one_line(tiny_model_folder, monkeypatch):
    def line_of(*options: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["--model", str(tiny_model_folder), *map(str, options)])
        return str(ended.value)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert line_of("--port", port) == (
            f"hub/serve.py: Port {port} at 127.0.0.1: another program listens there: end it, or choose another --port "
            "(0: a free one)."
        )
    assert "Port 0 at 192.0.2.1: this machine has no such address" in line_of("--host", "192.0.2.1", "--port", 0)
    assert "Host 'no.such.invalid' is unknown" in line_of("--host", "no.such.invalid", "--port", 0)

    def load_while_another_listens(arguments: ServeArguments):
        others.append(socket.create_server(("127.0.0.1", arguments.port)))
        return load(arguments)

    others: list[socket.socket] = []
    load = load_service
    monkeypatch.setattr("hub.serve.load_service", load_while_another_listens)
    assert f"Port {port} at 127.0.0.1: another program listens there" in line_of("--port", port)
    others[0].close()


def test_options_that_dont_go_together_are_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--queue_items", "10", "--max_items", "11"])
    assert ended.value.code == 2 and "--max_items 11" in capsys.readouterr().err


def test_an_index_of_another_model_is_refused(index, tmp_path):
    model, processor = make_model(embedding_dim=16)
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the model of this index"):
        load_service(ServeArguments(model=str(tmp_path / "other"), index=str(index)))
