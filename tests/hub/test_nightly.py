"""hub/nightly.sh: a first night, a night that the gate refuses, the same night again, and what readers see meanwhile."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub.index import Index


ROOT = Path(__file__).parents[2]
OPTIONS = (
    "--max_steps 2 --dataloader_num_workers 0 --per_device_train_batch_size 4 --report false --dtype float32 "
    "--use_cpu true --merge_adapter true"
)


@pytest.fixture
def night(coloured_tables, tiny_model_folder, tmp_path):
    """Runs the script for a night, with more settings."""
    log = [
        {"user_id": f"u{user}", "item_id": f"i{72 * late + (user * 5 + step) % 72}", "timestamp": 100_000 * late + step}
        for late in (0, 1)
        for user in range(40)
        for step in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(log), tmp_path / "log.parquet")
    settings = {
        "LOG": tmp_path / "log.parquet",
        "ITEMS": coloured_tables / "items.parquet",
        "BASE": tiny_model_folder,
        "STATE": tmp_path / "state",
        "SPLIT_TIME": "50000",
        "CONFIG": ROOT / "training" / "configs" / "cpu.yaml",
        "OPTIONS": OPTIONS,
        "PYTHON": sys.executable,
    }

    def run(name: str, **more: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, **{key: str(value) for key, value in settings.items()}, "NIGHT": name, **more}
        return subprocess.run(["bash", ROOT / "hub" / "nightly.sh"], env=environment, capture_output=True, text=True)

    return run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nights_pass_or_are_refused(night, tmp_path):
    state = tmp_path / "state"
    done = night("first")
    assert done.returncode == 0, done.stderr
    assert "Gate: passed, there is no model to compare with." in done.stdout
    assert (state / "current").resolve() == state / "first"
    assert len(Index.load(state / "current" / "index").search(["i0"], k=3)[0]) == 3

    (state / "second").mkdir()  # mined and trained already, when the machine went down
    for name in ("train.parquet", "test.parquet"):
        shutil.copy(state / "first" / name, state / "second")
    shutil.copytree(state / "first" / "run", state / "second" / "run")
    refused = night("second", LOSS="-0.5")
    assert refused.returncode == 4, refused.stderr
    assert "Gate: refused" in refused.stdout
    assert (state / "current").resolve() == state / "first"
    assert not (state / "second" / "vectors").exists()

    again = night("second")
    assert again.returncode == 0, again.stderr
    assert "Gate: passed, recall@10" in again.stdout and "Precision" not in again.stdout.split("Gate")[0]
    assert (state / "current").resolve() == state / "second"
    report = json.loads((state / "second" / "evaluation" / "evaluation.json").read_text())
    assert report["compared_with"] == [str(state / "current" / "run" / "model")]


def test_a_failure_ends_the_night_with_its_own_code(night, tmp_path):
    done = night("broken", LOG=str(tmp_path / "nowhere.parquet"))
    assert done.returncode == 1 and "nowhere.parquet" in done.stderr
    assert not (tmp_path / "state" / "current").exists()
    assert night("broken", STATE="").returncode != 0
