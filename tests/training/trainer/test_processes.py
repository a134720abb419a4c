"""Runs that are spread over processes, or lose one of them, end as a run of one process would."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from tests.support.models import QFORMER, make_model
from tests.support.native_models import image_processor_for, tiny_checkpoint, tokenizer_for
from tests.support.training_runs import QUIET, ROOT, equal_weights, finish, weights
from training.run import run
from training.trainer.arguments import parse
from training.trainer.checkpoints import newest_checkpoint


@pytest.mark.slow
def test_processes_and_chunks_train_as_one_process_on_the_joined_batch(options, tmp_path):
    """Two processes with half the pairs each, embedded in chunks: the same losses and weights but for rounding.

    The vision encoder is trained too; CLIP's last norm, which no embedding reads, holds nobody up.
    """
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # dropout would differ by design
    model, processor = make_model(qformer_config={**QFORMER, **still}, freeze_vision=False)
    model.save_pretrained(tmp_path / "still")
    processor.save_pretrained(tmp_path / "still")
    shared = {"model": tmp_path / "still", "optim": "sgd", "learning_rate": 0.1, "connector_learning_rate": 0.1}
    one = run(*parse(options(output_dir=tmp_path / "one", per_device_train_batch_size=6, **shared)))
    arguments = options(output_dir=tmp_path / "two", per_device_train_batch_size=3, chunk_size=4, **shared)
    finish([*arguments, "--ddp_backend", "gloo"], processes=2)
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    losses, joined = ([line["multimodal_loss"] for line in report["log"] if "loss" in line] for report in (one, two))
    assert joined == pytest.approx(losses, rel=1e-4)
    start, single, spread = (
        load_file(tmp_path / "still" / "model.safetensors"),
        *map(weights, (tmp_path / "one", tmp_path / "two")),
    )
    changed = {name for name in start if not torch.equal(start[name], single[name])}
    assert len(changed) > 40 and any("patch_embedding" in name for name in changed)
    assert not any("post_layernorm" in name for name in changed)
    for name in single:
        torch.testing.assert_close(
            single[name], spread[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.slow
def test_one_checkpoint_as_both_halves_trains_in_shards_as_one_process(options, tmp_path):
    """`connector: native` with FSDP2, the frozen vision tower in shards too."""
    checkpoint = tiny_checkpoint("smolvlm")
    torch.manual_seed(0)
    model = NoteLLM2Model.from_vision_text_pretrained(checkpoint, checkpoint, embedding_dim=16)
    processor = NoteLLM2Processor.from_vision_text_pretrained(
        image_processor_for(checkpoint, "smolvlm"), tokenizer_for(checkpoint, "smolvlm"), model=model
    )
    assert model.config.connector == "native"
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    shared = {"model": tmp_path / "base", "optim": "sgd", "learning_rate": 0.05, "max_steps": 2}
    run(*parse(options(output_dir=tmp_path / "one", per_device_train_batch_size=4, **shared)))
    shards = {"fsdp": "full_shard", "shard_frozen_vision": True, "ddp_backend": "gloo"}
    finish(options(output_dir=tmp_path / "two", per_device_train_batch_size=2, **shards, **shared), processes=2)
    start, single, spread = (
        load_file(tmp_path / "base" / "model.safetensors"),
        *map(weights, (tmp_path / "one", tmp_path / "two")),
    )
    assert single.keys() == spread.keys()
    assert sum(not torch.equal(start[name], single[name]) for name in start) > 20
    for name in single:
        torch.testing.assert_close(
            single[name], spread[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@contextmanager
def started(arguments: list[str], log: Path, *launching: str) -> Iterator[subprocess.Popen]:
    """Two processes under torchrun, ended with the block; what they say goes into `log`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *launching]
    command = [*launcher, "training/run.py", *arguments]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **QUIET}, stdout=stream, stderr=stream)
        try:
            yield process
        finally:
            process.kill()


def _start(options):
    arguments = options()
    return load_file(Path(arguments[arguments.index("--model") + 1]) / "model.safetensors")


@pytest.mark.slow
def test_a_config_runs_with_two_processes(options, coloured_tables, tmp_path):
    changes = {"eval_pairs": coloured_tables / "test.jsonl", "eval_split": "test", "save_strategy": "steps"}
    changes |= {"save_steps": 2, "max_steps": 2, "per_device_train_batch_size": 3, "ddp_backend": "gloo"}
    changes |= {"merge_adapter": True, "dataloader_num_workers": 1, "train_sampling_strategy": "group_by_length"}
    done = finish(options(**changes), config="cpu.yaml", processes=2)
    assert "after: both" in done.stdout
    trained = AutoModel.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    start = _start(options)
    assert not torch.equal(trained.reduction.weight, start["reduction.weight"])
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-2"


def _worker_with_rank(agent: int, rank: int) -> int:
    """Process id of the agent's worker of this rank."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == agent and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError(f"no worker with rank {rank}")


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_within_a_minute_and_is_named(options, tmp_path):
    """FSDP2 on two processes; what torchrun says names the rank, and a whole checkpoint is left."""
    changes = {
        "max_steps": 400,
        "per_device_train_batch_size": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 50,
    }
    changes |= {"fsdp": "full_shard", "resume_from_checkpoint": "true", "ddp_backend": "gloo", "dtype": "float32"}
    log = tmp_path / "log"
    with started(options(**changes), log) as process:
        step = _killed_after(process, tmp_path / "run", 2)
        ended = time.monotonic()
        assert process.wait(timeout=60) != 0
    assert time.monotonic() - ended < 60
    assert int(newest_checkpoint(tmp_path / "run").name.split("-")[1]) >= step
    said = log.read_text()
    assert re.search(r"rank\s*: 1 \(local_rank: 1\)", said), said[-3000:]
    assert "Signal 9 (SIGKILL)" in said


@pytest.mark.slow
def test_torchrun_starts_killed_processes_again_from_the_last_checkpoint(options, tmp_path):
    """With --max-restarts a rank's death costs the steps since the last checkpoint, and ends in the same weights."""
    changes = {
        "max_steps": 30,
        "save_strategy": "steps",
        "save_steps": 3,
        "ddp_backend": "gloo",
        "per_device_train_batch_size": 3,
    }
    changes |= {"resume_from_checkpoint": "true"}
    log = tmp_path / "log"
    with started(options(**changes), log, "--max-restarts", "1") as process:
        step = _killed_after(process, tmp_path / "run", 3)
        assert process.wait(timeout=200) == 0, log.read_text()[-3000:]
    assert 3 <= step < 30
    assert f"Going on from {tmp_path / 'run' / 'checkpoint-'}" in log.read_text()
    finish(options(**changes, output_dir=tmp_path / "whole"), processes=2)
    assert equal_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def _killed_after(process: subprocess.Popen, run_folder: Path, step: int) -> int:
    """Kill rank 1 as soon as a whole checkpoint of this step or a later one is there; that checkpoint's step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        steps = [int(path.parent.name.split("-")[1]) for path in run_folder.glob("checkpoint-*/files.json")]
        if max(steps, default=0) >= step:
            os.kill(_worker_with_rank(process.pid, 1), signal.SIGKILL)
            return max(steps)
        time.sleep(0.1)
    raise AssertionError(f"no whole checkpoint of step {step}")
