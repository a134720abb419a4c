"""The connector's warm-up as the first phase of a run: what it changes, and what a restart makes of it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.support.training_runs import equal_weights, weights
from training import run as running
from training.run import run
from training.trainer.arguments import parse


WARM_UP = {"align_steps": 12, "align_batch_size": 16, "align_caption_weight": 0}
CONNECTOR = ("qformer.", "projector.", "query_tokens")


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_run_warms_up_the_connector_alone_and_says_so(options, tiny_model_folder, tmp_path, lora_r):
    """All rates are 0 and no pair teaches anything, so what has changed is the phase's."""
    still = {"max_steps": 1, "learning_rate": 0, "lora_r": lora_r, "merge_adapter": lora_r > 0}
    run(*parse(options(**still, **WARM_UP)))
    old, new = load_file(tiny_model_folder / "model.safetensors"), weights(tmp_path / "run")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert all(any(name.startswith(part) for name in changed) for part in CONNECTOR)
    assert all(name.startswith(CONNECTOR) for name in changed)
    said = json.loads((tmp_path / "run" / "metrics.json").read_text())["alignment"]
    assert said == json.loads((tmp_path / "run" / "alignment.json").read_text())
    assert said["settings"]["steps"] == 12
    assert said["log"][-1]["step"] == 12
    assert AutoModel.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)


def test_what_was_trained_before_the_phase_is_trained_after_it(options, tmp_path):
    plain = run(*parse(options(output_dir=tmp_path / "plain", max_steps=1, lora_r=4)))
    warm = run(*parse(options(max_steps=1, lora_r=4, **WARM_UP)))
    assert warm["counts"]["trained_parameters"] == plain["counts"]["trained_parameters"]


def test_a_resumed_run_has_the_phase_behind_it(options, tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 3, **WARM_UP}
    first = run(*parse(options(**settings)))
    trained = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    monkeypatch.setattr(running, "first_phase", None)  # calling it would fail
    again = run(*parse(options(resume_from_checkpoint="true", **settings)))
    assert again["counts"]["steps"] == 6
    assert equal_weights(trained, weights(tmp_path / "run"))
    assert again["alignment"] == first["alignment"]


def test_a_run_without_the_phase_names_none(options, tmp_path):
    run(*parse(options(max_steps=1, **WARM_UP)))
    assert (tmp_path / "run" / "alignment.json").exists()
    assert run(*parse(options(max_steps=1)))["alignment"] == {}
    assert not (tmp_path / "run" / "alignment.json").exists()
