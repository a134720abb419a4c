"""The head's own phase: what it trains, what of, and what a restart makes of it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from modeling_notellm2 import contrastive_pair_loss
from tests.support.training_runs import equal_weights, weights
from training import run as running
from training.run import run
from training.trainer.arguments import parse
from training.trainer.head_first import HEAD, read_states


STILL = {"max_steps": 1, "learning_rate": 0, "qformer_learning_rate": 0, "connector_learning_rate": 3e-3}


@pytest.mark.parametrize("lora_r", [0, 4])
def test_late_fusion_and_reduction_learn_and_nothing_else_moves(
    options, coloured_tables, tiny_model_folder, tmp_path, lora_r
):
    """The one step through the LLM moves nothing of it, so what the pairs have taught is the head's."""
    measured = {"eval_pairs": coloured_tables / "test.jsonl", "eval_split": "test", "label_column": "colour"}
    adapter = {"lora_r": lora_r, "merge_adapter": lora_r > 0}
    report = run(*parse(options(head_steps=120, per_device_train_batch_size=6, **STILL, **adapter, **measured)))
    log = report["head_first"]
    assert [line["step"] for line in log] == [50, 100, 120]
    assert log[-1]["loss"] < log[0]["loss"] - 0.2
    assert report["after"]["both/precision@10"] > report["before"]["both/precision@10"] + 0.1
    old, new = load_file(tiny_model_folder / "model.safetensors"), weights(tmp_path / "run")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert all(any(name.startswith(part) for name in changed) for part in HEAD)
    assert all(name.startswith(HEAD) for name in changed)


def test_states_give_the_loss_of_whole_passes(options, monkeypatch):
    """With mICL and pictures missing in some batches."""
    found = {}

    def look(trainer, steps):
        model, collate = trainer.model, trainer.data_collator.collate_items
        items = trainer.train_dataset.items
        without = next(position for position, item in enumerate(items) if not item.get("image"))
        positions = [0, 5, 60, 100, without, 140]
        states = read_states(trainer, model, positions)
        rows = torch.tensor([1, 4, 0, 2])
        found["states"] = states.embed(model, rows)
        with torch.no_grad():
            found["model"] = model.eval()(**collate([items[positions[row]] for row in rows.tolist()]))
        return []

    monkeypatch.setattr(running, "head_first", look)
    run(*parse(options(head_steps=1, max_steps=1, per_device_eval_batch_size=2)))
    states, model = found["states"], found["model"]
    torch.testing.assert_close(states["embeddings"], model.embeddings, atol=1e-5, rtol=0)
    shown = model.has_image
    assert shown.tolist() == states["has_image"].tolist() == [True, False, True, True]
    torch.testing.assert_close(states["visual_embeddings"][shown], model.visual_embeddings[shown], atol=1e-5, rtol=0)
    loss = contrastive_pair_loss(states["embeddings"], torch.ones(1))
    torch.testing.assert_close(loss, contrastive_pair_loss(model.embeddings, torch.ones(1)), atol=1e-4, rtol=0)


def test_a_resumed_run_has_the_phase_behind_it(options, tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 3, "head_steps": 20}
    run(*parse(options(**settings)))
    trained = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    monkeypatch.setattr(running, "head_first", None)  # calling it would fail
    again = run(*parse(options(resume_from_checkpoint="true", **settings)))
    assert again["counts"]["steps"] == 6
    assert equal_weights(trained, weights(tmp_path / "run"))
