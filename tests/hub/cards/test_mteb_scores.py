"""Scores of mteb in a card: in the model-index and as a table, of the card's own model alone."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hub.card import main
from hub.cards.writing import write_card
from training.tables.commands.handler import FileError
from training.tables.commands.hashes import weights_of


def result(task: str, **scores: float) -> dict:
    """As mteb keeps it."""
    return {
        "task_name": task,
        "dataset_revision": "abc",
        "mteb_version": "2.26.24",
        "scores": {split: [{"hf_subset": "default", "main_score": score}] for split, score in scores.items()},
    }


@pytest.fixture
def folder(tiny_model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "tiny"))


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def catalogue(weights: dict | None) -> dict:
    """As hub/mteb_task.py writes it, with another model before."""
    models = [
        {"weights": {"model.safetensors": "other"}, "result": result("Shop", test=0.9)},
        {"weights": weights, "result": result("Shop", test=0.25)},
    ]
    return {"task": {"name": "Shop", "category": "it2it", "main_score": "ndcg_at_10"}, "models": models}


def test_a_card_has_the_scores_of_its_own_model(folder, tmp_path, capsys):
    own = write(tmp_path / "scores.json", catalogue(weights_of(folder)))
    kept = write(tmp_path / "NFCorpus.json", result("NFCorpus", test=0.5, dev=0.125))

    assert main(["--model", str(folder), "--mteb", own, kept]) == 0

    card = ModelCard.load(folder / "README.md")
    entries = {
        (entry.task_type, entry.dataset_name, entry.dataset_split, entry.metric_type, entry.metric_value)
        for entry in card.data.eval_results
    }
    assert entries == {
        ("feature-extraction", "NFCorpus (default)", "dev", "main_score", 0.125),
        ("feature-extraction", "NFCorpus (default)", "test", "main_score", 0.5),
        ("visual-document-retrieval", "Shop (default)", "test", "ndcg_at_10", 0.25),
    }
    assert {entry.source_name for entry in card.data.eval_results} == {"MTEB"}
    assert "| Shop (default) | test | ndcg_at_10 | 0.250 |" in card.text
    assert "| NFCorpus (default) | dev | main_score | 0.125 |" in card.text
    assert "Nothing was measured" not in card.text
    assert str(tmp_path) not in card.content


def test_scores_of_others_are_refused(folder, tmp_path):
    others = write(tmp_path / "scores.json", catalogue({"model.safetensors": "third"}))
    with pytest.raises(FileError, match="none of its scores is of this model's weights"):
        write_card(folder, mteb=[others])
    with pytest.raises(FileError, match="holds no scores of mteb"):
        write_card(folder, mteb=[write(tmp_path / "metrics.json", {"after": {}})])
    assert not (folder / "README.md").exists()
