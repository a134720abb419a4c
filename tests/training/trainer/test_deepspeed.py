"""DeepSpeed's ZeRO-2 and ZeRO-3 on two CPU processes: states in shards, and the weights of one process on the joined batch.

DeepSpeed stands in a folder of its own beside the virtual environment's packages (see the Makefile), and compiles a small
C++ extension at its first start.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.machine import missing
from tests.support.models import QFORMER, make_model
from tests.support.training_runs import CONFIGS, finish, weights
from training.run import run
from training.trainer.arguments import parse


DEEPSPEED = Path(sys.prefix) / "deepspeed"
COUNT = """
import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", weights_only=False)["optimizer_state_dict"]
groups = state.get("single_partition_of_fp32_groups") or state["fp32_flat_groups"]
print(sum(values.numel() for values in groups))
"""
"""In a process of its own: the file holds objects of DeepSpeed's classes, and it shall not be imported here."""


@pytest.fixture
def deepspeed(monkeypatch):
    """Lets the processes that a test starts find DeepSpeed, on CPUs."""
    if not (DEEPSPEED / "deepspeed").is_dir() or shutil.which("g++") is None:
        missing(f"needs DeepSpeed in {DEEPSPEED} (make test installs it) and a C++ compiler: apt-get install g++")
    monkeypatch.setenv("PYTHONPATH", str(DEEPSPEED))
    monkeypatch.setenv("PATH", f"{DEEPSPEED / 'bin'}{os.pathsep}{os.environ['PATH']}")  # where ninja is
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def still(options, tmp_path):
    """Options of a run without dropout, whose randomness would differ by design."""
    model, processor = make_model(
        qformer_config={**QFORMER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    model.save_pretrained(tmp_path / "still")
    processor.save_pretrained(tmp_path / "still")
    changes = {"model": tmp_path / "still", "max_steps": 5, "learning_rate": 0.01, "connector_learning_rate": 0.01}
    return lambda **more: options(**{**changes, **more})


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first compiles for a minute, or several on a busy machine
@pytest.mark.parametrize(
    ("stage", "chunk_size"),
    [
        (2, 4),
        (3, 4),
        pytest.param(2, 0, marks=pytest.mark.nightly),
        pytest.param(3, 0, marks=pytest.mark.nightly),
    ],
)
def test_zero_trains_as_one_process_on_the_joined_batch(stage, chunk_size, deepspeed, still, tmp_path):
    """Whole batches, and such in chunks (GradCache)."""
    one = run(*parse(still(output_dir=tmp_path / "one", per_device_train_batch_size=6)))
    spread = {"deepspeed": CONFIGS / f"deepspeed_zero{stage}.json", "ddp_backend": "gloo", "use_cpu": False}
    saved = {"save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 3, "chunk_size": chunk_size}

    finish(still(output_dir=tmp_path / "two", **spread, **saved), processes=2)

    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    losses, joined = ([line["multimodal_loss"] for line in report["log"] if "loss" in line] for report in (one, two))
    assert joined == pytest.approx(losses, rel=1e-4)
    start = load_file(tmp_path / "still" / "model.safetensors")
    single, gathered = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert sum(not torch.equal(start[name], single[name]) for name in start) > 20
    assert gathered.keys() == single.keys()
    for name in single:
        torch.testing.assert_close(
            single[name], gathered[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    shares = [optimizer_numbers(tmp_path / "two" / "checkpoint-5", rank) for rank in range(2)]
    trained = two["counts"]["trained_parameters"]
    assert trained <= sum(shares) < 1.05 * trained
    assert max(shares) < 0.6 * trained


def optimizer_numbers(checkpoint: Path, rank: int) -> int:
    """How many parameters a rank keeps the optimizer's own 32-bit copies of."""
    (path,) = (checkpoint / "global_step5").glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    done = subprocess.run([sys.executable, "-c", COUNT, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
