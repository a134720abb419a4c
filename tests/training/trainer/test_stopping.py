"""Signals that end a training: one line that says how to go on, a checkpoint where they are on, no traceback."""

import os
import signal
import subprocess

import pytest

from tests.support.training_runs import QUIET, ROOT, command, finish
from training.trainer.checkpoints import newest_checkpoint


def stopped(arguments, number) -> tuple[int, list[str]]:
    """Exit code and last lines on stderr of a run that gets a signal after its first steps."""
    process = subprocess.Popen(
        command(arguments),
        cwd=ROOT,
        env={**os.environ, **QUIET},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stdout is not None
    while "loss" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, number)  # as terminals and schedulers do: to the workers too
    if number == signal.SIGTERM:
        process.send_signal(number)  # and torchrun passes it on
    _, error = process.communicate(timeout=200)
    return process.returncode, error.replace("\r", "\n").splitlines()


SETTINGS = {"max_steps": 500, "save_steps": 1000, "logging_steps": 1, "dataloader_num_workers": 1}


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint(options, tmp_path):
    output = tmp_path / "run"
    arguments = options(output_dir=output, save_strategy="steps", **SETTINGS)
    code, lines = stopped(arguments, signal.SIGTERM)
    checkpoint = newest_checkpoint(output)
    assert checkpoint is not None
    assert code == 143
    assert lines[-1] == (
        f"training/run.py: stopped. Start it again with --resume_from_checkpoint true: it goes on from {checkpoint}."
    )
    assert not any("Traceback" in line for line in lines)
    step = int(checkpoint.name.split("-")[1])
    settings = {**SETTINGS, "max_steps": step + 1}
    done = finish(options(output_dir=output, save_strategy="steps", resume_from_checkpoint="true", **settings))
    assert f"Going on from {checkpoint}" in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_at_once(options, tmp_path):
    code, lines = stopped(options(output_dir=tmp_path / "run", save_strategy="no", **SETTINGS), signal.SIGINT)
    assert code == 130
    assert lines[-1].startswith("training/run.py: stopped. There is no checkpoint")
    assert not any("Traceback" in line or "KeyboardInterrupt" in line for line in lines)
