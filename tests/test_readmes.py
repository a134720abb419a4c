"""Every Python block and every command of the README files is run, on tiny models and tables in the places they name."""

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.models import save_dual_encoder, save_named_halves, save_text_model
from tests.support.native_models import saved_checkpoint
from tests.support.server import started


ROOT = Path(__file__).parents[1]
READMES = ["README.md", "training/README.md", "hub/README.md"]

STAND_INS = {
    "Qwen/Qwen3-0.6B": "backbones/text",
    "google/siglip2-base-patch16-224": "backbones/vision",
    "Qwen/Qwen3-VL-Embedding-2B": "backbones/native",
    "sentence-transformers/all-MiniLM-L6-v2": "others/texts",
    "openai/clip-vit-base-patch32": "others/clip",
    "ORG/NAME": "org/readme",
    "ITEMS": "items.parquet",
    "PAIRS": "pairs.parquet",
    "INDEX": "runs/demo/index",
    "DIR": "runs/demo/model",
}
"""What a reader puts in place of a name, here."""

SHORTER = {
    "training/run.py": ["--max_steps", "2", "--per_device_train_batch_size", "4", "--report", "false"],
    "training/align.py": ["--steps", "2", "--batch_size", "4", "--caption_weight", "0"],
    "hub/serve.py": ["--port", "0"],
}
"""Options that end a command sooner, or keep it from others' way; the tiny LLM has no output layer to write captions with."""

ELSEWHERE = {
    "hub/app.py": "it serves until it is stopped: tests/hub/pages/test_app.py",
    "hub/convert_official.py": "it needs a research checkpoint: tests/hub/backbones/test_convert_official.py",
    "training.experiments.movielens": "tests/training/experiments/test_movielens.py",
    "s3://": "it needs a network: tests/training/test_remote_runs.py",
    "--text_layers": "it reads the packaged backbones: tests/hub/backbones",
    **dict.fromkeys(
        ("ORG/BASE", "ORG/DATA", "ORG/APP"), "it sends to the Hub: tests/hub/publishing/test_publish_others.py"
    ),
    "ORG/SERVER": "it sends to the Hub: tests/hub/serving/test_container.py",
    "hub/mteb_task.py": "it needs mteb: tests/hub/benchmark/test_mteb_task.py",
    "import mteb": "it downloads a task: tests/hub/benchmark/test_mteb_task.py",
    "qdrant_client": "it needs a server",
    "pymilvus": "it needs a server",
    "runs/movielens/data": "it needs the packaged log: tests/training/mining/test_mining.py",
}
"""What is not run here, by a text in it, and why."""


def blocks(readme: str) -> list[str]:
    """Python blocks and commands in the order in which they stand."""
    text = (ROOT / readme).read_text(encoding="utf-8").replace("\\\n", " ")
    pattern = r"^```python\n(.*?)^```|^    (python (?:training|hub|-m)[^\n]*?)(?:    +#[^\n]*)?$"
    return [(match[1] or match[2]).strip() for match in re.finditer(pattern, text, re.M | re.S)]


@pytest.fixture
def clone(tmp_path, tiny_model_folder):
    """A folder with the code and all that the README files start from."""
    folder = tmp_path
    for name in ("training", "hub", "modeling_notellm2", "LICENSE", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    demo = folder / "runs" / "demo"
    shutil.copytree(tiny_model_folder, demo / "model")
    shutil.copytree(tiny_model_folder, demo / "base")
    rows = []
    for number in range(48):
        item_id = "1f43c" if number == 0 else f"i{number}"
        Image.new("RGB", (40, 40), (5 * number, 90, 255 - 5 * number)).save(folder / f"{item_id}.png")
        rows.append(
            {
                "item_id": item_id,
                "title": f"thing {number}",
                "topics": ["things"],
                "image": {"bytes": (folder / f"{item_id}.png").read_bytes(), "path": None},
                "subcategory": f"kind {number % 4}",
                "split": "test" if number % 3 == 0 else "train",
            }
        )
    for name in ("panda.png", "raccoon.png"):
        shutil.copy(folder / "i1.png", folder / name)
    (demo / "data").mkdir()
    pairs = {
        split: [
            {"query_id": a["item_id"], "target_id": b["item_id"], "subcategory": a["subcategory"]}
            for a in rows
            for b in rows
            if a is not b and a["subcategory"] == b["subcategory"] and a["split"] == b["split"] == split
        ]
        for split in ("train", "test")
    }
    log = [
        {"user_id": f"u{user}", "item_id": rows[(user * 7 + step) % 48]["item_id"], "timestamp": 10**9 + step}
        for user in range(60)
        for step in range(6)
    ]
    tables = {"items": rows, "train_pairs": pairs["train"], "test_pairs": pairs["test"]}
    for name, content in tables.items():
        pq.write_table(pa.Table.from_pylist(content), demo / "data" / f"{name}.parquet")
        shutil.copy(demo / "data" / f"{name}.parquet", folder / f"{name}.parquet")
    pq.write_table(pa.Table.from_pylist(log), folder / "log.parquet")
    save_named_halves(folder / "backbones")
    saved_checkpoint("qwen3_vl", folder / "backbones" / "native")
    save_text_model(folder / "others" / "texts")
    save_dual_encoder("clip", folder / "others" / "clip")
    return folder


def run_command(line: str) -> None:
    """Run `python SCRIPT ...` in this process, as a shell in this folder would; a server in its own, for a question."""
    for name, stand_in in STAND_INS.items():
        line = re.sub(rf"(?<![\w/]){name}(?![\w/])", stand_in, line)
    _, script, *options = shlex.split(line)
    if script == "hub/serve.py":  # until it is stopped
        with started([sys.executable, script, *options, *SHORTER[script]], os.environ) as running:
            assert httpx.get(f"{running.url}/health").json()["indexed_items"]
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *options, *SHORTER.get(script, [])])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
    assert ended.value.code in (None, 0, 3), f"{line}\n{ended.value.code}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("readme", READMES)
def test_what_a_readme_shows_works(readme, clone, monkeypatch):
    monkeypatch.chdir(clone)
    if readme == "training/README.md":
        shutil.copytree("runs/demo/base", "models/base")  # another README makes it, and the pairs
        shutil.copy("train_pairs.parquet", "pairs.parquet")
    names: dict = {"query": [0.0] * 24, "embeddings": np.zeros((2, 24))}
    for block in blocks(readme):
        if any(text in block for text in ELSEWHERE):
            continue
        if block.startswith("python "):
            run_command(block)
        else:
            exec(compile(block, readme, "exec"), names)
    if readme == "training/README.md":
        trained = json.loads(Path("runs/qwen3/model/config.json").read_text(encoding="utf-8"))
        families = [trained[part]["model_type"] for part in ("text_config", "vision_config")]
        assert families == ["qwen3", "siglip_vision_model"]


def test_nothing_is_left_out_for_a_reason_that_is_gone():
    everything = "\n".join(block for readme in READMES for block in blocks(readme))
    assert [text for text in ELSEWHERE if text not in everything] == []


def test_make_targets_and_files_that_are_named_exist():
    for readme in READMES:
        text = (ROOT / readme).read_text(encoding="utf-8")
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(f"\n{target}:" in makefile for target in re.findall(r"(?:`|^    )make ([a-z]+)", text, re.M))
        folder = (ROOT / readme).parent
        assert all((folder / link).exists() for link in re.findall(r"\]\(([^)#:]+)\)", text))
        assert all((ROOT / path).exists() for path in re.findall(r"`((?:training|hub|tests)/[\w/.]+)`", text))
