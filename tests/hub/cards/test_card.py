"""The model card: snippets that run, figures that are the metrics', sentences that follow from them, and whose card is kept."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image

from hub.cards.writing import MARKER, write_card
from modeling_notellm2.backbones_notellm2 import base_models
from training.tables.commands.handler import FileError
from training.tables.commands.hashes import weights_of


ROOT = Path(__file__).parents[3]


def metrics(both: float = 0.6, image: float = 0.4, text: float = 0.3, before: float = 0.1) -> dict:
    """As training/run.py writes them: 400 queries, where 0.07 is about twice the standard error of a difference."""
    after = {f"both/recall@{k}": both for k in (1, 10)} | {"both/precision@10": 0.5}
    after |= {"image/recall@10": image, "text/recall@10": text, "visual/recall@10": 0.35}
    return {
        "random": {"random/recall@10": 0.02, "queries": 400, "candidates": 500},
        "baselines": {"linear map/recall@10": 0.59, "frozen vision/recall@10": 0.2, "linear map/precision@10": 0.8},
        "before": {"both/recall@10": before},
        "after": after,
        "counts": {
            "items": 1500,
            "eval_items": 900,
            "train_pairs": 7000,
            "eval_pairs": 800,
            "steps": 80,
            "rejected_rows": 3,
        },
        "settings": {
            "learning_rate": 0.0003,
            "lora_r": 16,
            "image_dropout": 0.0,
            "eval_split": "test",
            "label_column": "shelf",
            "model": "/home/someone/secret/base",
            "items": "/home/someone/items.parquet",
        },
    }


@pytest.fixture
def folder(tiny_model_folder, tmp_path) -> Path:
    """A copy of a saved model whose config knows its halves."""
    copy = Path(shutil.copytree(tiny_model_folder, tmp_path / "tiny"))
    config = json.loads((copy / "config.json").read_text())
    config["base_models"] = {"vision_encoder": "org/eyes", "language_model": "org/words"}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_the_snippets_run_in_a_fresh_process(folder, tmp_path):
    card = write_card(folder, metrics(), "someone/tiny").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 2 and all('"someone/tiny"' in snippet for snippet in snippets)
    code = "\n".join(snippets).replace("someone/tiny", str(folder))
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"# (torch\.Size\(\[2, 24\]\)|\(2, 24\))", card)
    lines = done.stdout.splitlines()
    assert len(said) == 2 and said[0] == lines[0] and said[1] == lines[2]


def test_metadata_reads_back_and_holds_the_figures(folder):
    measured = metrics()
    path = write_card(
        folder, measured, "someone/tiny", license="apache-2.0", languages=["en", "zh"], datasets=["someone/items"]
    )
    data = ModelCard.load(path).data
    assert data.base_model == ["org/eyes", "org/words"] and data.base_model_relation == "finetune"
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "feature-extraction", "apache-2.0")
    assert data.language == ["en", "zh"] and data.datasets == ["someone/items"]
    assert {"notellm2", "sentence-transformers", "custom_code"} <= set(data.tags)
    found = {f"{result.dataset_config}/{result.metric_type}": result.metric_value for result in data.eval_results}
    assert found == measured["after"]
    assert {result.dataset_type for result in data.eval_results} == {"someone/items"}
    name, again = model_index_to_eval_results(eval_results_to_model_index(data.model_name, data.eval_results))
    assert name == "tiny" and len(again) == len(measured["after"])
    assert ModelCard(str(ModelCard.load(path))).data.to_dict() == data.to_dict()


def findings_of(folder: Path, measured: dict) -> str:
    text = write_card(folder, measured).read_text(encoding="utf-8")
    return text.split("## What it reaches")[1].split("\n| embedding")[0]


def test_sentences_follow_from_the_figures(folder):
    good = findings_of(folder, metrics())
    assert "the picture adds to the text (0.600 with it, 0.300 without)" in good
    assert "the picture alone carries (0.400, chance 0.020)" in good
    assert "trained (0.600) is better than untrained (0.100)" in good
    assert "the model (0.600) is not clearly different from the best baseline, linear map (0.590)" in good
    assert (
        "precision@10 against baselines: the model (0.500) is worse than the best baseline, linear map (0.800)" in good
    )

    blind = findings_of(folder, metrics(both=0.6, image=0.02, text=0.59))
    assert "no clear gain from the picture beside the text" in blind
    assert "the picture alone does no better than chance" in blind and "carries" not in blind

    worse = findings_of(folder, metrics(both=0.4, image=0.6, text=0.6, before=0.7))
    assert "the text alone does better than with the picture" in worse
    assert "the picture alone does better than with the text" in worse
    assert "trained (0.400) is worse than untrained (0.700)" in worse


def test_nothing_is_claimed_without_figures(folder):
    text = write_card(folder).read_text(encoding="utf-8")
    assert "Nothing was measured" in text and "What it reaches" not in text and "## Training" not in text
    assert ModelCard(text).data.eval_results is None
    partial = metrics()
    partial["after"] = {key: value for key, value in partial["after"].items() if not key.startswith("text/")}
    text = write_card(folder, partial).read_text(encoding="utf-8")
    assert "The text alone was not measured." in text and "Picture beside text" not in text


def test_an_evaluation_is_read_too(folder, tmp_path):
    """The form that training/evaluate.py documents."""

    def published(value: float) -> dict:
        interval = {"value": value, "low": value - 0.05, "high": value + 0.05}
        return {"queries": 400, "candidates": 500, "metrics": {"recall@10": interval}, "random": {"recall@10": 0.02}}

    labels = {"items": 900, "metrics": {"precision@10": {"value": 0.25, "low": 0.2, "high": 0.3}}, "random": {}}
    parts = {"both": (0.6, labels), "image": (0.4, None), "text": (0.3, None)}
    evaluation = {
        "counts": {"items": 900, "pairs": 800, "rejected_rows": 0},
        "settings": {"label_column": "shelf"},
        "metrics": {name: {"published": published(value), "labels": label} for name, (value, label) in parts.items()},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    path = write_card(folder, tmp_path / "evaluation.json")
    found = {
        f"{result.dataset_config}/{result.metric_type}": result.metric_value
        for result in ModelCard.load(path).data.eval_results
    }
    assert found == {"both/recall@10": 0.6, "both/precision@10": 0.25, "image/recall@10": 0.4, "text/recall@10": 0.3}
    text = path.read_text(encoding="utf-8")
    assert "the picture adds to the text (0.600 with it, 0.300 without)" in text and "400 queries" in text
    assert "the picture alone carries (0.400, chance 0.020)" in text and "## Training" not in text
    assert (
        "| model: picture and text | 0.600 | 0.250 |" in text
        and "trained" not in text.split("## Use")[0].split("# tiny")[1]
    )


def test_settings_are_shown_and_paths_are_not(folder):
    text = write_card(folder, metrics(), "someone/tiny").read_text(encoding="utf-8")
    assert "| LoRA rank | 16 |" in text and "| steps | 80 |" in text and "| pairs trained on | 7,000 |" in text
    assert "/home" not in text and str(folder) not in text and "lose their image" not in text
    assert "the query's `shelf`" in text


def test_a_card_of_someone_else_is_kept(folder):
    path = write_card(folder)
    write_card(folder, metrics())  # its own is written anew
    path.write_text(path.read_text(encoding="utf-8").replace(MARKER, ""), encoding="utf-8")
    with pytest.raises(ValueError, match="was not written by this command"):
        write_card(folder)
    assert MARKER in write_card(folder, replace=True).read_text(encoding="utf-8")


def test_plots_lie_beside_the_card(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "recall by modality.png")
    text = write_card(folder, plots=[tmp_path / "recall by modality.png"]).read_text(encoding="utf-8")
    (linked,) = re.findall(r"!\[recall by modality\]\((.*?)\)", text)
    assert (folder / linked).is_file() and " " not in linked
    (tmp_path / "fake.png").write_text("<script>")
    with pytest.raises(ValueError, match="PNG"):
        write_card(folder, plots=[tmp_path / "fake.png"])


def test_an_adapter_says_what_it_adapts(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    data = ModelCard.load(write_card(tmp_path, repo_id="someone/adapter")).data
    assert data.base_model == ["someone/base"] and data.base_model_relation == "adapter" and "peft" in data.tags


def test_halves_are_recorded_by_id_and_folders_of_this_machine_are_not(tmp_path):
    assert base_models("org/eyes", str(tmp_path)) == {"vision_encoder": "org/eyes"}


def test_figures_of_other_weights_are_refused(folder):
    write_card(folder, {**metrics(), "weights": weights_of(folder)})
    with pytest.raises(FileError, match=r"metrics\.json: its figures are of other weights"):
        write_card(folder, {**metrics(), "weights": {"model.safetensors": "of another"}})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"metrics": {"before": {}}}, "no figures under 'after'"),
        ({"metrics": {"after": {"both/recall@10": float("nan")}}}, "expected a share"),
        ({"repo_id": "not an id"}, "no id of the Hub"),
        ({"base_models": ["../up"]}, "no id of the Hub"),
    ],
)
def test_what_cannot_be_said_is_refused(folder, options, reason):
    with pytest.raises(ValueError, match=reason):
        write_card(folder, **options)
    assert not (folder / "README.md").exists()


def test_the_command(folder, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()))
    command = [
        sys.executable,
        "hub/card.py",
        "--model",
        folder,
        "--metrics",
        tmp_path / "metrics.json",
        "--license",
        "mit",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    failed = subprocess.run(
        [sys.executable, "hub/card.py", "--model", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert failed.returncode == 1 and "holds no NoteLLM-2 model" in failed.stderr and "Traceback" not in failed.stderr
