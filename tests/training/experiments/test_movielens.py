"""The real log's tables: whole, split by time without leaks, readable by training; baselines equal their definitions."""

import json
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from training.experiments.log_baselines import log_embeddings, measure_embeddings
from training.experiments.movielens import MovieLensArguments, prepare, read_items, read_log
from training.tables.commands.outputs import GENERATOR
from training.tables.items import load_items
from training.tables.pairs import load_pairs
from training.trainer.arguments import parse


ROOT = Path(__file__).parents[3]
WEEK = 7 * 86_400


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("movielens")
    return folder, *prepare(MovieLensArguments(str(folder)))


def test_items_and_log_are_whole():
    items, log = read_items(), read_log()
    assert len(items) == len({item["item_id"] for item in items}) == 1682
    assert items[0] == {
        "item_id": "1",
        "title": "Toy Story",
        "topics": ["Animation", "Children's", "Comedy"],
        "content": "1995",
    }
    assert [item["item_id"] for item in items if not (item["title"] or item["topics"] or item["content"])] == ["267"]
    assert len(log) == 100_000
    assert {row["item_id"] for row in log} == {item["item_id"] for item in items}
    assert all(a["timestamp"] <= b["timestamp"] for a, b in pairwise(log))


@pytest.mark.parametrize("side", ["train", "test"])
def test_pairs_come_from_their_side_alone(prepared, side):
    """Users, score and popularity cap of every pair, counted again from this side's ratings."""
    folder, mined, mining, _ = prepared
    split = int(mining.split_time)
    rated = defaultdict(dict)
    for row in read_log():
        if (row["timestamp"] < split) == (side == "train"):
            rated[row["user_id"]][row["item_id"]] = row["timestamp"]
    popularity = defaultdict(int)
    for films in rated.values():
        for film in films:
            popularity[film] += 1
    pairs = pq.read_table(folder / f"{side}_pairs.parquet").to_pylist()
    assert len(pairs) == list(mined.sides[side].values())[-1] > 5000
    for pair in pairs[::97]:
        query, target = pair["query_id"], pair["target_id"]
        both = [
            len(films)
            for films in rated.values()
            if query in films and target in films and abs(films[query] - films[target]) <= WEEK
        ]
        assert pair["users"] == len(both) >= 3
        assert pair["score"] == pytest.approx(sum(1 / count for count in both), abs=1e-9)
        assert max(popularity[query], popularity[target]) <= 0.2 * len(rated)


def test_training_reads_the_tables(prepared):
    folder, *_ = prepared
    items, rejects = load_items(str(folder / "items.parquet"))
    assert (len(items), len(rejects)) == (1681, 1)
    for side in ("train", "test"):
        pairs, rejects = load_pairs(str(folder / f"{side}_pairs.parquet"), items)
        assert len(pairs.pairs) > 5000
        assert len(rejects) <= 20  # those of the film without any text
    model, data, training = parse([str(ROOT / "training" / "experiments" / "movielens.yaml")])
    names = [Path(path).name for path in (data.items, data.train_pairs, data.eval_pairs)]
    assert names == ["items.parquet", "train_pairs.parquet", "test_pairs.parquet"]
    assert (model.model, training.output_dir) == ("runs/movielens/base", "runs/movielens")


def test_baselines_know_the_past_and_beat_chance(prepared):
    folder, *_, metrics = prepared
    assert json.loads((folder / "baselines.json").read_text()) == {**GENERATOR, **metrics}
    assert metrics["random"]["queries"] > 200
    for name in ("co-occurrence", "item cosine"):
        assert metrics[name]["recall@100"] > 4 * metrics["random"]["recall@100"]
        assert metrics[name]["recall@10"] > metrics["popularity"]["recall@10"]


def test_baseline_scores_equal_their_definitions():
    log = [("u", "a"), ("u", "b"), ("u", "b"), ("v", "a"), ("v", "b"), ("v", "c"), ("w", "c"), ("w", "other")]
    ids = ["a", "b", "c", "never"]
    found = log_embeddings(log, ids)
    scores = {name: embeddings @ embeddings.T for name, embeddings in found.items()}
    known = {"u": "ab", "v": "abc", "w": "c"}  # an item that is no candidate counts nowhere
    for row, first in enumerate(ids):
        for column, second in enumerate(ids):
            users = [items for items in known.values() if first in items and second in items]
            expected = sum(1 / len(items) for items in users)
            assert scores["co-occurrence"][row, column].item() == pytest.approx(expected)
    cosine = (1 / 2 + 1 / 3) / (1 / 2 + 1 / 3)
    assert scores["item cosine"][0, 1].item() == pytest.approx(cosine)
    assert (scores["popularity"].argsort(dim=1, descending=True)[:, -1] == 3).all()
    assert torch.equal(found["popularity"].flatten(), torch.tensor([3, 3, 3, 1], dtype=torch.float64))

    report = measure_embeddings(found, ids, [("a", "b")])
    assert report["random"]["recall@1"] == pytest.approx(1 / 3)
    assert report["co-occurrence"]["recall@1"] == 1.0
    assert report["popularity"]["recall@1"] == 0.0  # a tie with c counts against it
    with pytest.raises(ValueError, match="None of 1 interactions is with one of the 4 items"):
        log_embeddings([("u", "z")], ids)


def test_command_refuses_a_wrong_share(tmp_path):
    command = [sys.executable, "-m", "training.experiments.movielens", "--output", str(tmp_path), "--test_share", "2"]
    wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--test_share is 2.0" in wrong.stderr
