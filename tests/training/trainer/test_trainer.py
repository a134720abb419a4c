"""Runs that are killed, damaged, or wrapped in adapters end as a plain run would."""

import os
import shutil
import signal
import subprocess
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from tests.support.training_runs import CONFIGS, QUIET, ROOT, command, equal_weights, finish, weights
from training.batches.collators import ItemCollator, PairCollator, PairDataset
from training.batches.data import load_data
from training.batches.false_negatives import FalseNegatives
from training.batches.sampling import DistinctItemsSampler
from training.evaluation.embed import evaluate_in_training
from training.run import run
from training.trainer.adapters import load_trainable
from training.trainer.arguments import ModelArguments, NoteLLM2TrainingArguments, parse
from training.trainer.checkpoints import checkpoint_to_resume, mark_whole, newest_checkpoint
from training.trainer.trainer import NoteLLM2Trainer


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(options, tmp_path):
    """SIGKILL in the middle; the newest checkpoint is damaged besides, so the one before is used and said so."""
    settings = {"max_steps": 14, "save_strategy": "steps", "save_steps": 2, "image_dropout": 0.2, "seed": 3}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(options(output_dir=whole, **settings))
    arguments = options(output_dir=killed, resume_from_checkpoint="true", **settings)
    process = subprocess.Popen(command(arguments), cwd=ROOT, env={**os.environ, **QUIET}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (killed / "checkpoint-6").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = newest_checkpoint(killed)
    assert newest is not None
    assert not (killed / "model").exists()
    with (newest / "optimizer.pt").open("r+b") as stream:
        stream.truncate(1000)

    done = finish(arguments)

    assert "is damaged (optimizer.pt has changed): the checkpoint before it is used." in done.stderr
    assert f"Going on from {newest_checkpoint(killed).parent}" in done.stderr
    assert equal_weights(weights(whole), weights(killed))


def test_a_restart_after_the_last_step_trains_none_and_reports_the_whole_runs_loss(options, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    first = run(*parse(options(**settings)))
    trained = weights(tmp_path / "run")
    losses = [line["loss"] for line in first["log"] if "loss" in line]
    assert len(losses) == 6
    assert first["train_loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    again = run(*parse(options(resume_from_checkpoint="true", **settings)))
    assert again["counts"]["steps"] == 6
    assert equal_weights(trained, weights(tmp_path / "run"))
    assert again["train_loss"] == pytest.approx(first["train_loss"])
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    later = run(*parse(options(resume_from_checkpoint="true", **settings)))
    assert later["train_loss"] == pytest.approx(first["train_loss"])
    assert equal_weights(trained, weights(tmp_path / "run"))


def test_options_that_training_depends_on_stay(tmp_path):
    for name, value in {
        "dataloader_drop_last": False,
        "remove_unused_columns": True,
        "auto_find_batch_size": True,
    }.items():
        with pytest.raises(ValueError, match=f"can't be changed. {name}: must stay"):
            NoteLLM2TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_copies_of_an_item_are_no_negatives_with_all_masks_off(options):
    report = run(*parse(options(mask_known_positives=False, mask_same_image=False, mask_same_text=False, max_steps=1)))
    (line,) = (line for line in report["log"] if "loss" in line)
    assert line["masked_negatives"] == pytest.approx(0.0)
    false_negatives = FalseNegatives()
    rows, columns = false_negatives(torch.tensor([4, 7, 4, 9]))
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {(0, 2), (2, 0)}


RUN_CONFIGS = sorted(path.name for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("config", RUN_CONFIGS)
def test_configs_are_read(config):
    path = CONFIGS / config
    if (
        "zero" in config
    ):  # its package needs a GPU to be of use: the engine's own file is held against accelerate's reader
        stage = int(path.stem[-1])
        engine = HfDeepSpeedConfig(str(CONFIGS / f"deepspeed_zero{stage}.json"))
        assert (engine.is_zero2(), engine.is_zero3()) == (stage == 2, stage == 3)
        arguments = parse([str(path), "--use_cpu", "--deepspeed", ""])[2]
    else:
        arguments = parse([str(path), "--use_cpu"])[2]
    assert arguments.output_dir.startswith("runs/")
    assert 0 < arguments.learning_rate < 1


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_loads_with_all_that_was_trained(options, tmp_path, dora):
    run(*parse(options(lora_r=4, use_dora=dora, lora_target_modules=["q_proj", "v_proj"])))
    folder = tmp_path / "run" / "model"
    assert not (folder / "model.safetensors").exists()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(["red thing", {"title": "blue"}], return_tensors="pt")
    base = AutoModel.from_pretrained(_value(options, "model")).eval()
    before = base(**inputs).embeddings
    wrapped = PeftModel.from_pretrained(base, str(folder)).eval()
    after = wrapped(**inputs).embeddings
    assert (after - before).abs().max() > 1e-3
    if not dora:  # transformers' own reader of adapters misnames DoRA's magnitudes; peft's doesn't
        loaded = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        torch.testing.assert_close(loaded(**inputs).embeddings, after, atol=1e-6, rtol=0)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).embeddings, after, atol=1e-5, rtol=0)
    names = load_file(folder / "adapter_model.safetensors")
    assert {"base_model.model.query_tokens", "base_model.model.logit_scale"} <= set(names)
    assert not any("vision_model" in name or "embed_tokens" in name for name in names)
    assert all("language_model" in name for name in names if "lora_" in name)
    again = run(*parse(options(model=folder, output_dir=tmp_path / "further", max_steps=1)))
    assert again["counts"]["trained_parameters"] < again["counts"]["all_parameters"]


def _value(options, name):
    arguments = options()
    return arguments[arguments.index(f"--{name}") + 1]


def test_the_best_model_is_kept_by_its_retrieval_metric(options, coloured_tables, tmp_path):
    report = run(
        *parse(
            options(
                eval_pairs=coloured_tables / "test.jsonl",
                eval_split="test",
                eval_strategy="steps",
                eval_steps=2,
                save_strategy="steps",
                save_steps=2,
                save_total_limit=1,
                load_best_model_at_end=True,
                metric_for_best_model="eval_recall@10",
                matryoshka_dims=[12, 6],
                learning_rate=3e-3,
            )
        )
    )
    measured = {line["step"]: line["eval_recall@10"] for line in report["log"] if "eval_recall@10" in line}
    assert set(measured) == {2, 4, 6}
    assert all("eval_visual_recall@10" in line for line in report["log"] if "eval_recall@10" in line)
    assert report["after"]["both/recall@10"] == max(measured.values())
    (left,) = (tmp_path / "run").glob("checkpoint-*")
    assert newest_checkpoint(tmp_path / "run") == left


@pytest.mark.slow
def test_hyperparameters_are_searched_on_a_retrieval_metric(options, coloured_tables):
    """Each trial trains a fresh model, and the best is the one whose recall was highest."""
    model, tables, arguments = parse(
        options(eval_pairs=coloured_tables / "test.jsonl", eval_split="test", eval_strategy="steps", eval_steps=6)
    )
    data, processor = load_data(tables, 0), AutoProcessor.from_pretrained(model.model)
    collate = ItemCollator(processor, None)
    trainer = NoteLLM2Trainer(
        model_init=lambda: load_trainable(model),
        args=arguments,
        train_dataset=PairDataset(data.items, data.train),
        data_collator=PairCollator(collate),
        eval_dataset=data.eval_items,
        measure=partial(evaluate_in_training, collate=collate, items=data.eval_items, pairs=data.eval_pairs),
    )
    seen, models = [], []

    def objective(metrics):
        seen.append(metrics["eval_recall@10"])
        models.append(trainer.model)
        return seen[-1]

    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)},
        compute_objective=objective,
        n_trials=2,
        direction="maximize",
        backend="optuna",
    )
    assert best.objective == max(seen)
    assert len(seen) == 2 and models[0] is not models[1]
    assert trainer.monitor.model is models[1]


def test_a_loss_that_is_no_number_ends_the_run_with_its_items(options, tiny_model_folder, tmp_path):
    broken = AutoModel.from_pretrained(tiny_model_folder)
    broken.reduction.weight.data[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    AutoProcessor.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "broken")
    with pytest.raises(FloatingPointError, match=r"nan at step 1. Items of this process's batch: i\d+, i\d+"):
        run(*parse(options(model=tmp_path / "broken")))
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        run(*parse(options(model=tmp_path / "broken", chunk_size=3)))


def test_checkpoints_are_whole_or_passed_over(tmp_path):
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.pt", "deep/rng_state.pth"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x" * 100)
        mark_whole(folder)
    (tmp_path / "checkpoint-3").mkdir()  # killed while it was written
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    for name in ("model.safetensors", "optimizer.pt", "deep/rng_state.pth"):  # one bit each
        (tmp_path / "checkpoint-2" / name).write_bytes(b"x" * 50 + b"y" + b"x" * 49)
        assert checkpoint_to_resume("true", tmp_path) == tmp_path / "checkpoint-1"
        with pytest.raises(ValueError, match=f"{name} has changed"):
            checkpoint_to_resume(str(tmp_path / "checkpoint-2"), tmp_path)
        (tmp_path / "checkpoint-2" / name).write_bytes(b"x" * 100)
    assert checkpoint_to_resume("true", tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-2"), tmp_path)
    assert checkpoint_to_resume("true", tmp_path / "elsewhere") is None


def test_contradicting_options_are_refused(options):
    with pytest.raises(ValueError, match="set lora_r above 0"):
        ModelArguments(model="m", merge_adapter=True)
    with pytest.raises(ValueError, match="4-bit"):
        ModelArguments(model="m", lora_r=4, load_in_4bit=True, merge_adapter=True)
    with pytest.raises(ValueError, match="LlamaModel has no query; its linear layers are down_proj"):
        run(*parse(options(lora_r=4, lora_target_modules=["query"])))


@pytest.mark.parametrize(("data_seed", "expected"), [(0, 0), (7, 7), (None, 42)])
def test_the_order_of_pairs_follows_data_seed_where_there_is_one(options, data_seed, expected):
    given = {} if data_seed is None else {"data_seed": data_seed}
    model, tables, arguments = parse(options(seed=42, **given))
    data = load_data(tables, 0)
    collate = ItemCollator(AutoProcessor.from_pretrained(model.model), None)
    trainer = NoteLLM2Trainer(
        model=load_trainable(model),
        args=arguments,
        train_dataset=PairDataset(data.items, data.train),
        data_collator=PairCollator(collate),
    )
    order = list(trainer.get_train_dataloader().batch_sampler)
    size = arguments.per_device_train_batch_size
    pairs = list(DistinctItemsSampler(data.train, size, seed=expected))
    assert [pair for batch in order for pair in batch] == pairs
    assert pairs != list(DistinctItemsSampler(data.train, size, seed=expected + 1))


def test_weights_of_pairs_and_several_positives_reach_the_loss(options, coloured_tables, tmp_path):
    """Equal weights train as none do; pairs of one query, all in one batch, are positives together."""
    pairs = pd.read_json(coloured_tables / "train.jsonl", lines=True)
    for name, scores in {"equal": 2.5, "unequal": np.arange(1, len(pairs) + 1)}.items():
        pairs.assign(score=scores).to_parquet(tmp_path / f"{name}.parquet")
    settings = {"max_steps": 3, "per_device_train_batch_size": 12}

    def trained(name, **more):
        given = options(output_dir=tmp_path / name, **settings, **more)
        place = given.index("--distinct_column")
        run(*parse(given[:place] + given[place + 2 :]))
        return weights(tmp_path / name)

    plain = trained("plain")
    tables = {
        name: {"train_pairs": tmp_path / f"{name}.parquet", "weight_column": "score"} for name in ("equal", "unequal")
    }
    torch.testing.assert_close(trained("a", **tables["equal"]), plain, rtol=0, atol=1e-6)
    weighted = trained("b", **tables["unequal"])
    assert not equal_weights(weighted, plain)
    several = trained("c", several_positives=True)
    assert not equal_weights(several, plain)
    with pytest.raises(ValueError, match="several_positives needs mask_known_positives"):
        trained("f", several_positives=True, mask_known_positives=False)
