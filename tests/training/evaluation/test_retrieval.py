"""The retrieval metrics against published numbers and against the plainest possible implementation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.evaluation.retrieval import (
    expected_precision,
    precision_at_k,
    precisions_at_k,
    rank_targets,
    recall_at_k,
)


REFERENCE = Path(__file__).parents[2] / "reference" / "recall"


@pytest.mark.parametrize("name", ["dense", "sparse", "wide"])
def test_published_recall_is_reproduced_exactly(name):
    record = json.loads((REFERENCE / f"{name}.json").read_text())
    embeddings = load_file(REFERENCE / f"{name}.safetensors")["embeddings"]
    ks = [int(metric.removeprefix("R@")) for metric in record["metrics"]]

    recall = recall_at_k(embeddings, record["item_ids"], record["pairs"], ks)

    assert {f"R@{k}": value for k, value in recall.items()} == record["metrics"]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_a_full_sort_whatever_the_tile(seed):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.nn.functional.normalize(torch.randn(90, 6, generator=generator), dim=1)
    ids = [f"item{i}" for i in range(90)]
    order = torch.randperm(90, generator=generator).tolist()
    pairs = [(ids[a], ids[b]) for a, b in zip(order[:30], order[30:60], strict=True)]

    pool = [i for i in range(90) if i not in order[:30]]
    naive = []
    for query, target in zip(order[:30], order[30:60], strict=True):
        ranking = sorted(pool, key=lambda i: -(embeddings[query].double() @ embeddings[i].double()).item())
        naive.append(ranking.index(target) + 1)

    for tile in (1, 7, 4096):
        assert rank_targets(embeddings, ids, pairs, tile=tile).ranks.tolist() == naive


def test_walk_skips_unknown_and_repeated_members_in_order():
    embeddings = torch.eye(6)
    pairs = [("a", "b"), ("x", "c"), ("b", "c"), ("c", "d"), ("e", "a"), ("f", "f"), ("e", "f")]

    result = rank_targets(embeddings, list("abcdef"), pairs)

    assert (len(result.ranks), result.pool_size) == (3, 3)
    assert (result.unknown_pairs, result.repeated_pairs) == (1, 3)
    assert result.expected_recall(1) == pytest.approx(1 / 3)


def test_ties_count_against_the_model():
    embeddings = torch.nn.functional.normalize(torch.ones(50, 8), dim=1)
    ids = [str(i) for i in range(50)]

    assert rank_targets(embeddings, ids, [("0", "1"), ("2", "3")], tile=7).ranks.tolist() == [48, 48]
    assert precision_at_k(embeddings, [i % 2 for i in range(50)], 10) == 0


@pytest.mark.parametrize("k", [1, 4])
def test_precision_equals_a_full_sort(k):
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.nn.functional.normalize(torch.randn(60, 5, generator=generator), dim=1)
    labels = torch.randint(0, 4, (60,), generator=generator).tolist()
    scores = embeddings @ embeddings.T
    scores.fill_diagonal_(-9)
    naive = [labels[j] == labels[i] for i in range(60) for j in scores[i].argsort(descending=True)[:k].tolist()]

    assert precision_at_k(embeddings, labels, k) == pytest.approx(sum(naive) / len(naive))
    same = sum(labels[i] == labels[j] for i in range(60) for j in range(60) if i != j)
    assert expected_precision(labels) == pytest.approx(same / (60 * 59))


def test_unusable_input_is_refused_with_the_reason():
    embeddings = torch.eye(3)
    with pytest.raises(ValueError, match="No pair can be evaluated"):
        rank_targets(embeddings, list("abc"), [("x", "y")])
    with pytest.raises(ValueError, match="different ids"):
        rank_targets(embeddings, list("aab"), [("a", "b")])
    embeddings[1, 1] = torch.nan
    with pytest.raises(ValueError, match="row 1"):
        rank_targets(embeddings, list("abc"), [("a", "b")])
    with pytest.raises(ValueError, match="more than 3 items"):
        precision_at_k(torch.eye(3), list("abc"), 3)


@pytest.mark.parametrize("missing", [None, float("nan"), "", " "])
def test_an_item_without_a_label_is_nobodys_neighbour(missing):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(60, 6, generator=generator), dim=1)
    labels = [missing if number % 3 else f"c{number % 2}" for number in range(60)]
    scores = embeddings.double() @ embeddings.double().T
    scores.fill_diagonal_(-2)
    near = scores.topk(5, dim=1).indices.tolist()
    naive = [sum(labels[row] == labels[n] for row in near[n]) / 5 for n in range(0, 60, 3)]
    assert precisions_at_k(embeddings, labels, 5).tolist() == pytest.approx(naive)
    assert precision_at_k(embeddings, labels, 5) == pytest.approx(sum(naive) / 20)
    assert expected_precision(labels) == pytest.approx(2 * 10 * 9 / (20 * 59))
    alone = [f"c{number}" if number < 10 else missing for number in range(60)]
    assert precision_at_k(embeddings, alone, 10) == expected_precision(alone) == 0
    with pytest.raises(ValueError, match="None of 60 items has a label"):
        precision_at_k(embeddings, [missing] * 60, 10)
