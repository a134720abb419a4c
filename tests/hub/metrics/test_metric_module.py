"""The `evaluate` module: loaded offline by a process without this package, equal to the published numbers and to training's."""

import json
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training.evaluation.retrieval import rank_targets


ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "hub" / "metrics" / "i2i_recall"
REFERENCE = Path(__file__).parents[2] / "reference" / "recall"


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("evaluate")))


def random_items(seed: int, n: int = 80, width: int = 5) -> tuple[np.ndarray, list[str], list[tuple[str, str]]]:
    """Embeddings of a few values only, so that ties abound, and pairs of all kinds."""
    draw = np.random.default_rng(seed)
    embeddings = draw.integers(-2, 3, (n, width)).astype(np.float32) + np.float32(0.25)
    ids = [f"i{number}" for number in range(n)]
    pairs = [(f"i{a}", f"i{b}") for a, b in draw.integers(0, n + 4, (200, 2))]
    return embeddings, ids, pairs


@pytest.mark.parametrize("name", ["dense", "sparse", "wide"])
def test_published_recall_is_reproduced_exactly(metric, name):
    record = json.loads((REFERENCE / f"{name}.json").read_text())
    embeddings = load_file(REFERENCE / f"{name}.safetensors")["embeddings"].numpy()
    ks = [int(key.removeprefix("R@")) for key in record["metrics"]]
    result = metric.compute(predictions=embeddings, references=record["item_ids"], pairs=record["pairs"], k=ks)
    assert {f"R@{k}": result[f"recall@{k}"] for k in ks} == record["metrics"]


@pytest.mark.parametrize("seed", range(4))
def test_published_protocol_equals_trainings_ties_and_all(metric, seed):
    embeddings, ids, pairs = random_items(seed)
    expected = rank_targets(torch.from_numpy(embeddings), ids, pairs)
    ks = [1, 3, 10, 40]
    for tile in (3, 2048):
        result = metric.compute(predictions=embeddings, references=ids, pairs=pairs, k=ks, tile=tile)
        assert [result[f"recall@{k}"] for k in ks] == pytest.approx([expected.recall(k) for k in ks], abs=1e-15)
        assert result["queries"] == len(expected.ranks) and result["candidates"] == expected.pool_size
        assert result["unknown_pairs"] == expected.unknown_pairs and result["repeated_pairs"] == expected.repeated_pairs
        assert result["mrr"] == pytest.approx((1 / expected.ranks.double()).mean().item())


@pytest.mark.parametrize("seed", range(4))
def test_several_right_answers_equal_a_sort_by_hand(metric, seed):
    embeddings, ids, pairs = random_items(seed)
    right: dict[str, set[str]] = {}
    for query, target in pairs:
        if query in ids and target in ids and query != target:
            right.setdefault(query, set()).add(target)
    recalls, hits, reciprocal = [], [], []
    for query, own in right.items():
        scores = {
            other: float(embeddings[ids.index(query)] @ embeddings[ids.index(other)]) for other in ids if other != query
        }
        ranking = sorted(scores, key=lambda other: (-scores[other], other in own))  # wrong answers first among equals
        found = [other in own for other in ranking]
        recalls.append(sum(found[:10]) / len(own))
        hits.append(any(found[:10]))
        reciprocal.append(1 / (found.index(True) + 1))
    for tile in (4, 2048):
        result = metric.compute(
            predictions=embeddings, references=ids, pairs=pairs, k=[10], protocol="multi_positive", tile=tile
        )
        assert result["recall@10"] == pytest.approx(np.mean(recalls))
        assert result["hit_rate@10"] == pytest.approx(np.mean(hits))
        assert result["mrr"] == pytest.approx(np.mean(reciprocal))
        assert (result["queries"], result["candidates"]) == (len(right), len(ids) - 1)


def test_a_model_that_tells_nothing_apart_gets_the_last_rank(metric):
    same, ids = np.ones((50, 4), np.float32), [str(n) for n in range(50)]
    for protocol, rank in (("published", 49), ("multi_positive", 49)):
        result = metric.compute(predictions=same, references=ids, pairs=[("0", "1")], k=[48, 49], protocol=protocol)
        assert (result["recall@48"], result["recall@49"], result["mrr"]) == (0, 1, 1 / rank)


def test_batches_may_be_added_one_by_one(metric):
    embeddings, ids, pairs = random_items(9)
    whole = metric.compute(predictions=embeddings, references=ids, pairs=pairs)
    for start in range(0, len(ids), 30):
        metric.add_batch(predictions=embeddings[start : start + 30], references=ids[start : start + 30])
    assert metric.compute(pairs=pairs) == whole


def test_what_cannot_be_used_is_refused_with_the_reason(metric):
    def compute(predictions, references, pairs, **options):
        return metric.compute(predictions=predictions, references=references, pairs=pairs, **options)

    eye = np.eye(3, dtype=np.float32)
    for reason, call in {
        "None of 1 pairs": lambda: compute(eye, list("abc"), [("x", "y")]),
        "different ids; got 2": lambda: compute(eye, list("aab"), [("a", "b")]),
        "row 1": lambda: compute(np.where(eye * [[0], [1], [0]], np.nan, eye), list("abc"), [("a", "b")]),
        "one width": lambda: compute([[1.0], [1.0, 2.0]], list("ab"), [("a", "b")]),
        "expected one of": lambda: compute(eye, list("abc"), [("a", "b")], protocol="other"),
        "at least 1": lambda: compute(eye, list("abc"), [("a", "b")], k=[0]),
    }.items():
        with pytest.raises(ValueError, match=reason):
            call()


def test_the_card_example_runs_elsewhere_and_prints_what_it_says(tmp_path):
    """In a process that neither sees this repository nor the Hub."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0].replace("hub/metrics/i2i_recall", str(FOLDER))
    said = code.strip().splitlines()[-1].removeprefix("# ")
    environment = {
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == said
