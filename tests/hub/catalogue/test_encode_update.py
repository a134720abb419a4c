"""A new version of a catalogue: what is unchanged keeps its vector, the rest is encoded, and the older one stays until then."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hub.catalogue.encoder import ItemEncoder
from hub.catalogue.shards import REJECTS, ShardError
from hub.encode import EncodeArguments, encode, main
from tests.support.catalogue import arguments, make_items, png, read_shards, vectors, write_items


@pytest.fixture
def encoded_ids(monkeypatch) -> list[str]:
    """Ids of the items that go through a model, in this process."""
    ids: list[str] = []
    embed = ItemEncoder.embed

    def listed(self, block):
        ids.extend(place.item_id for place in block.places)
        return embed(self, block)

    monkeypatch.setattr(ItemEncoder, "embed", listed)
    return ids


def update(job: EncodeArguments, items: list[dict], path: Path) -> dict:
    write_items(items, path)
    return encode(replace(job, update=True))


def assert_as_from_scratch(job: EncodeArguments, place: Path) -> None:
    """Same items and rejects in the same order, same vectors but for rounding: batches were others."""
    shutil.rmtree(place, ignore_errors=True)
    encode(replace(job, output=str(place), update=False))
    ours, fresh = read_shards(Path(job.output)), read_shards(place)
    for column in ("item_id", "content_hash", "has_image"):
        assert ours.column(column) == fresh.column(column), column
    for column in ("embedding", "visual_embedding"):
        np.testing.assert_allclose(vectors(ours, column), vectors(fresh, column), atol=1e-6)
    assert pq.read_table(Path(job.output) / REJECTS) == pq.read_table(place / REJECTS)


def test_any_sequence_of_updates_ends_as_encoding_from_scratch(tiny_model_folder, tmp_path, encoded_ids):
    """New, changed, gone, moved, broken and mended items; only what changed goes through the model."""
    chance = random.Random(3)
    items, table = make_items(60), tmp_path / "items.parquet"
    for item in items:
        item["image"] = [item["image"]] if item["image"] else []
    items[8]["image"] = [png(1), b"no picture"]  # encoded by what can be read, and listed each time
    job = arguments(tiny_model_folder, table, tmp_path / "out", visual=True)
    update(job, items, table)  # the first time: all of it
    assert len(encoded_ids) == 60
    mended: set[str] = set()
    for number in range(4):
        expected = {items[8]["item_id"], *mended}
        for item in chance.sample(items[9:], 3):
            item["title"] = f"title of version {number}"
            expected.add(item["item_id"])
        for item in chance.sample(items[9:], 2):
            item["image"] = [png(100 + chance.randrange(1000))]
            expected.add(item["item_id"])
        broken = chance.choice(items[9:])
        before, broken["image"] = broken["image"], [b"broken"]
        new = {**make_items(1)[0], "item_id": f"new{number}", "image": []}
        gone = items.pop(
            next(
                at for at, item in enumerate(items) if at > 8 and item["item_id"] not in expected and item is not broken
            )
        )
        items.insert(9, new)
        tail = items[9:]
        chance.shuffle(tail)
        items[9:] = tail
        expected = (expected | {new["item_id"]}) - {broken["item_id"], gone["item_id"]}
        encoded_ids.clear()

        manifest = update(job, items, table)

        assert set(encoded_ids) == expected
        assert manifest["counts"]["copied"] == manifest["counts"]["items"] - len(expected)
        assert manifest["counts"]["rejects"] == 2
        assert_as_from_scratch(job, tmp_path / "fresh")
        assert not list(tmp_path.glob(".out*"))
        broken["image"], mended = before, {broken["item_id"]}
    update(job, items, table)  # the last one is mended; then nothing changes
    encoded_ids.clear()
    update(job, items, table)
    assert encoded_ids == [items[8]["item_id"]]
    assert_as_from_scratch(job, tmp_path / "fresh")


def test_a_picture_that_changes_at_its_path_is_encoded_again(tiny_model_folder, tmp_path, encoded_ids):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png(1))
    (tmp_path / "c.png").write_bytes(png(2))
    items = [{"item_id": name, "image": f"{name}.png"} for name in ("a", "b", "c")]
    job = arguments(tiny_model_folder, tmp_path / "items.parquet", tmp_path / "out")
    update(job, items, tmp_path / "items.parquet")
    (tmp_path / "a.png").write_bytes(png(3))
    encoded_ids.clear()
    items = [
        items[0],
        {"item_id": "b", "image": "c.png"},
        {"item_id": "c", "image": "b.png"},
        {"item_id": "d", "image": "a.png"},
    ]
    update(job, items, tmp_path / "items.parquet")
    assert set(encoded_ids) == {"a", "b", "c", "d"}
    shutil.copy(tmp_path / "c.png", tmp_path / "copy.png")
    items[1]["image"] = "copy.png"  # the same picture elsewhere is the same content
    encoded_ids.clear()
    update(job, items, tmp_path / "items.parquet")
    assert encoded_ids == []
    (tmp_path / "b.png").write_bytes(png(4))  # and the same table another catalogue
    update(job, items, tmp_path / "items.parquet")
    assert encoded_ids == ["c"]


@pytest.mark.parametrize("embedding_type", ["float16", "int8"])
def test_smaller_types_are_copied_to_the_bit(tiny_model_folder, tmp_path, embedding_type, encoded_ids):
    items, table = make_items(20), tmp_path / "items.parquet"
    job = arguments(tiny_model_folder, table, tmp_path / "out", embedding_type=embedding_type)
    update(job, items, table)
    before = {row["item_id"]: row for row in read_shards(tmp_path / "out").to_pylist()}
    encoded_ids.clear()
    update(job, items[::-1], table)
    after = {row["item_id"]: row for row in read_shards(tmp_path / "out").to_pylist()}
    assert after == before and encoded_ids == []


def test_what_makes_all_of_it_new_is_said(tiny_model_folder, tmp_path, capsys, encoded_ids):
    items, table = make_items(12), tmp_path / "items.parquet"
    job = arguments(tiny_model_folder, table, tmp_path / "out")
    update(job, items, table)
    other = tmp_path / "model"
    shutil.copytree(tiny_model_folder, other)
    config = (other / "processor_config.json").read_text()
    (other / "processor_config.json").write_text(config + "\n")
    cases = [
        (replace(job, visual=True), "--visual was False"),
        (replace(job, visual=True, model=str(other)), "the model is another"),
    ]
    for changed, reason in cases:
        encoded_ids.clear()
        update(changed, items, table)
        assert f"all items are encoded anew, as {reason}." in capsys.readouterr().out
        assert len(encoded_ids) == 12
    path = next((tmp_path / "out").glob("shard-*"))
    path.write_bytes(path.read_bytes()[:-1])
    update(cases[-1][0], items[:-1], table)
    assert "shard-00000.parquet has changed" in capsys.readouterr().out
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ShardError, match=r"notes\.txt is not of this command and would be lost"):
        update(cases[-1][0], items, table)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_the_command_says_what_was_copied(tiny_model_folder, tmp_path, capsys):
    table = write_items(make_items(20), tmp_path / "items.parquet")
    options = ["--model", str(tiny_model_folder), "--items", str(table), "--output", str(tmp_path / "out"), "--update"]
    options += ["--device", "cpu", "--num_workers", "0"]
    assert main(options) in (0, None)
    write_items(make_items(23), table)
    main(options)
    assert "20 unchanged items kept their vectors, 3 were encoded" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_update_leaves_the_older_version_and_goes_on(processes, tiny_model_folder, tmp_path):
    items, table = make_items(90), tmp_path / "items.parquet"
    job = arguments(tiny_model_folder, write_items(items, table), tmp_path / "out", visual=True)
    encode(job)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for number in range(0, 90, 3):
        items[number]["title"] = "changed"
    write_items(items, table)
    beside = tmp_path / ".out.update"
    child = processes.Process(target=encode, args=(replace(job, update=True),))
    child.start()
    while child.is_alive() and len(list(beside.glob("shard-*.parquet"))) < 2:
        pass
    child.kill()
    child.join()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    done = {path.name: path.stat().st_mtime_ns for path in beside.glob("shard-*.parquet")}
    assert 2 <= len(done) < 6
    encode(replace(job, update=True))
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*.parquet")}
    assert done.items() <= there.items()
    assert_as_from_scratch(job, tmp_path / "fresh")
    assert not beside.exists()
