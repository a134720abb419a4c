"""What the commands print, from backbones to an index: lines of ours and progress bars, no warning of a library."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import picture
from tests.support.catalogue import write_items


ROOT = Path(__file__).resolve().parents[1]
BAR = re.compile(r"\d+%\||\d+[a-z]* \[\d\d:\d\d")
OURS = re.compile(
    r"NoteLLM-2, prompt|  [a-z_, ]+ +[\d,]+|Precision: |\{'|[┏┃┡│├└]| +\d+ queries among| {5,}\S"
    r"|(Rows left out|Model|Metrics|Logs|Report): |.*: \d+ items, |.*/(evaluation\.(json|md)|plots|base: model, .*)$"
)


def strange_lines(*command: object) -> list[str]:
    """Lines that a command prints and that are neither ours nor a bar."""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**environment, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and not BAR.search(line)]
    return errors + [line for line in done.stdout.splitlines() if line.strip() and not OURS.match(line)]


@pytest.mark.slow
@pytest.mark.timeout(900)  # five processes, each of which imports everything
def test_no_line_of_a_library(tmp_path):
    rows = [
        {"item_id": f"i{n}", "title": f"thing {n}", "image": picture("red", n), "split": "train" if n < 16 else "test"}
        for n in range(24)
    ]
    items = write_items(rows, tmp_path / "items.parquet")
    for name, numbers in (("train", range(12)), ("test", range(16, 22))):
        pairs = [{"query_id": f"i{n}", "target_id": f"i{n + 2}"} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    base, run, vectors = tmp_path / "base", tmp_path / "run", tmp_path / "vectors"
    small = [
        "--text_layers",
        1,
        "--num_query_tokens",
        2,
        "--qformer_layers",
        1,
        "--qformer_hidden_size",
        48,
        "--qformer_heads",
        2,
    ]
    training = ["--max_steps", 2, "--logging_steps", 1, "--per_device_train_batch_size", 4, "--lora_r", 2]
    training += ["--eval_split", "test", "--save_strategy", "steps", "--save_steps", 1, "--merge_adapter", "true"]
    training += ["--dataloader_num_workers", 1]
    tables = ["--items", items, "--train_pairs", tmp_path / "train.jsonl", "--eval_pairs", tmp_path / "test.jsonl"]
    model = run / "model"
    for command in [
        ["hub/assemble.py", "--output", base, *small],
        ["training/run.py", "--model", base, *tables, "--output_dir", run, *training],
        [
            *("training/evaluate.py", "--model", model, "--items", items, "--pairs", tmp_path / "test.jsonl"),
            *("--output", tmp_path / "evaluation"),
        ],
        ["hub/encode.py", "--model", model, "--items", items, "--output", vectors, "--num_workers", 1],
        ["hub/index.py", "--embeddings", vectors, "--output", tmp_path / "index"],
    ]:
        assert strange_lines(*command) == [], command[0]
