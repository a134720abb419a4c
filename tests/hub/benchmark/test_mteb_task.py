"""Catalogues as tasks of mteb: pictures count in every category, scores are those of our own evaluation."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from sentence_transformers import SentenceTransformer

from hub.benchmark.folder import CATEGORIES, write_task
from hub.cards.writing import write_card
from hub.mteb_task import main
from modeling_notellm2 import NoteLLM2Model
from tests.support.machine import require_mteb
from tests.support.models import make_model, save_text_model
from training.batches.collators import ItemCollator
from training.evaluation.embed import NoteLLM2Embedder
from training.evaluation.evidence import evaluate_model
from training.evaluation.measuring import MeasureOptions
from training.tables.items import load_items
from training.tables.pairs import load_pairs


require_mteb()
import mteb  # noqa: E402

from hub.benchmark import encoder  # noqa: E402
from hub.benchmark import task as task_of  # noqa: E402


ROOT = Path(__file__).parents[3]
COUNT = 24
WORDS = ["shoe", "hat", "clock", "tree"]


def png(seed: int | None) -> bytes:
    """Noise; None: a blank picture."""
    stream = io.BytesIO()
    pixels = np.zeros((32, 32, 3), np.uint8)
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 256, pixels.shape, dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def rows(blank: bool) -> list[dict]:
    return [
        {
            "item_id": f"i{number}",
            "title": f"{WORDS[number % 4]} {number}",
            "topics": ["things", WORDS[number % 3]],
            "content": "sold" if number % 2 else None,
            "image": png(None if blank else number),
        }
        for number in range(COUNT)
    ]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for name, blank in (("items", False), ("blank", True)):
        pq.write_table(pa.Table.from_pylist(rows(blank)), folder / f"{name}.parquet")
    pairs = [(number, number + step) for step in (4, 8) for number in range(COUNT - step)]
    named = [{"query_id": f"i{query}", "target_id": f"i{target}"} for query, target in pairs]
    pq.write_table(pa.Table.from_pylist(named), folder / "pairs.parquet")
    return folder


@pytest.fixture(scope="module")
def ours(tiny_model_folder):
    return encoder.notellm2_encoder(str(tiny_model_folder), device="cpu")


def scores_of(model, tables: Path, name: str, category: str, folder: Path) -> dict[str, float]:
    items, _ = load_items(str(tables / f"{name}.parquet"))
    pairs, _ = load_pairs(str(tables / "pairs.parquet"), items)
    write_task(items, pairs.pairs, folder / f"{name}_{category}", category)
    task = task_of.catalogue_task(folder / f"{name}_{category}", category, "Catalogue")
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return result.task_results[0].scores["test"][0]


@pytest.mark.parametrize(("category", "part"), [("it2it", "both"), ("t2t", "text"), ("i2i", "image")])
def test_scores_are_those_of_our_evaluation(category, part, ours, tables, tmp_path):
    scores = scores_of(ours, tables, "items", category, tmp_path)

    model, processor = make_model()
    items, _ = load_items(str(tables / "items.parquet"))
    pairs, _ = load_pairs(str(tables / "pairs.parquet"), items)
    embedder = NoteLLM2Embedder(model, ItemCollator(processor))
    report = evaluate_model(embedder, items, pairs.pairs, MeasureOptions(ks=[1, 3, 10], resamples=5))
    measured = report["metrics"][part]["multi_positive"]["metrics"]
    for k in (1, 3, 10):
        assert scores[f"recall_at_{k}"] == pytest.approx(measured[f"recall@{k}"]["value"], abs=1e-5)
        assert scores[f"ndcg_at_{k}"] == pytest.approx(measured[f"ndcg@{k}"]["value"], abs=1e-5)
    assert 0 < scores["recall_at_10"] < 1


@pytest.mark.parametrize("category", ["it2it", "i2i", "t2it", "it2t"])
def test_pictures_count(category, ours, tables, tmp_path):
    scores, blank = (scores_of(ours, tables, name, category, tmp_path) for name in ("items", "blank"))
    assert scores["ndcg_at_10"] != blank["ndcg_at_10"]


def test_a_task_of_texts_shows_no_picture(ours, tables, tmp_path):
    scores, blank = (scores_of(ours, tables, name, "t2t", tmp_path) for name in ("items", "blank"))
    assert scores["ndcg_at_10"] == blank["ndcg_at_10"]


def test_the_meta_says_what_the_model_is(tiny_model_folder, ours):
    meta = encoder.notellm2_meta(str(tiny_model_folder))
    model = NoteLLM2Model.from_pretrained(tiny_model_folder)
    assert meta.modalities == ["image", "text"] and meta.embed_dim == 24
    assert meta.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert meta.loader is encoder.NoteLLM2Encoder and meta.loader_kwargs == {"source": str(tiny_model_folder)}
    assert len(meta.revision) == 12 and meta.name == "local/model"
    assert meta.loader(meta.name, meta.revision, **meta.loader_kwargs).model.encode(["x"]).shape == (1, 24)
    known = ours.mteb_model_meta
    assert (known.name, known.revision, known.modalities) == (meta.name, meta.revision, meta.modalities)


def test_mteb_takes_the_modalities_of_a_model_of_the_hub(tiny_model_folder):
    """From the file that is saved beside the weights."""
    named = json.loads((tiny_model_folder / "sentence_bert_config.json").read_text())
    assert mteb.models.ModelMeta._detect_modalities_from_sbert_config(named) == ["image", "text"]


def test_a_model_of_the_hub_has_its_commit_as_revision(tiny_model_folder, at_hub):
    HfApi().create_repo("org/items")
    HfApi().upload_folder(repo_id="org/items", folder_path=tiny_model_folder)
    script = (
        "from hub.benchmark.encoder import notellm2_encoder\n"
        "encoder = notellm2_encoder('org/items', device='cpu')\n"
        "meta = encoder.mteb_model_meta\n"
        "print(meta.name, meta.revision, *encoder.model.encode(['x']).shape)"
    )
    environment = {**os.environ, **at_hub.environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["org/items", HfApi().model_info("org/items").sha, "1", "24"], done.stderr


def test_the_prompts_of_the_folder_are_used(tiny_model_folder, tmp_path):
    model = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True, device="cpu")
    model.prompts = {"query": "Find partners of: ", "document": ""}
    model.save(str(tmp_path / "prompted"))
    prompted = encoder.notellm2_encoder(str(tmp_path / "prompted"), device="cpu")
    assert prompted.mteb_model_meta.use_instructions
    batch = {"text": ["shoe", "hat"]}
    metadata = task_of.catalogue_task(tmp_path, "t2t", "Catalogue").metadata
    query, document = (
        prompted.encode([batch], task_metadata=metadata, prompt_type=kind, show_progress_bar=False)
        for kind in (mteb.types.PromptType.query, mteb.types.PromptType.document)
    )
    np.testing.assert_allclose(query, model.encode(batch["text"], prompt="Find partners of: "), atol=1e-6)
    np.testing.assert_allclose(document, model.encode(batch["text"]), atol=1e-6)
    assert np.abs(query - document).max() > 1e-4


def test_a_row_of_mteb_is_read_by_field():
    picture = Image.new("RGB", (2, 2))
    read = encoder.items_of({"text": ["a b"], "title": ["a"], "body": ["b"], "image": [picture]})
    assert read == [{"title": "a", "content": "b", "image": picture}]
    assert encoder.items_of({"text": ["t"], "item": ['{"title": "x", "topics": ["y"]}']})[0]["topics"] == ["y"]


def test_the_command_measures_any_models(tables, tiny_model_folder, tmp_path, capsys):
    texts = save_text_model(tmp_path / "texts")
    table = pq.read_table(tables / "items.parquet").to_pylist()
    table[0]["image"], table[1]["title"] = None, None
    table[1]["topics"] = []
    table[1]["content"] = None
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "items.parquet")
    options = ["--items", str(tmp_path / "items.parquet"), "--pairs", str(tables / "pairs.parquet")]
    options += ["--output", str(tmp_path / "out"), "--dtype", "float32", "--batch_size", "5", "--model"]

    assert main([*options, str(tiny_model_folder), str(texts)]) == 3
    assert main([*options, str(tiny_model_folder), str(texts)]) == 3  # over its own files

    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [(model["name"], model["modalities"]) for model in report["models"]] == [
        ("local/model", ["image", "text"]),
        ("local/texts", ["text"]),
    ]
    assert report["counts"] == {"corpus": 22, "queries": 18, "relevant": 32}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").open()]
    assert [(line["row"], line["ids"]) for line in lines] == [(0, ["i0"]), (1, ["i1"])]
    assert all(line["reason"] == "lacks what a task of it2it shows" for line in lines)
    result = mteb.TaskResult.from_dict(report["models"][0]["result"])
    assert (
        result.task_name == "Catalogue" and result.scores["test"][0]["ndcg_at_10"] == report["models"][0]["main_score"]
    )
    printed = capsys.readouterr().out
    assert f"{report['models'][1]['main_score']:.3f}" in printed
    assert f"{report['models'][1]['main_score']:.3f}" in (tmp_path / "out" / "scores.md").read_text()
    card = write_card(shutil.copytree(tiny_model_folder, tmp_path / "carded"), mteb=[tmp_path / "out" / "scores.json"])
    (entry,) = ModelCard.load(card).data.eval_results
    assert (entry.metric_type, entry.metric_value) == ("ndcg_at_10", report["models"][0]["main_score"])
    assert (entry.dataset_name, entry.source_name) == ("Catalogue (default)", "MTEB")
    # a text model is shown each item's one line
    task = task_of.catalogue_task(tmp_path / "out" / "task", "t2t", "Texts")
    again = mteb.evaluate(SentenceTransformer(str(texts), device="cpu"), task, cache=None, co2_tracker=False)
    assert again.task_results[0].scores["test"][0]["ndcg_at_10"] == report["models"][1]["main_score"]


def test_mistakes_are_named(tables, tiny_model_folder, tmp_path):
    items, _ = load_items(str(tables / "items.parquet"))
    with pytest.raises(ValueError, match="None of 1 pairs has two different items"):
        write_task(items, np.array([[1, 1]]), tmp_path, "it2it")
    options = ["--items", "x", "--pairs", "y", "--output", "z", "--model", "m", "--category", "i2x"]
    done = subprocess.run([sys.executable, "hub/mteb_task.py", *options], capture_output=True, text=True)
    assert done.returncode == 2 and "i2x" in done.stderr
    assert set(CATEGORIES) <= set(mteb.abstasks.task_metadata.TaskCategory.__args__)
