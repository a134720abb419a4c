"""The server as its clients meet it: a real process, OpenAI's own client, many clients at once, a stop and a kill."""

import asyncio
import base64
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from sentence_transformers import SentenceTransformer
from transformers import AutoProcessor

from hub.index import Index
from hub.serve import ServeArguments, load_service, main
from tests.support.catalogue import png
from tests.support.models import make_model
from tests.support.server import Running, data_url, serving
from tests.support.serving import SERVED_ITEMS as ITEMS
from tests.support.serving import as_json, body_of, error_of, read_vectors, wait_for


KEY = "a key"
CLOSE = {"rtol": 0, "atol": 2e-6}


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
