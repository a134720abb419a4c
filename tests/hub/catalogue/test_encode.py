"""A catalogue becomes shards: the model's own embeddings, each item once whatever happens, and every bad row listed."""

import csv
import functools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from hub.catalogue import encoding as encode_module
from hub.catalogue.encoder import ItemEncoder, items_between
from hub.catalogue.shards import MANIFEST, REJECTS, ShardError
from hub.encode import encode, main
from modeling_notellm2 import Precision
from tests.support.catalogue import (
    SMALL,
    arguments,
    checksums,
    make_items,
    messy_rows,
    read_shards,
    vectors,
    write_items,
)
from training.tables.items import TableError, load_items


@pytest.fixture(scope="module")
def items() -> list[dict]:
    return make_items(70)


@pytest.fixture(scope="module")
def expected(items, tiny_model_folder):
    """What the model itself gives, all items in one batch."""
    model = AutoModel.from_pretrained(tiny_model_folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tiny_model_folder, trust_remote_code=True)
    with torch.no_grad():
        return model(**processor(items, return_tensors="pt"))


@pytest.fixture(scope="module")
def encoded(table, tiny_model_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("encoded") / "shards"
    encode(arguments(tiny_model_folder, table, output, visual=True, num_workers=2))
    return output


def test_shards_hold_the_models_embeddings_in_table_order(items, encoded, expected):
    shards = read_shards(encoded)
    assert shards.column("item_id").to_pylist() == [item["item_id"] for item in items]
    assert shards.schema.field("embedding").type == pa.list_(pa.float32(), 24)
    assert np.abs(vectors(shards) - expected.embeddings.numpy()).max() < 1e-5
    assert np.abs(vectors(shards, "visual_embedding") - expected.visual_embeddings.numpy()).max() < 1e-5
    assert shards.column("has_image").to_pylist() == [item["image"] is not None for item in items]


def test_manifest_says_what_was_done(items, encoded, tiny_model_folder):
    manifest = json.loads((encoded / MANIFEST).read_text())
    assert manifest["counts"] == {"rows": 70, "items": 70, "rejects": 0, "copied": 0, "empty_lines": 0}
    assert [shard["items"] for shard in manifest["shards"].values()] == [16, 16, 16, 16, 6]
    assert manifest["job"]["settings"]["visual"] is True
    assert "model.safetensors" in manifest["job"]["model"]["files"]
    assert pq.read_table(encoded / REJECTS).num_rows == 0
    assert not list(encoded.glob(".*.partial"))


@pytest.mark.parametrize(("embedding_type", "error"), [("float16", 5e-4), ("int8", 0.5 / 127 + 1e-5)])
def test_smaller_types_round_and_no_more(embedding_type, error, table, tiny_model_folder, tmp_path, expected):
    manifest = encode(arguments(tiny_model_folder, table, tmp_path / "out", embedding_type=embedding_type))
    column = read_shards(tmp_path / "out").column("embedding")
    stored = np.array(column.to_pylist(), dtype=np.float32) / manifest["scale"]
    assert str(column.type.value_type) in (embedding_type, "halffloat")
    assert np.abs(stored - expected.embeddings.numpy()).max() < error


def test_weights_type(table, tiny_model_folder, tmp_path, expected):
    encode(arguments(tiny_model_folder, table, tmp_path / "out", dtype="bfloat16"))
    similarity = (vectors(read_shards(tmp_path / "out")) * expected.embeddings.numpy()).sum(1)
    assert 0.98 < similarity.min() < 0.999999


@pytest.mark.slow
def test_compiled_model(items, tiny_model_folder, tmp_path, expected, monkeypatch):
    """Everything of torch.compile but the generation of machine code, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    chosen = [number for number in range(20) if number % 5]
    few = write_items([items[number] for number in chosen], tmp_path / "few.parquet")
    encode(arguments(tiny_model_folder, few, tmp_path / "out", compile=True))
    assert np.abs(vectors(read_shards(tmp_path / "out")) - expected.embeddings.numpy()[chosen]).max() < 1e-5


def forms_of_a_table(items: list[dict], folder: Path) -> dict[str, str]:
    """The same items as every kind of table that the command reads, images as files beside the text forms."""
    pictures = folder / "pictures"
    for item in items:
        if item["image"]:
            (pictures / "of").mkdir(parents=True, exist_ok=True)
            (pictures / "of" / f"{item['item_id']}.png").write_bytes(item["image"])
    rows = [{**item, "image": item["image"] and f"of/{item['item_id']}.png"} for item in items]
    with (pictures / "items.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "topics": ",".join(row["topics"])} for row in rows)
    lines = [json.dumps(row) for row in rows]
    (pictures / "items.jsonl").write_text("\n\n".join(lines) + "\n")
    shutil.copytree(pictures / "of", folder / "image_folder" / "train" / "of")
    named = [{("file_name" if key == "image" else key): value for key, value in row.items()} for row in rows]
    (folder / "image_folder" / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    (folder / "parts" / "b").mkdir(parents=True)
    write_items(items[:30], folder / "parts" / "a.parquet")
    write_items(items[30:], folder / "parts" / "b" / "c.parquet")
    dataset = datasets.Dataset.from_list(items).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": dataset.select(range(30)), "test": dataset.select(range(30, 70))}).save_to_disk(
        folder / "saved"
    )
    places = ("pictures/items.csv", "pictures/items.jsonl", "image_folder", "parts", "saved")
    return {place: str(folder / place) for place in places}


def test_every_kind_of_table_gives_the_same(items, encoded, tiny_model_folder, tmp_path):
    reference = vectors(read_shards(encoded))
    for place, source in forms_of_a_table(items, tmp_path).items():
        output = tmp_path / "out" / place.replace("/", "-")
        manifest = encode(arguments(tiny_model_folder, source, output))
        shards = read_shards(output)
        assert manifest["counts"]["rejects"] == 0, place
        assert shards.column("item_id").to_pylist() == [item["item_id"] for item in items], place
        assert np.abs(vectors(shards) - reference).max() < 1e-5, place
    assert len(load_items(str(tmp_path / "saved"), "test")[0]) == 40
    with pytest.raises(TableError, match="no split 'dev'; there are train, test"):
        load_items(str(tmp_path / "saved"), "dev")


def test_bad_rows_are_listed_and_their_neighbours_unharmed(messy, messy_encoded, tiny_model_folder, tmp_path):
    lines, bad = messy_rows()
    rejects = {row["row"]: row for row in pq.read_table(messy_encoded / REJECTS).to_pylist()}
    assert set(rejects) == set(bad)
    for line, (item_id, reason) in bad.items():
        assert rejects[line]["item_id"] == item_id
        assert rejects[line]["file"] == "items.jsonl"
        assert reason in rejects[line]["reason"]
        assert "row 0" not in rejects[line]["reason"]
    clean = [{"image": None, **json.loads(line)} for number, line in enumerate(lines) if number not in bad]
    clean.insert(6, {"item_id": "gone", "image": (messy.parent / "fine.png").read_bytes()})  # its other picture counts
    alone = write_items(clean, tmp_path / "clean.parquet")
    encode(arguments(tiny_model_folder, alone, tmp_path / "clean"))
    there, wanted = read_shards(messy_encoded), read_shards(tmp_path / "clean")
    assert there.column("item_id").to_pylist() == wanted.column("item_id").to_pylist()
    assert np.abs(vectors(there) - vectors(wanted)).max() < 1e-5
    assert json.loads((messy_encoded / MANIFEST).read_text())["counts"] == {
        "rows": 41,
        "items": 29,
        "rejects": 12,
        "copied": 0,
        "empty_lines": 1,
    }


def test_exit_codes_and_summary(messy, table, tiny_model_folder, tmp_path, monkeypatch, capsys):
    def run(items: Path, output: str, *more: str) -> tuple[int, str, str]:
        options = [f"--{key}={value}" for key, value in SMALL.items()]
        paths = ["--model", str(tiny_model_folder), "--items", str(items), "--output", str(tmp_path / output)]
        monkeypatch.setattr(sys, "argv", ["encode.py", *paths, *options, *more])
        try:
            return main(), *capsys.readouterr()
        except SystemExit as end:  # its text is what Python prints on stderr
            return 1, capsys.readouterr().out, str(end.code)

    code, out, _ = run(table, "all")
    precision = "Precision: float32 (asked for)\n"
    assert (code, out) == (0, f"{precision}{tmp_path / 'all'}: 70 items, 24 dimensions as float32, shards: 5\n")
    code, out, _ = run(messy, "some")
    assert code == 3
    assert "29 items" in out
    assert "12 of 41 rows left out" in out
    assert "items.jsonl, row 9, item_id 'cut': image can't be read" in out
    code, _, err = run(tmp_path / "none.csv", "no")
    assert code == 1
    assert "none.csv: no such table" in err
    hopeless = tmp_path / "hopeless.jsonl"
    hopeless.write_text('{"item_id": "a"}\n{"title": "b"}\n')
    code, _, err = run(hopeless, "hopeless")
    assert code == 1
    assert "none of 2 rows is usable; the first: neither text nor image" in err


def test_an_embedding_that_is_not_finite_is_a_reject(table, tiny_model_folder, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(tiny_model_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["late_fusion.projection.weight"][:] = float("nan")  # spoils items with an image alone
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    manifest = encode(arguments(broken, table, tmp_path / "out"))
    assert manifest["counts"]["items"] == 14
    rejects = pq.read_table(tmp_path / "out" / REJECTS).to_pylist()
    assert {row["reason"] for row in rejects} == {"the model's embedding is not finite in float32"}
    assert all(row["row"] % 5 for row in rejects)


def test_started_again_with_anything_else_is_refused(encoded, table, tiny_model_folder, tmp_path, items):
    output = tmp_path / "shards"
    shutil.copytree(encoded, output)
    before = checksums(output)
    right = arguments(tiny_model_folder, table, output, visual=True)
    with pytest.raises(ShardError, match="settings.batch_size was 4, now 5"):
        encode(replace(right, batch_size=5))
    changed = write_items(
        [{**item, "content": "other"} if item is items[9] else item for item in items], tmp_path / "t"
    )
    (tmp_path / "items.parquet").write_bytes(changed.read_bytes())
    with pytest.raises(ShardError, match="table.files.items.parquet was"):
        encode(replace(right, items=str(tmp_path / "items.parquet")))
    other = tmp_path / "model"
    shutil.copytree(tiny_model_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShardError, match="model.files.model.safetensors was"):
        encode(replace(right, model=str(other)))
    assert checksums(output) == before
    with pytest.raises(ShardError, match="is no folder of this command"):
        encode(replace(right, output=str(tmp_path)))
    with pytest.raises(ValueError, match="multiple of rows_per_block"):
        encode(replace(right, rows_per_shard=20))


def test_a_finished_job_mends_its_shards(encoded, table, tiny_model_folder, tmp_path):
    output = tmp_path / "shards"
    shutil.copytree(encoded, output)
    before = checksums(output)
    (output / "shard-00001.parquet").unlink()
    (output / "shard-00003.parquet").write_bytes((output / "shard-00000.parquet").read_bytes())
    encode(arguments(tiny_model_folder, table, output, visual=True))
    assert checksums(output) == before


def test_batches_hold_items_of_like_length(table, tiny_model_folder):
    encoder = ItemEncoder(str(tiny_model_folder), batch_size=8)
    block = encoder.prepare(0, items_between(load_items(str(table))[0], 0, 64))
    assert sorted(block.order) == list(range(64))
    with_image = [count > 0 for count in block.num_images]
    assert with_image == sorted(with_image)
    for kind in (False, True):
        lengths = [len(ids) for ids, has in zip(block.input_ids, with_image, strict=True) if has is kind]
        assert lengths == sorted(lengths)


def test_auto_is_what_the_machine_has_and_another_machine_has_another_job(
    table, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    """Going on where bfloat16 is slow would mix two precisions in one catalogue: refused, with what to do."""

    def machine(name):
        monkeypatch.setattr(
            encode_module, "choose_precision", lambda dtype, device: Precision(name, f"{dtype} on {device}")
        )

    machine("bfloat16")
    job = arguments(tiny_model_folder, table, tmp_path / "out", dtype="auto")
    manifest = encode(job)
    assert capsys.readouterr().out.startswith("Precision: bfloat16 (auto on cpu)\n")
    assert manifest["job"]["settings"]["dtype"] == "bfloat16"
    assert manifest["made_with"]["precision"] == {"name": "bfloat16", "reason": "auto on cpu"}
    assert encode(job)["shards"] == manifest["shards"]
    machine("float32")
    with pytest.raises(ShardError, match=r"choose another --output.* settings.dtype was bfloat16, now float32"):
        encode(job)
