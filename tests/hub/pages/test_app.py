"""The app as its user meets it: the command starts it, a client and a real browser ask it."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import gradio_client
import numpy as np
import pytest
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Page

from hub.pages.app_page import EMPTY
from hub.pages.app_search import QueryError, open_search, positions_of_ids
from tests.support.browser import open_page
from tests.support.catalogue import make_items, read_shards, vectors, write_items
from training.tables.items import load_items


ROOT = Path(__file__).parents[3]
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    """Seventy items, one with a hostile title, and two rows that are left out: a repeated id, and nothing but an id."""
    items = make_items(70)
    items[0] |= {"title": HOSTILE}
    items[30:30] = [{**items[3]}, {"item_id": "nothing"}]
    return write_items(items, tmp_path_factory.mktemp("app") / "items.parquet")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def search(tiny_model_folder, catalogue, cache):
    return open_search(str(tiny_model_folder), str(catalogue), cache=str(cache))


@pytest.fixture(scope="module")
def stored(search, cache) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, multimodal and visual embeddings as the shards in the cache hold them."""
    (folder,) = cache.iterdir()
    table = read_shards(folder / "vectors")
    return table.column("item_id").to_pylist(), vectors(table), vectors(table, "visual_embedding")


@pytest.fixture(scope="module")
def server(search, tiny_model_folder, catalogue, cache, tmp_path_factory):
    """The command on a free port, over what `search` built."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "app.log"
    command = [sys.executable, "hub/app.py", "--model", tiny_model_folder, "--items", catalogue, "--cache", cache]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*map(str, command), "--port", str(port), "--device", "cpu"],
            cwd=ROOT,
            env={**os.environ, **OFFLINE},
            stdout=stream,
            stderr=stream,
        )
        try:
            deadline = time.monotonic() + 120
            while not _listens(port):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    return gradio_client.Client(server, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def picture(item: dict, folder: Path):
    path = folder / f"{item['item_id']}.png"
    path.write_bytes(item["image"])
    return gradio_client.handle_file(str(path))


def find(
    client, item_id="", image=None, title="", topics="", content="", use_image=True, use_text=True, weight=1.0, k=5
):
    """Ids that the app finds, its pictures, rows and status line."""
    gallery, table, status = client.predict(
        item_id, image, title, topics, content, use_image, use_text, weight, k, api_name="/find"
    )
    return [row[4] for row in table["data"]], gallery, table["data"], status


def best(scores: np.ndarray, ids: list[str], k: int, leave_out: str) -> list[str]:
    return [ids[at] for at in np.argsort(-scores, kind="stable") if ids[at] != leave_out][:k]


@pytest.mark.parametrize("weight", [1.0, 0.6, 0.0])
def test_neighbours_are_those_of_the_stored_vectors(client, stored, tmp_path, weight):
    ids, multimodal, visual = stored
    item = make_items(70)[13]
    at = ids.index("n13")
    scores = weight * multimodal @ multimodal[at] + (1 - weight) * visual @ visual[at]
    text = {"title": item["title"], "topics": ",".join(item["topics"]), "content": item["content"]}
    found, gallery, rows, status = find(client, "n13", picture(item, tmp_path), **text, weight=weight)
    assert found == best(scores, ids, 5, "n13")
    assert [float(row[1]) for row in rows] == pytest.approx([scores[ids.index(one)] for one in found], abs=2e-4)
    assert len(gallery) == 5 and f"{weight:.2f} x multimodal" in status


def test_switches_take_a_modality_from_the_query(client, search, tmp_path):
    item = make_items(70)[13]
    own = {"image": picture(item, tmp_path), "title": item["title"], "content": item["content"]}
    both, *_ = find(client, **own)
    image, *_, said = find(client, **own, use_text=False)
    text, _, rows, told = find(client, **own, use_image=False, weight=0.3)
    assert len({tuple(both), tuple(image), tuple(text)}) == 3
    assert "by picture:" in said and "by text;" in told
    for alone, found in (
        ({"image": item["image"]}, image),
        ({"title": item["title"], "content": item["content"]}, text),
    ):
        assert found == [hit.item_id for hit in search.search(search.embed(alone), 1.0, 5)]
    assert all(row[3] == "" for row in rows)  # no visual similarity without a picture


def test_an_item_of_the_catalogue_fills_the_form(client, tmp_path):
    image, title, topics, content, note = client.predict("n4", api_name="/load")
    item = make_items(70)[4]
    assert (title, topics, content, note) == (item["title"], ", ".join(item["topics"]), item["content"], "")
    pixels = np.asarray(Image.open(image if isinstance(image, str) else image["path"]).convert("RGB"))
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(item["image"]))))
    assert client.predict("n10", api_name="/load")[0] is None  # an item without a picture
    assert "no item 'elsewhere'" in client.predict("elsewhere", api_name="/load")[4]
    assert "Type an item's id" in client.predict(" ", api_name="/load")[4]


def test_what_cannot_be_searched_with_gets_a_friendly_line(client, search):
    for empty in ({}, {"title": " \n"}, {"title": "a", "use_text": False}):
        found, gallery, _, status = find(client, **empty)
        assert (found, gallery, status) == ([], [], EMPTY)
    with pytest.raises(QueryError, match="image"):
        search.embed({"image": b"no picture"})
    with pytest.raises(AppError, match="maximum"):
        find(client, title="tree", k=10_000)


def test_hostile_text_stays_text(server, client, browser, stored):
    found, gallery, *_ = find(client, title=HOSTILE, k=60)
    assert "n0" in found and any(HOSTILE[:80] in one["caption"] for one in gallery)
    ids, multimodal, _ = stored
    beside = next(one for one in ids if "n0" in best(multimodal @ multimodal[ids.index(one)], ids, 12, one))
    shown = open_item(browser, server, beside)
    assert HOSTILE[:40] in shown  # as text
    assert browser.evaluate("document.title") == "Related items"
    assert not browser.evaluate("document.querySelector('img[src=x]')")


@pytest.fixture(scope="module")
def browser():
    with open_page() as page:
        yield page


STATUS = "document.querySelector('#status textarea')?.value"
CAPTIONS = "[...document.querySelectorAll('#neighbours .caption-label')].map(one => one.innerText)"
PICTURES = "[...document.querySelectorAll('#neighbours img')]"


def open_item(browser: Page, server: str, item_id: str) -> str:
    """Opens the app with an item and waits for its neighbours; their captions."""
    browser.goto(f"{server}/?item={item_id}")
    browser.wait_for_function(
        f"{STATUS}?.includes('compared by') && {PICTURES}.length == 12 && {PICTURES}.every(one => one.naturalWidth)"
    )
    return "\n".join(browser.evaluate(CAPTIONS))


def test_the_page_shows_neighbours_in_a_real_browser(server, browser, search, tmp_path):
    shown = open_item(browser, server, "n13")
    item = search.item("n13")
    del item["item_id"]
    hits = search.search(search.embed(item), 1.0, 12, leave_out="n13")
    names = [make_items(70)[int(hit.item_id[1:])] for hit in hits]
    lines = [f"{hit.score:.3f} {one['title'] or one['content']}" for hit, one in zip(hits, names, strict=True)]
    assert [line.replace("  ", " ") for line in shown.splitlines()] == lines
    browser.screenshot(path=tmp_path / "page.png")
    assert len(set(Image.open(tmp_path / "page.png").convert("RGB").resize((70, 65)).get_flattened_data())) > 100

    browser.evaluate("document.querySelector('#use_text input').click()")
    browser.wait_for_function(f"{STATUS}.includes('by picture:')")
    browser.wait_for_function(f"{CAPTIONS}.join() != {json.dumps(','.join(shown.splitlines()))}")
    browser.evaluate("document.querySelector('#use_image input').click()")
    browser.wait_for_function(f"{STATUS} == {json.dumps(EMPTY)} && {PICTURES}.length == 0")

    browser.evaluate("document.querySelectorAll('#samples button.thumbnail-item')[3].click()")
    browser.wait_for_function(
        f"document.querySelector('#item_id textarea').value == {json.dumps(search.sample(24)[3])}"
    )


def test_a_second_start_builds_nothing_and_another_index_is_refused(
    search, tiny_model_folder, catalogue, cache, tmp_path
):
    (folder,) = cache.iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = open_search(str(tiny_model_folder), str(catalogue), cache=str(cache))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert np.array_equal(again.positions, search.positions)

    index = str(folder / "index")
    with pytest.raises(ValueError, match="expected visual_embeddings"):
        open_search(str(tiny_model_folder), str(catalogue), index, index)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"item_id": f"n{n}", "title": "x"}) + "\n" for n in range(5)))
    with pytest.raises(ValueError, match="not where it should be"):
        positions_of_ids(search.index.ids["item_id"], load_items(str(other))[0])


def test_without_a_visual_index_the_multimodal_one_is_searched(search, tiny_model_folder, catalogue, cache):
    (folder,) = cache.iterdir()
    plain = open_search(str(tiny_model_folder), str(catalogue), str(folder / "index"))
    item = {"image": make_items(70)[13]["image"], "title": "lamp"}
    assert plain.embed(item).visual is None
    hits = plain.search(plain.embed(item), 0.2, 5)
    assert [hit.item_id for hit in hits] == [hit.item_id for hit in search.search(search.embed(item), 1.0, 5)]


def test_large_catalogues_rescore_the_nearest_by_either_embedding(search, monkeypatch):
    query = search.embed({"image": make_items(70)[13]["image"], "title": "lamp"})
    whole = search.search(query, 0.5, 3)
    monkeypatch.setattr("hub.pages.app_search.COMPARE_ALL", 10)
    monkeypatch.setattr("hub.pages.app_search.CANDIDATES", 20)
    part = search.search(query, 0.5, 3)
    exact = {hit.item_id: hit for hit in search.search(query, 0.5, 60)}
    assert len(part) == 3 and {hit.item_id for hit in part} <= exact.keys()
    for hit, other in [(whole[0], part[0]), *((hit, exact[hit.item_id]) for hit in part)]:
        assert hit.item_id == other.item_id
        # A product of other shapes rounds another way.
        scores = [(each.score, each.multimodal, each.visual) for each in (hit, other)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-6)


def test_a_mistake_ends_with_its_message(tmp_path):
    done = subprocess.run(
        [sys.executable, "hub/app.py", "--items", tmp_path / "none.parquet", "--model", tmp_path],
        cwd=ROOT,
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "no such table" in done.stderr and "Traceback" not in done.stderr
