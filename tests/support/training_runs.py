"""Training as users start it: commands of one or several processes, and the weights that they leave."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
QUIET = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def words(value):
    """An option's value as it is typed."""
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def command(arguments, config=None, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    return [*launcher, "training/run.py", *([str(CONFIGS / config)] if config else []), *arguments]


def finish(arguments, **settings):
    done = subprocess.run(
        command(arguments, **settings), cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True
    )
    assert done.returncode in (0, 3), done.stderr[-3000:]  # one process says that the tables have rejects
    return done


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def equal_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
