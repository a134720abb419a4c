"""A run whose tables and pictures all lie elsewhere, trained and measured by the commands."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.training_runs import finish
from tests.support.web_server import WebServer


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def web(coloured_tables, tmp_path):
    """The coloured items, each picture at an address; that of i9 is gone."""
    table = pq.read_table(coloured_tables / "items.parquet")
    items = table.select(["item_id", "title", "colour", "split"]).to_pylist()
    with WebServer() as server:
        for item, image in zip(items, table["image"].to_pylist(), strict=True):
            if image is not None:
                server.answers[f"/pictures/{item['item_id']}.png"] = (200, image["bytes"])
                item["image"] = f"pictures/{item['item_id']}.png"
        server.answers["/pictures/i9.png"] = 404
        server.answers["/items.jsonl"] = (200, "\n".join(map(json.dumps, items)).encode())
        for name in ("train", "test"):
            server.answers[f"/{name}.jsonl"] = (200, (coloured_tables / f"{name}.jsonl").read_bytes())
        yield server


def test_a_run_on_tables_and_pictures_elsewhere(web, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tables = ["--items", f"{web.url}/items.jsonl", "--eval_split", "test", "--allow_remote", web.host]
    run = ["--model", tiny_model_folder, "--output_dir", tmp_path / "run", "--max_steps", "1", "--use_cpu", "true"]
    pairs = ["--train_pairs", f"{web.url}/train.jsonl", "--eval_pairs", f"{web.url}/test.jsonl"]
    finish([str(part) for part in [*run, *tables, *pairs, "--cache_vision_features", "true"]])
    figures = json.loads((tmp_path / "run/metrics.json").read_text())
    assert figures["counts"]["items"] == 143 and figures["settings"]["allow_remote"] == web.host
    rejects = [json.loads(line) for line in (tmp_path / "run/rejects.jsonl").read_text().splitlines()]
    assert {tuple(reject["ids"]) for reject in rejects if "i9.png answered 404" in reject["reason"]} == {("i9",)}

    asked = len(web.asked)
    evaluate = [sys.executable, "training/evaluate.py", "--model", tmp_path / "run/model", "--output", tmp_path / "out"]
    command = [*evaluate, *tables, "--pairs", f"{web.url}/test.jsonl", "--resamples", "20"]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr[-3000:]
    again = web.asked[asked:]
    assert set(again) == {"/items.jsonl", "/test.jsonl", "/pictures/i9.png"}
    figures = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert figures["counts"]["items"] == 72
