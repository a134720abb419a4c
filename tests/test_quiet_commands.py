"""What the commands print, from backbones to an index: lines of ours and progress bars, no warning of a library.

And what they ask of the network, given folders and files of this machine: nothing.
"""

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
    r"|Nearest to |\d+ pairs, |(Rows left out|Log|Model|Metrics|Logs|Report|Pairs left out|Pairs|Rejects): |/\S+$"
    r"|.*: \d+ items, |.*, open it in a browser\. |.*/(evaluation\.(json|md)|plots|base: model, .*)$"
)


WITNESS = """
import os, sys

def hook(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        asked = not isinstance(address, tuple) or not str(address[0]).startswith(("127.", "::1", "localhost"))
        asked = asked and isinstance(address, tuple)
    else:
        asked = event == "socket.getaddrinfo" and arguments[0] not in (None, "", "localhost", "127.0.0.1", os.uname().nodename)
        address = arguments[0] if asked else None
    if asked:
        with open(os.environ["NETWORK_WITNESS"], "a") as stream:
            print(sys.argv, event, address, file=stream)

sys.addaudithook(hook)
"""
"""Runs before everything else in a process of Python and in those that it starts: writes down what is asked of the network."""


def strange_lines(witness: Path, *command: object) -> list[str]:
    """Lines that a command prints and that are neither ours nor a bar."""
    quieter = ("TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in quieter}
    environment |= {"PYTHONPATH": str(witness.parent), "NETWORK_WITNESS": str(witness)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**environment, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    errors = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and not BAR.search(line)]
    return errors + [line for line in done.stdout.splitlines() if line.strip() and not OURS.match(line)]


@pytest.mark.slow
@pytest.mark.timeout(900)  # ten processes, each of which imports everything
def test_no_line_of_a_library_and_nothing_asked_of_the_network(tmp_path):
    witness = tmp_path / "witness" / "asked.txt"
    witness.parent.mkdir()
    (witness.parent / "sitecustomize.py").write_text(WITNESS)
    log = "user_id,item_id,timestamp\n" + "".join(f"u{n // 4},i{n % 12},{n}\n" for n in range(80))
    (tmp_path / "log.csv").write_text(log)
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
        ["hub/index.py", "search", "--index", tmp_path / "index", "--id", "i3"],
        ["hub/gallery.py", "--model", model, "--items", items, "--output", tmp_path / "page.html"],
        ["training/mine.py", "--interactions", tmp_path / "log.csv", "--output", tmp_path / "mined.parquet"],
        [
            *("training/hard_negatives.py", "--model", model, "--items", items, "--pairs", tmp_path / "train.jsonl"),
            *("--output", tmp_path / "hard.parquet", "--negatives", 2, "--neighbours", 4),
        ],
    ]:
        assert strange_lines(witness, *command) == [], command[0]
    assert not witness.exists(), witness.read_text()
    subprocess.run(
        [sys.executable, "-c", "import socket\ntry: socket.getaddrinfo('example.org', 80)\nexcept OSError: pass"],
        env={**os.environ, "PYTHONPATH": str(witness.parent), "NETWORK_WITNESS": str(witness)},
    )
    assert "example.org" in witness.read_text(), "the witness sees who asks"
