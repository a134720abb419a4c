"""An index finds what a plain matrix product finds, its approximate kinds nearly so, and nothing unreliable is indexed."""

import json
import shutil
import sys
import uuid
from pathlib import Path

import faiss
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch

from hub import index as index_module
from hub.catalogue.shards import ShardError
from hub.encode import EncodeArguments, encode
from hub.index import BuildArguments, Index, build
from hub.neighbours.building import choose_parameters
from hub.neighbours.exports import export
from hub.neighbours.index import Neighbour
from tests.support.catalogue import SMALL, make_items, png, read_shards, vectors, write_items, write_shards
from training.tables.commands.files import write_json
from training.tables.commands.handler import FileError


CLUSTERED, WIDTH = 12_000, 16


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A table with rejects in it, so that ids and titles don't line up with row numbers."""
    items = make_items(60)
    items[7]["item_id"] = items[3]["item_id"]
    items[20]["image"] = b"no image"
    return write_items(items, tmp_path_factory.mktemp("table") / "items.parquet")


@pytest.fixture(scope="module")
def encoded(table, tiny_model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "shards"
    encode(EncodeArguments(str(tiny_model_folder), str(table), str(folder), visual=True, **SMALL))
    return folder


@pytest.fixture(scope="module")
def built(encoded, table, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("built") / "index"
    build(BuildArguments(str(encoded), str(output), items=str(table)))
    return output


def exact(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]


@pytest.fixture(scope="module")
def clustered() -> np.ndarray:
    """Unit vectors around 300 centres, as items of a catalogue lie."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(300, WIDTH))
    points = centres[draw.integers(300, size=CLUSTERED)] + 0.4 * draw.normal(size=(CLUSTERED, WIDTH))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def clustered_shards(clustered, tmp_path_factory) -> Path:
    return write_shards(clustered, tmp_path_factory.mktemp("clustered") / "shards")


def test_flat_index_is_exact(encoded, built):
    shards = read_shards(encoded)
    ids, stored = shards.column("item_id").to_pylist(), vectors(shards)
    assert len(ids) == 58
    index = Index.load(built)
    found = index.search(stored, k=10)
    for own, (row, result) in enumerate(zip(exact(stored, stored, 10), found, strict=True)):
        assert {neighbour.item_id for neighbour in result[:9]} <= {ids[one] for one in row}
        assert result[0].item_id == ids[own]
        assert np.allclose(
            [neighbour.score for neighbour in result], np.sort(stored @ stored[own])[::-1][:10], atol=1e-6
        )


def test_an_id_leaves_itself_out_and_titles_belong(encoded, built):
    titles = {item["item_id"]: item["title"] for item in reversed(make_items(60))}
    index = Index.load(built)
    ids = read_shards(encoded).column("item_id").to_pylist()
    results = index.search(ids, k=len(ids))
    for item_id, result in zip(ids, results, strict=True):
        assert {neighbour.item_id for neighbour in result} == set(ids) - {item_id}
        assert all(neighbour.title == titles[neighbour.item_id] for neighbour in result)
    assert index.search(["n9", "n9"], k=1)[0] == index.search(["n9"], k=1)[0]
    with pytest.raises(ValueError, match="Not in the index: n20, who"):
        index.search(["n1", "n20", "who"])
    with pytest.raises(ValueError, match=r"expected finite vectors \(n, 24\)"):
        index.search(np.ones((1, 23)))
    for wrong in (["n1", np.ones(24)], [np.ones(24), np.ones(23)], [np.ones(24), None]):
        with pytest.raises(ValueError, match="vectors of one width, or ids"):
            index.search(wrong)
    with pytest.raises(ValueError, match=r"Queries of shape \(1,\)"):
        index.search([7])


def test_queries_are_vectors_in_any_form(encoded, built):
    index = Index.load(built)
    queries = vectors(read_shards(encoded))[:3]
    expected = index.search(queries, k=4)
    for form in (list(queries), queries.tolist(), torch.from_numpy(queries), queries.astype(np.float64)):
        assert index.search(form, k=4) == expected
    assert index.search(np.array(["n9", "n1"]), k=4) == index.search(["n9", "n1"], k=4)
    for nothing in ([], (), np.zeros((0, 24))):
        assert index.search(nothing) == []


def test_an_index_of_one_item_has_no_neighbour(tmp_path):
    shards = write_shards(np.eye(1, 24, dtype=np.float32), tmp_path / "shards")
    build(BuildArguments(str(shards), str(tmp_path / "index")))
    index = Index.load(tmp_path / "index")
    own = index.ids["item_id"].to_pylist()
    assert index.search(own) == [[]]
    assert index.search(own * 2, k=1) == [[], []]
    assert [[neighbour.item_id for neighbour in result] for result in index.search(np.eye(1, 24))] == [own]


@pytest.mark.parametrize(("kind", "least"), [("hnsw", 0.97), ("ivf_pq", 0.8)])
def test_recall_of_approximate_kinds(kind, least, clustered, clustered_shards, tmp_path):
    settings = build(BuildArguments(str(clustered_shards), str(tmp_path / "index"), kind=kind))
    index = Index.load(tmp_path / "index")
    assert settings["items"] == CLUSTERED
    queries = clustered[:: CLUSTERED // 200]
    wanted = exact(clustered, queries, 10)
    found = index.search(queries, k=10)
    hits = [
        len({f"n{row}" for row in rows} & {one.item_id for one in result})
        for rows, result in zip(wanted, found, strict=True)
    ]
    assert np.mean(hits) / 10 > least
    by_id = index.search(["n7000"], k=5)[0]
    assert len(by_id) == 5
    assert "n7000" not in {neighbour.item_id for neighbour in by_id}
    flat_bytes = clustered.nbytes
    assert (tmp_path / "index" / "index.faiss").stat().st_size < flat_bytes or kind == "hnsw"


def test_an_index_is_mapped_not_read(clustered_shards, tmp_path):
    build(BuildArguments(str(clustered_shards), str(tmp_path / "index")))
    index = Index.load(tmp_path / "index")
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "index" / "index.faiss") in mapped
    assert str(tmp_path / "index" / "ids.arrow") in mapped
    assert len(index.search(["n5"], k=3)[0]) == 3


def test_stored_types_are_scaled_back(clustered, tmp_path):
    shards = write_shards(clustered[:500], tmp_path / "shards", embedding_type="int8")
    build(BuildArguments(str(shards), str(tmp_path / "index")))
    found = Index.load(tmp_path / "index").search(clustered[:50], k=1)
    assert [result[0].item_id for result in found] == [f"n{row}" for row in range(50)]
    assert all(abs(result[0].score - 1) < 0.02 for result in found)


def test_sizes_follow_the_data():
    assert choose_parameters("flat", 10, 64) == {}
    small, large = (choose_parameters("ivf_pq", count, 64) for count in (20_000, 10_000_000))
    assert small["nlist"] == 512 and large["nlist"] == 12_649
    assert large["training_items"] == 64 * 12_649 and small["training_items"] == 20_000
    for width in (24, 48, 63, 768):
        assert width % choose_parameters("ivf_pq", 20_000, width)["code_bytes"] == 0
    with pytest.raises(ValueError, match="at least 9,984 items and there are 500"):
        choose_parameters("ivf_pq", 500, 64)
    with pytest.raises(ValueError, match="61 dimensions can't be cut"):
        choose_parameters("ivf_pq", 20_000, 61)


def test_an_unreliable_folder_is_refused(encoded, table, tmp_path, clustered):
    def refused(match: str, spoil) -> None:
        folder = tmp_path / "spoilt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(encoded, folder)
        spoil(folder)
        with pytest.raises(ShardError, match=match):
            build(BuildArguments(str(folder), str(tmp_path / "index")))
        assert not (tmp_path / "index").exists()

    def flip(folder: Path) -> None:
        content = bytearray((folder / "shard-00002.parquet").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "shard-00002.parquet").write_bytes(content)

    def unfinished(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        write_json({**manifest, "complete": False}, folder / "manifest.json")

    refused("shard-00002.parquet has changed", flip)
    refused("shard-00001.parquet is missing", lambda folder: (folder / "shard-00001.parquet").unlink())
    refused("shard-9.parquet is not in the manifest", lambda folder: (folder / "shard-9.parquet").touch())
    refused("the encoding job is not finished", unfinished)
    refused("no manifest.json", lambda folder: (folder / "manifest.json").unlink())
    other = write_items(make_items(60)[::-1], tmp_path / "other.parquet")
    with pytest.raises(ShardError, match="is not where it should be in .*other.parquet"):
        build(BuildArguments(str(encoded), str(tmp_path / "index"), items=str(other)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(FileError, match="notes.txt was not made by this program"):
        build(BuildArguments(str(encoded), str(tmp_path / "mine")))
    with pytest.raises(ShardError, match="has no visual_embeddings"):
        shards = write_shards(clustered[:100], tmp_path / "plain")
        build(BuildArguments(str(shards), str(tmp_path / "index"), visual=True))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_index_of_visual_embeddings(encoded, tmp_path):
    build(BuildArguments(str(encoded), str(tmp_path / "index"), visual=True))
    shards = read_shards(encoded)
    has_image = np.array(shards.column("has_image").to_pylist())
    index = Index.load(tmp_path / "index")
    assert len(index.ids) == has_image.sum() < len(shards)
    visual = vectors(shards, "visual_embedding")[has_image]
    assert [result[0].item_id for result in index.search(visual, k=1)] == index.ids.column("item_id").to_pylist()


def run(monkeypatch, capsys, *options: object) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["index.py", *map(str, options)])
    index_module.main()
    return capsys.readouterr().out


def test_commands(encoded, table, tmp_path, monkeypatch, capsys):
    output = tmp_path / "index"
    said = run(monkeypatch, capsys, "--embeddings", encoded, "--output", output, "--items", table)
    assert said == f"{output}: 58 items, flat, 24 dimensions\n"
    wanted = Index.load(output).search(["n9"], 4)[0]
    printed = run(monkeypatch, capsys, "search", "--index", output, "--id", "n9", "-k", 4)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert rows == [[str(n), f"{one.score:.4f}", one.item_id, one.title or ""] for n, one in enumerate(wanted, 1)]

    item = make_items(60)[9]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "nine.png").write_bytes(png(9))
    (tmp_path / "item.json").write_text(json.dumps({**item, "image": "pictures/nine.png"}))
    options = ("--item", tmp_path / "item.json", "-k", 1)
    printed = run(monkeypatch, capsys, "search", "--index", output, *options)
    assert "│ 1 │ 1.0000 │ n9 " in printed
    (tmp_path / "item.json").write_text(json.dumps({"image": "pictures/none.png"}))
    with pytest.raises(SystemExit, match="none.png does not exist"):
        run(monkeypatch, capsys, "search", "--index", output, "--item", tmp_path / "item.json")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, "search", "--index", output)
    assert "Pass either --id or --item" in capsys.readouterr().err


def test_an_item_needs_the_model_of_the_index(built, tiny_model_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    (tmp_path / "item.json").write_text('{"title": "a lamp"}')
    options = ("search", "--index", built, "--item", tmp_path / "item.json", "--model", tmp_path / "model")
    assert "Nearest to" in run(monkeypatch, capsys, *options)
    with (tmp_path / "model" / "model.safetensors").open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(SystemExit, match="is not the model of this index: model.safetensors differs"):
        run(monkeypatch, capsys, *options)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-00001-of-00001.safetensors")
    with pytest.raises(SystemExit, match=r"model-00001-of-00001\.safetensors, model\.safetensors differs"):
        run(monkeypatch, capsys, *options)


def test_texts_of_a_catalogue_do_not_steer_the_terminal():
    assert index_module.printable("[red]a\x1b[31m\n").plain == "[red]a [31m "
    assert Neighbour("a", 0.5, None).title is None


def test_lancedb_finds_the_same(encoded, table, built, tmp_path):
    assert export(str(encoded), "lancedb", str(tmp_path / "export"), str(table)).written == 58
    files = pa.dataset.dataset(tmp_path / "export", format="parquet")
    there = lancedb.connect(tmp_path / "catalogue").create_table("items", files)
    index = Index.load(built)
    stored = vectors(read_shards(encoded))
    for query, wanted in zip(stored, index.search(stored, k=8), strict=True):
        found = there.search(query).distance_type("dot").limit(8).to_list()
        assert [one["item_id"] for one in found] == [one.item_id for one in wanted]
        assert [one["title"] for one in found] == [one.title for one in wanted]


def test_layouts_of_other_databases(encoded, table, tmp_path):
    stored = vectors(read_shards(encoded))
    ids = read_shards(encoded).column("item_id").to_pylist()
    export(str(encoded), "qdrant", str(tmp_path / "out"), str(table))
    points = pq.read_table(tmp_path / "out").to_pylist()
    assert [set(point) for point in points] == [{"id", "vector", "payload"}] * 58
    assert len({uuid.UUID(point["id"]) for point in points}) == 58
    assert [point["payload"]["item_id"] for point in points] == ids
    export(str(encoded), "qdrant", str(tmp_path / "again"))
    again = pq.read_table(tmp_path / "again").to_pylist()
    assert [point["id"] for point in again] == [point["id"] for point in points]
    export(str(encoded), "milvus", str(tmp_path / "out"), str(table))  # in place of the other export
    rows = pq.read_table(tmp_path / "out")
    assert rows.schema.field("vector").type.equals(pa.list_(pa.float32()))
    assert rows.column("title").null_count == 0
    assert np.array_equal(vectors(rows, "vector"), stored)
    assert json.loads((tmp_path / "out" / "_export.json").read_text())["format"] == "milvus"


def test_faiss_reads_the_index_alone(built):
    """Whoever has FAISS and Arrow needs nothing of ours."""
    index = faiss.read_index(str(built / "index.faiss"))
    ids = pa.ipc.open_file(built / "ids.arrow").read_all()
    assert index.ntotal == len(ids) == 58
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT


@pytest.mark.parametrize("name", ["index.json", "index.faiss", "ids.arrow"])
def test_an_edited_index_is_named(built, tmp_path, name):
    shutil.copytree(built, tmp_path / "index")
    (tmp_path / "index" / name).write_bytes(b"{}")
    with pytest.raises(FileError, match=r"index: .*build the index again"):
        Index.load(tmp_path / "index")


def test_files_of_two_indexes_are_never_one(encoded, built, tmp_path):
    """As many vectors, in another order: without a check, other neighbours in silence."""
    shutil.copytree(built, tmp_path / "index")
    other = faiss.read_index(str(built / "index.faiss"))
    turned = faiss.IndexFlatIP(other.d)
    turned.add(other.reconstruct_n(0, other.ntotal)[::-1].copy())
    faiss.write_index(turned, str(tmp_path / "index" / "index.faiss"))
    with pytest.raises(FileError, match=r"index\.faiss has changed\..* build the index again"):
        Index.load(tmp_path / "index")


@pytest.mark.parametrize("content", ["{", "{}", '{"complete": true, "job": {}}'])
def test_an_edited_manifest_is_named(encoded, tmp_path, content):
    shutil.copytree(encoded, tmp_path / "shards")
    (tmp_path / "shards" / "manifest.json").write_text(content)
    with pytest.raises(FileError, match=r"manifest\.json: .*encode into another folder"):
        build(BuildArguments(str(tmp_path / "shards"), str(tmp_path / "index")))
