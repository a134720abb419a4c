"""A catalogue becomes shards: the model's own embeddings, each item once whatever happens, and every bad row listed."""

import csv
import functools
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from hub import encode as encode_module
from hub.encode import EncodeArguments, encode
from hub.encoder import ItemEncoder
from hub.item_tables import ItemTable, TableError, open_items
from hub.shards import MANIFEST, REJECTS, ShardError


SMALL = {"batch_size": 4, "rows_per_block": 8, "rows_per_shard": 16, "num_workers": 0, "device": "cpu"}


def png(number: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + number % 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def make_items(count: int) -> list[dict]:
    """Items of all shapes: with and without picture, texts of many lengths."""
    words = ["tree", "river", "stone", "lamp", "paper", "glass", "cloud", "wheel"]
    return [
        {
            "item_id": f"n{number}",
            "title": words[number % 8] if number % 3 else None,
            "topics": words[: number % 4],
            "content": " ".join(words[: 1 + number % 8]) + str(number),
            "image": png(number) if number % 5 else None,
        }
        for number in range(count)
    ]


def arguments(model: Path, items: Path, output: Path, **options) -> EncodeArguments:
    return EncodeArguments(str(model), str(items), str(output), **{**SMALL, **options})


def write_items(items: list[dict], path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(items), path, row_group_size=13)
    return path


def read_shards(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("shard-*.parquet")))


def vectors(table: pa.Table, column: str = "embedding") -> np.ndarray:
    return np.array(table.column(column).to_pylist(), dtype=np.float32)


def checksums(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["complete"]
    return {name: shard["sha256"] for name, shard in manifest["shards"].items()}


@pytest.fixture(scope="module")
def items() -> list[dict]:
    return make_items(70)


@pytest.fixture(scope="module")
def table(items, tmp_path_factory) -> Path:
    return write_items(items, tmp_path_factory.mktemp("table") / "items.parquet")


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
    assert manifest["counts"] == {"rows": 70, "items": 70, "rejects": 0, "empty_lines": 0}
    assert [shard["items"] for shard in manifest["shards"].values()] == [16, 16, 16, 16, 6]
    assert manifest["job"]["settings"]["visual"] is True
    assert "model.safetensors" in manifest["job"]["model"]["files"]
    assert pq.read_table(encoded / REJECTS).num_rows == 0
    assert not list(encoded.glob("*.tmp")) + list(encoded.glob(".*.tmp"))


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
    assert len(open_items(str(tmp_path / "saved"), split="test")) == 40
    with pytest.raises(TableError, match="no split 'dev'; there are train, test"):
        open_items(str(tmp_path / "saved"), split="dev")


def messy_rows() -> tuple[list[str], dict[int, tuple[str, str]]]:
    """JSON lines with every kind of fault, and for each faulty line its id and a part of its reason."""
    good = make_items(40)
    lines = [json.dumps({key: value for key, value in item.items() if key != "image"}) for item in good]
    bad = {
        3: ("{broken", "", "Expecting property name"),
        4: ('{"item_id": "", "title": "no id"}', "", "item_id is missing"),
        7: ('{"title": "no id"}', "", "item_id is missing"),
        9: (json.dumps({"item_id": "cut", "image": "cut.png"}), "cut", "image can't be read"),
        10: (json.dumps({"item_id": "gone", "image": ["fine.png", "gone.png"]}), "gone", "gone.png does not exist"),
        11: (json.dumps({"item_id": "empty", "title": " \n", "topics": []}), "empty", "neither text nor image"),
        17: (json.dumps({"item_id": " n2 ", "title": "again"}), "n2", "item_id stands in an earlier row"),
        18: ('{"item_id": "topics", "topics": 5}', "", "topics must be text or a list of texts"),
        25: ('{"item_id": "half\\ud800", "title": "x"}', "half?", "item_id is not valid Unicode"),
        26: ('{"item_id": "half", "title": "x\\ud800"}', "half", ""),
        33: ('{"item_id": 5, "image": "", "image_file_name": ["a"]}', "5", "image"),
        38: ("[" * 100_000, "", "recursion"),
    }
    for line, (text, _, _) in bad.items():
        lines[line] = text
    return lines, {line: (item_id, reason) for line, (_, item_id, reason) in bad.items()}


@pytest.fixture(scope="module")
def messy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("messy")
    (folder / "fine.png").write_bytes(png(1))
    (folder / "cut.png").write_bytes(png(2)[:-300])
    lines, _ = messy_rows()
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder / "items.jsonl"


@pytest.fixture(scope="module")
def messy_encoded(messy, tiny_model_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("messy_encoded") / "shards"
    encode(arguments(tiny_model_folder, messy, output))
    return output


def test_bad_rows_are_listed_and_their_neighbours_unharmed(messy_encoded, encoded, tiny_model_folder, tmp_path):
    lines, bad = messy_rows()
    rejects = {row["row"]: row for row in pq.read_table(messy_encoded / REJECTS).to_pylist()}
    assert set(rejects) == set(bad)
    for line, (item_id, reason) in bad.items():
        assert rejects[line]["item_id"] == item_id
        assert rejects[line]["file"] == "items.jsonl"
        assert reason in rejects[line]["reason"]
        assert "row 0" not in rejects[line]["reason"]
    clean = [json.loads(line) for number, line in enumerate(lines) if number not in bad]
    alone = write_items(clean, tmp_path / "clean.parquet")
    encode(arguments(tiny_model_folder, alone, tmp_path / "clean"))
    there, wanted = read_shards(messy_encoded), read_shards(tmp_path / "clean")
    assert there.column("item_id").to_pylist() == wanted.column("item_id").to_pylist()
    assert np.abs(vectors(there) - vectors(wanted)).max() < 1e-5
    assert json.loads((messy_encoded / MANIFEST).read_text())["counts"] == {
        "rows": 41,
        "items": 28,
        "rejects": 12,
        "empty_lines": 1,
    }


def test_exit_codes_and_summary(messy, table, tiny_model_folder, tmp_path, monkeypatch, capsys):
    def run(items: Path, output: str, *more: str) -> tuple[int, str, str]:
        options = [f"--{key}={value}" for key, value in SMALL.items()]
        paths = ["--model", str(tiny_model_folder), "--items", str(items), "--output", str(tmp_path / output)]
        monkeypatch.setattr(sys, "argv", ["encode.py", *paths, *options, *more])
        return encode_module.main(), *capsys.readouterr()

    code, out, _ = run(table, "all")
    assert (code, out) == (0, f"{tmp_path / 'all'}: 70 items, 24 dimensions as float32, shards: 5\n")
    code, out, _ = run(messy, "some")
    assert code == 3
    assert "28 items" in out
    assert "12 of 41 rows left out" in out
    assert "items.jsonl, row 9, item_id 'cut': image can't be read" in out
    code, _, err = run(tmp_path / "none.csv", "no")
    assert code == 1
    assert "none.csv: no such table" in err
    hopeless = tmp_path / "hopeless.jsonl"
    hopeless.write_text('{"item_id": "a"}\n{"title": "b"}\n')
    code, _, err = run(hopeless, "hopeless")
    assert code == 1
    assert "none of 2 rows could be encoded; the first: neither text nor image" in err


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


def encode_in_child(job: EncodeArguments, renames: int | None) -> None:
    """The job, killed by itself right before a rename, the only act that makes a file appear."""
    done = 0
    rename = os.replace

    def counted(source, target):
        nonlocal done
        if done == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        rename(source, target)

    os.replace = counted
    encode(job)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hub.encode", "tests.test_encode"])
    return context


def check_what_a_kill_left(folder: Path, uninterrupted: dict[str, bytes]) -> int:
    """Each shard that is there is the whole one; returns their number."""
    there = list(folder.glob("shard-*.parquet"))
    for path in there:
        assert path.read_bytes() == uninterrupted[path.name]
    return len(there)


def run_child(processes, job: EncodeArguments, renames: int | None = None, seconds: float | None = None) -> int:
    """Exit code of the job in a process of its own, killed after so many renames or seconds if asked for."""
    child = processes.Process(target=encode_in_child, args=(job, renames))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    return child.exitcode


@pytest.mark.slow
def test_killed_at_random_moments_and_started_again(processes, tiny_model_folder, tmp_path):
    """The shards come out as if nothing had happened."""
    items = make_items(240)
    items[100]["image"], items[200]["item_id"] = b"broken", "n0"
    table = write_items(items, tmp_path / "items.parquet")
    job = arguments(tiny_model_folder, table, tmp_path / "killed", num_workers=1)
    whole = replace(job, output=str(tmp_path / "whole"))
    assert run_child(processes, replace(whole, output=str(tmp_path / "warm"))) == 0
    start = time.monotonic()
    assert run_child(processes, whole) == 0
    seconds = time.monotonic() - start
    uninterrupted = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.parquet")}

    moments = random.Random(7)
    codes, progress = [], []
    for _ in range(7):
        codes.append(run_child(processes, job, seconds=moments.uniform(0.1, 0.7) * seconds))
        progress.append(check_what_a_kill_left(tmp_path / "killed", uninterrupted))
    assert codes.count(-signal.SIGKILL) >= 4
    assert progress == sorted(progress)
    assert any(0 < shards < 15 for shards in progress)

    assert run_child(processes, job) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").glob("*.parquet")} == uninterrupted
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.tmp"))
    ids = read_shards(tmp_path / "killed").column("item_id").to_pylist()
    assert ids == [f"n{number}" for number in range(240) if number not in (100, 200)]


@pytest.mark.slow
def test_killed_right_before_each_rename(processes, messy_encoded, messy, tiny_model_folder, tmp_path):
    """The worst moments there are: what was written is whole, and not yet in its place."""
    uninterrupted = {path.name: path.read_bytes() for path in messy_encoded.glob("*.parquet")}
    job = arguments(tiny_model_folder, messy, tmp_path / "shards")
    progress = []
    for renames in (0, 1, 1, 1, 0, 1):  # manifest; a shard at each start; rejects.parquet; the complete manifest
        assert run_child(processes, job, renames) == -signal.SIGKILL
        assert list((tmp_path / "shards").glob(".*.tmp"))
        progress.append(check_what_a_kill_left(tmp_path / "shards", uninterrupted))
    assert progress == [0, 0, 1, 2, 2, 3]
    assert run_child(processes, job, renames=1) == -signal.SIGKILL
    assert run_child(processes, job) == 0
    assert checksums(tmp_path / "shards") == checksums(messy_encoded)
    assert (tmp_path / "shards" / REJECTS).read_bytes() == uninterrupted[REJECTS]


def test_two_jobs_do_not_share_a_folder(processes, table, tiny_model_folder, tmp_path):
    job = arguments(tiny_model_folder, table, tmp_path / "shared", rows_per_block=4, batch_size=1)
    first = processes.Process(target=encode_in_child, args=(job, None))
    first.start()
    while not (tmp_path / "shared" / "shard-00000.parquet").exists():
        assert first.is_alive()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ShardError, match="another process is encoding into this folder"):
            encode(job)
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0


@pytest.fixture
def local_ray():
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_ray_gives_the_same_shards(local_ray, messy, messy_encoded, tiny_model_folder, tmp_path):
    """And goes on where the other engine was stopped: the engine is no part of what the job is."""
    shutil.copytree(messy_encoded, tmp_path / "ray")
    (tmp_path / "ray" / "shard-00001.parquet").unlink()
    (tmp_path / "ray" / "shard-00002.parquet").unlink()
    (tmp_path / "ray" / REJECTS).unlink()
    job = arguments(tiny_model_folder, messy, tmp_path / "ray", engine="ray", num_workers=1)
    encode(job)
    assert checksums(tmp_path / "ray") == checksums(messy_encoded)
    assert (tmp_path / "ray" / REJECTS).read_bytes() == (messy_encoded / REJECTS).read_bytes()
    with pytest.raises(ValueError, match="The actors need 4 CPUs and Ray has 2"):
        encode(replace(job, output=str(tmp_path / "too_much"), ray_actors=3))


def test_rows_are_read_from_anywhere(tmp_path):
    """Any range of any table is that range of the whole, with lines that break inside quotes and small row groups."""
    items = [
        {"item_id": f"n{number}", "title": f'two "lines"\r\n{number}', "content": "x" * (number % 50)}
        for number in range(1000)
    ]
    with (tmp_path / "items.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(items[0]))
        writer.writeheader()
        writer.writerows(items)
    write_items(items[:400], tmp_path / "a.parquet")
    write_items(items[400:], tmp_path / "b.parquet")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    ranges = random.Random(0)
    for source in ("items.csv", "items.jsonl", "."):
        table = open_items(str(tmp_path / source))
        assert len(table) == 1000
        assert [row.raw["title"] for row in table.read(0, 1000)] == [item["title"] for item in items]
        for _ in range(30):
            start, stop = sorted(ranges.choices(range(1001), k=2))
            assert [row.raw["item_id"] for row in table.read(start, stop)] == [f"n{n}" for n in range(start, stop)]


def test_repeated_ids_are_found_anywhere_in_the_table(tmp_path):
    numbers = random.Random(1).choices(range(3000), k=3000)
    ids = [f"n{number}" if number % 11 else " " for number in numbers]
    write_items([{"item_id": item_id, "title": "x"} for item_id in ids[:1700]], tmp_path / "a.parquet")
    write_items([{"item_id": item_id, "title": "x"} for item_id in ids[1700:]], tmp_path / "b.parquet")
    table: ItemTable = open_items(str(tmp_path))
    seen: set[str] = set()
    for row in table.read(0, 3000):
        item_id = row.raw["item_id"].strip()
        assert row.repeated == (item_id in seen)
        seen |= {item_id} - {""}


def read_and_report(path: Path, report: Path) -> None:
    """Most bytes that Arrow held at once in this process while a hundred rows far behind were read."""
    table = open_items(str(path))
    assert sum(len(row.raw["image"]) for row in table.read(3000, 3100)) == 2_000_000
    report.write_text(str(pa.default_memory_pool().max_memory()))


def test_reading_a_large_row_group_takes_little_memory(processes, tmp_path):
    rows = [{"item_id": f"n{number}", "image": random.Random(number).randbytes(20_000)} for number in range(4000)]
    table = tmp_path / "items.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=4000, write_batch_size=64)
    child = processes.Process(target=read_and_report, args=(table, tmp_path / "report"))
    child.start()
    child.join()
    assert int((tmp_path / "report").read_text()) < 25e6 < table.stat().st_size / 3


def test_topics_of_csv_files(tmp_path, tiny_model_folder):
    """A JSON list or words with commas; a list that is broken is a reject, and so is a row with a field too few."""
    (tmp_path / "items.csv").write_text('item_id,topics\na,"x,y"\nb,"[""x"", ""y""]"\nc,"[""x"""\nd\n')
    encoder = ItemEncoder(str(tiny_model_folder))
    block = encoder.prepare(0, open_items(str(tmp_path / "items.csv")).read(0, 4))
    assert block.input_ids[0] == block.input_ids[1]
    assert [(reject.place.item_id, reject.place.row) for reject in block.rejects] == [("c", 2), ("", 3)]
    assert "unreadable topics" in block.rejects[0].reason
    assert "1 fields, but the header has 2" in block.rejects[1].reason


def test_a_table_that_is_none_is_refused(tmp_path):
    (tmp_path / "ids.csv").write_text("id,title\na,b\n")
    with pytest.raises(TableError, match="ids.csv: an item table needs 'item_id' .* it has id, title"):
        open_items(str(tmp_path / "ids.csv"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(TableError, match="bad.parquet: not a readable Parquet file"):
        open_items(str(tmp_path / "bad.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match="no Parquet file and no metadata.csv"):
        open_items(str(tmp_path / "empty"))
    with pytest.raises(TableError, match="neither a file or folder nor a dataset"):
        open_items("nobody/has-this-dataset")


def test_texts_of_other_encodings_spoil_their_own_row_only(tmp_path):
    titles = pa.array([b"fine", b"\xff\xfe", b"also fine"]).view(pa.string())
    pq.write_table(pa.table({"item_id": ["a", "b", "c"], "title": titles}), tmp_path / "items.parquet")
    rows = list(open_items(str(tmp_path / "items.parquet")).read(0, 3))
    assert [isinstance(row.raw, dict) for row in rows] == [True, False, True]
    assert "not valid UTF-8" in rows[1].raw.reason


def test_batches_hold_items_of_like_length(table, tiny_model_folder):
    encoder = ItemEncoder(str(tiny_model_folder), batch_size=8)
    block = encoder.prepare(0, open_items(str(table)).read(0, 64))
    assert sorted(block.order) == list(range(64))
    with_image = [count > 0 for count in block.num_images]
    assert with_image == sorted(with_image)
    for kind in (False, True):
        lengths = [len(ids) for ids, has in zip(block.input_ids, with_image, strict=True) if has is kind]
        assert lengths == sorted(lengths)
