"""A catalogue whose pictures, or whose table, lie elsewhere, from the command to its shards."""

import datasets
import numpy as np
import pytest

from hub.catalogue.shards import ShardError, read_rejects
from hub.encode import encode
from tests.support.catalogue import arguments, make_items, png, read_shards, write_items
from tests.support.web_server import WebServer
from training.tables.remote import fetching, pictures


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(fetching, "PAUSE", 0.01)
    pictures._failed.clear()


@pytest.fixture
def web():
    with WebServer() as server:
        yield server


@pytest.fixture
def here(tiny_model_folder, tmp_path):
    """What pictures in the table itself give."""
    output = tmp_path / "here"
    encode(arguments(tiny_model_folder, write_items(make_items(15), tmp_path / "here.parquet"), output, visual=True))
    return read_shards(output).to_pylist()


def elsewhere(web: WebServer) -> list[dict]:
    """The same items, their pictures at addresses; that of n7 answers badly twice, that of n8 is gone."""
    items = make_items(15)
    for number, item in enumerate(items):
        if item["image"] is not None:
            web.answers[f"/{number}.png"] = (200, item["image"])
            item["image"] = f"{web.url}/{number}.png"
    web.answers["/7.png"] = [500, 503, (200, png(7))]
    web.answers["/8.png"] = 404
    return items


def columns(shards: list[dict]) -> dict[str, tuple]:
    return {row["item_id"]: (row["embedding"], row["visual_embedding"], row["has_image"]) for row in shards}


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_elsewhere_give_what_pictures_here_give(web, here, tiny_model_folder, tmp_path, workers):
    table = write_items(elsewhere(web), tmp_path / "items.parquet")
    output = tmp_path / "output"
    job = arguments(tiny_model_folder, table, output, visual=True, num_workers=workers, allow_remote=web.host)
    manifest = encode(job)
    assert (manifest["counts"]["items"], manifest["counts"]["rejects"]) == (14, 1)
    assert [(reject.ids, reject.row, reject.reason) for reject in read_rejects(output, 9)] == [
        (["n8"], 8, f"image {web.url}/8.png answered 404")
    ]
    found, expected = columns(read_shards(output).to_pylist()), columns(here)
    assert found.keys() == expected.keys() - {"n8"} and sum(has_image for *_, has_image in found.values()) == 11
    for item_id, (embedding, visual, has_image) in found.items():
        np.testing.assert_allclose(embedding, expected[item_id][0], atol=2e-6)
        np.testing.assert_allclose(visual, expected[item_id][1], atol=2e-6)
        assert has_image == expected[item_id][2]

    asked = len(web.asked)
    pictures._failed.clear()
    web.answers["/8.png"] = (200, png(8))
    updated = encode(arguments(tiny_model_folder, table, output, visual=True, allow_remote=web.host, update=True))
    assert updated["counts"]["copied"] == 14 and updated["counts"]["items"] == 15
    assert web.asked[asked:] == ["/8.png"]


def test_without_the_option_nothing_is_asked_and_all_pictures_are_rejects(web, tiny_model_folder, tmp_path):
    table = write_items(elsewhere(web), tmp_path / "items.parquet")
    manifest = encode(arguments(tiny_model_folder, table, tmp_path / "output"))
    assert manifest["counts"]["rejects"] == 12 and not web.asked
    assert all("--allow_remote" in reject.reason for reject in read_rejects(tmp_path / "output", 12))
    with pytest.raises(ShardError, match="allow_remote was None, now"):
        encode(arguments(tiny_model_folder, table, tmp_path / "output", allow_remote=web.host))


def test_the_table_itself_may_lie_elsewhere(web, here, tiny_model_folder, tmp_path):
    path = write_items(make_items(15), tmp_path / "items.parquet")
    web.answers["/data/items.parquet"] = (200, path.read_bytes())
    address = f"{web.url}/data/items.parquet"
    job = arguments(tiny_model_folder, "unused", tmp_path / "output", visual=True, allow_remote=web.host)
    job.items = address
    manifest = encode(job)
    assert manifest["job"]["table"]["source"] == address
    for item_id, (embedding, *_) in columns(read_shards(tmp_path / "output").to_pylist()).items():
        np.testing.assert_array_equal(embedding, columns(here)[item_id][0])
