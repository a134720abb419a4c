"""Training from tables to a saved, measured model, on a tiny model and on items drawn on the spot."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from modeling_notellm2 import NoteLLM2Model
from training.run import run
from training.tables.items import load_items
from training.trainer.arguments import NoteLLM2TrainingArguments, parse
from training.trainer.trainer import parameter_groups


LOGGED = {
    "multimodal_loss",
    "visual_loss",
    "in_batch_recall",
    "logit_scale",
    "temperature",
    "gate_mean",
    "embedding_norm",
    "masked_negatives",
    "items_per_second",
    "data_wait",
}


@pytest.fixture
def config(coloured_tables, tiny_model_folder, tmp_path):
    """A run on the coloured items, with its own vision cache."""
    path = tmp_path / "config.yaml"
    path.write_text(f"""
model: {tiny_model_folder}
items: {coloured_tables}/items.parquet
train_pairs: {coloured_tables}/train.jsonl
eval_pairs: {coloured_tables}/test.jsonl
eval_split: test
label_column: colour
distinct_column: colour
output_dir: {tmp_path}/run
cache_vision_features: true
vision_cache_dir: {tmp_path}/vision
max_steps: 60
per_device_train_batch_size: 6
learning_rate: 2e-3
connector_learning_rate: 4e-3
use_cpu: true
""")
    return path


@pytest.mark.parametrize("lora_r", ["0", "4"])
def test_training_learns_saves_and_reports(config, tmp_path, tiny_model_folder, lora_r):
    report = run(*parse([str(config), "--lora_r", lora_r, "--merge_adapter", str(lora_r != "0")]))

    before, after, by_chance = report["before"], report["after"], report["random"]["random/precision@10"]
    assert after["both/precision@10"] > before["both/precision@10"] + 0.1
    assert after["both/precision@10"] > 2 * by_chance
    assert {f"{name}/recall@10" for name in ("both", "image", "text", "visual")} <= set(after)
    logged = [line for line in report["log"] if "loss" in line]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert set(logged[0]) >= LOGGED

    output = tmp_path / "run"
    assert json.loads((output / "metrics.json").read_text())["after"] == after
    rejects = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert Counter(reject["reason"].split(":")[0] for reject in rejects) == {
        "unreadable image": 1,
        "not among the usable items": 2,
        "query and target are one item": 1,
    }
    assert list((output / "logs").glob("events.out.tfevents.*"))

    old, new = (load_file(folder / "model.safetensors") for folder in (tiny_model_folder, output / "model"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys()
    assert not any(name.startswith("vision_model.") for name in changed)
    assert any(name.startswith("language_model.") for name in changed)
    assert "query_tokens" in changed
    model = AutoModel.from_pretrained(output / "model", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(output / "model", trust_remote_code=True)
    assert model(**processor(["a red thing"], return_tensors="pt")).embeddings.shape == (1, 24)


@pytest.mark.parametrize("merge", [True, False])
def test_the_read_out_can_be_chosen_anew(config, tmp_path, merge):
    """It is kept with the weights; in an adapter's folder there is no place for it, so that is refused."""
    chosen = ["--readout", "mean", "--text_attention", "bidirectional", "--lora_r", "4", "--max_steps", "2"]
    options = [str(config), *chosen, "--merge_adapter", str(merge), "--output_dir", str(tmp_path / "mean")]
    if not merge:
        with pytest.raises(SystemExit):
            parse(options)
        return
    run(*parse(options))
    model = AutoModel.from_pretrained(tmp_path / "mean" / "model", trust_remote_code=True)
    assert (model.config.readout, model.config.text_attention) == ("mean", "bidirectional")


def test_states_are_measured_before_the_first_step(config, tmp_path):
    """With the adapter merged, mean and deviation are in the saved model; without training they are those of the train items."""
    options = ["--readout", "mean", "--standardize_states", "true", "--lora_r", "4", "--merge_adapter", "true"]
    options += [
        "--dtype",
        "float32",
        "--cache_vision_features",
        "false",
        "--max_steps",
        "1",
        "--connector_learning_rate",
        "0",
        "--learning_rate",
        "0",
    ]
    run(*parse([str(config), *options]))
    folder = tmp_path / "run" / "model"
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    items, _ = load_items(parse([str(config)])[1].items)
    train = [items[position] for position in items.where("split", "train").tolist()]
    states = {"": [], "visual_": []}
    for name, kept in states.items():
        part = getattr(model, f"{name}standardization")
        part.register_forward_hook(lambda _, args, output, kept=kept: kept.append(output))
    with torch.no_grad():
        shown = model(**processor([item for item in train if item.get("image")], return_tensors="pt")).has_image
    assert shown.all()
    for (of_kind,) in states.values():
        assert of_kind.mean(0).abs().mean() < 0.15  # not all of them stand in pairs
        assert of_kind.std(0).mean() < 1.2
    assert states[""][0].std(0).mean() > 0.8  # what a random connector says of pictures is rounding


@pytest.mark.parametrize("merge", ["true", "false"])
def test_what_was_measured_of_states_is_kept_and_not_trained(config, tmp_path, tiny_model_folder, merge):
    base = tmp_path / "base"
    NoteLLM2Model.from_pretrained(tiny_model_folder, standardize_states=True).save_pretrained(base)
    AutoProcessor.from_pretrained(tiny_model_folder, trust_remote_code=True).save_pretrained(base)
    trained = []
    for steps in (1, 3):
        options = {"model": base, "output_dir": tmp_path / f"run-{steps}", "max_steps": steps, "lora_r": 4}
        options["merge_adapter"] = merge
        run(*parse([str(config), *(text for name, value in options.items() for text in (f"--{name}", str(value)))]))
        trained.append(AutoModel.from_pretrained(tmp_path / f"run-{steps}" / "model", trust_remote_code=True))
    first, last = trained
    for name in ("standardization", "visual_standardization"):
        assert getattr(first, name).is_fitted
        assert torch.equal(getattr(first, name).mean, getattr(last, name).mean)
        assert torch.equal(getattr(first, name).scale, getattr(last, name).scale)
    assert not torch.equal(first.reduction.weight, last.reduction.weight)


def test_the_command_says_what_is_wrong_and_where_things_are(config, tmp_path):
    command = [sys.executable, "training/run.py", str(config), "--use_cpu", "--max_steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr  # the tables have rejects
    assert "metrics.json" in done.stdout.replace("\n", "")

    config.write_text("learning_rte: 1")
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "unknown option learning_rte" in failed.stderr


def test_learning_rates_and_decay_by_part(tiny_model_folder, tmp_path):
    model = NoteLLM2Model.from_pretrained(tiny_model_folder)
    arguments = NoteLLM2TrainingArguments(output_dir=str(tmp_path), connector_learning_rate=1e-3, use_cpu=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    placed = {}
    for group in parameter_groups(model, arguments):
        for parameter in group["params"]:
            placed[names[id(parameter)]] = (group["lr"], group["weight_decay"])

    assert set(placed) == {name for name, _ in model.named_parameters() if not name.startswith("vision_model.")}
    assert placed["language_model.layers.0.mlp.up_proj.weight"] == (3e-6, 1e-3)
    assert placed["language_model.norm.weight"] == (3e-6, 0)
    assert placed["query_tokens"] == (1e-3, 1e-3)
    assert placed["logit_scale"] == (1e-3, 0)


def test_single_parts_may_have_learning_rates_of_their_own(tiny_model_folder, tmp_path):
    model = NoteLLM2Model.from_pretrained(tiny_model_folder)
    own = {"qformer": 2e-3, "late_fusion": 3e-3, "reduction": 4e-3, "logit_scale": 5e-2}
    options = {f"{part}_learning_rate": rate for part, rate in own.items()}
    arguments = NoteLLM2TrainingArguments(
        output_dir=str(tmp_path), connector_learning_rate=1e-3, use_cpu=True, **options
    )
    rates = {id(p): group["lr"] for group in parameter_groups(model, arguments) for p in group["params"]}

    expected = {"query_tokens": 2e-3, "projector": 2e-3, "language_model": 3e-6, **own}
    trained = [(name.split(".")[0], p) for name, p in model.named_parameters() if not name.startswith("vision_model.")]
    assert {part for part, _ in trained} == set(expected)
    for part, parameter in trained:
        assert rates[id(parameter)] == expected[part], part
    assert len(rates) == len(trained)

    arguments = NoteLLM2TrainingArguments(
        output_dir=str(tmp_path), connector_learning_rate=1e-3, logit_scale_learning_rate=0, use_cpu=True
    )
    rates = {id(p): group["lr"] for group in parameter_groups(model, arguments) for p in group["params"]}
    assert rates[id(model.logit_scale)] == 0  # zero holds it still; it isn't "not given"
    assert rates[id(model.query_tokens)] == 1e-3
