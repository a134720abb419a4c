"""Both protocols, the metrics, their intervals and comparisons, against the plainest possible implementations."""

import numpy as np
import pytest
import torch

from training.evaluation import retrieval
from training.evaluation.metrics import (
    Bootstrap,
    compare,
    intervals,
    multi_positive_metrics,
    published_metrics,
    rank_percentiles,
    single_target_metrics,
)
from training.evaluation.retrieval import RetrievalResult, nearest, rank_all_targets, rank_targets


def tied_embeddings(generator: np.random.Generator, items: int, width: int) -> torch.Tensor:
    """Unit vectors, a third of them copies of others, some nearly so: far closer than float32's dot products tell."""
    vectors = generator.normal(size=(items, width))
    copies = generator.integers(items, size=(2, items // 3))
    vectors[copies[0]] = vectors[copies[1]]
    vectors[: items // 6] += 1e-7 * generator.normal(size=(items // 6, width))
    return torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1).float()


def random_pairs(generator: np.random.Generator, items: int, count: int) -> list[tuple[str, str]]:
    """With repeats, self pairs and unknown items among them."""
    return [(str(a), str(b)) for a, b in generator.integers(items + 2, size=(count, 2)).tolist()]


def exact_scores(embeddings: torch.Tensor) -> np.ndarray:
    """In float64; what differs by float64's rounding alone is made equal."""
    return (embeddings.double() @ embeddings.double().T).numpy().round(11)


@pytest.fixture(params=[1, 5, 256])
def rows(request, monkeypatch):
    """Queries of a tile; blocks are small too, so that several threads count."""
    monkeypatch.setattr(retrieval, "ROWS", request.param)
    monkeypatch.setattr(retrieval, "BLOCK", 7)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tile", [1, 6, 1024])
def test_published_ranks_equal_brute_force_with_ties(seed, tile, rows):
    generator = np.random.default_rng(seed)
    items = int(generator.integers(20, 90))
    embeddings = tied_embeddings(generator, items, int(generator.integers(2, 40)))
    pairs = random_pairs(generator, items, 60)

    result = rank_targets(embeddings, [str(i) for i in range(items)], pairs, tile)

    scores = exact_scores(embeddings)
    pool = np.setdiff1d(np.arange(items), result.queries.numpy())
    expected = [
        (scores[query, pool] >= scores[query, target]).sum()
        for query, target in zip(result.queries.tolist(), result.targets.tolist(), strict=True)
    ]
    assert result.ranks.tolist() == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tile", [1, 6, 1024])
def test_all_targets_rank_as_in_a_sorted_list_with_ties(seed, tile, rows):
    generator = np.random.default_rng(seed)
    items = int(generator.integers(20, 90))
    embeddings = tied_embeddings(generator, items, int(generator.integers(2, 40)))
    pairs = random_pairs(generator, items, 200)

    result = rank_all_targets(embeddings, [str(i) for i in range(items)], pairs, tile)

    ids = {str(i) for i in range(items)}
    known = {(int(a), int(b)) for a, b in pairs if {a, b} <= ids and a != b}
    assert result.unknown_pairs == sum(not {a, b} <= ids for a, b in pairs)
    assert len(result.ranks) + result.unknown_pairs + result.repeated_pairs == len(pairs)
    scores = exact_scores(embeddings)
    assert {int(query) for query in result.queries} == {query for query, _ in known}
    for number, query in enumerate(result.queries.tolist()):
        targets = {b for a, b in known if a == query}
        others = [i for i in range(items) if i != query]
        order = sorted(others, key=lambda i: (-scores[query, i], i in targets))  # of equal scores, targets last
        mine = result.query_of == number
        assert sorted(result.ranks[mine].tolist()) == [p + 1 for p, i in enumerate(order) if i in targets]
        assert set(result.targets[mine].tolist()) == targets


def test_float32_sees_differences_that_only_float64_has():
    """Long vectors whose scores differ, by their last component, by less than float32's dot products are off."""
    vectors = torch.zeros(40, 512, dtype=torch.float64)
    vectors[:, :-1] = torch.randn(511, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors[:, -1] = torch.arange(40) * 1e-7
    vectors[0, -1] = 20
    embeddings = torch.nn.functional.normalize(vectors, dim=1)
    scores = embeddings[0] @ embeddings.T
    assert scores[1:].float().unique().numel() < 10
    expected = list(range(39, 0, -1))  # item 39 scores highest

    found = [
        rank_targets(embeddings, [str(i) for i in range(40)], [("0", str(target))]).ranks.item()
        for target in range(1, 40)
    ]

    assert found == expected


def test_ranks_leave_the_number_of_threads_and_stay_exact_when_float32_is_cut():
    embeddings = tied_embeddings(np.random.default_rng(0), 80, 16)
    ids, pairs = [str(i) for i in range(80)], [(str(i), str(i + 40)) for i in range(40)]
    threads = torch.get_num_threads()
    expected = rank_targets(embeddings, ids, pairs).ranks
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(rank_targets(embeddings, ids, pairs).ranks, expected)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.get_num_threads() == threads


def test_a_model_without_distinctions_gets_the_last_ranks():
    embeddings = torch.nn.functional.normalize(torch.ones(30, 8), dim=1)
    ids = [str(i) for i in range(30)]

    result = rank_all_targets(embeddings, ids, [("0", "1"), ("0", "2"), ("5", "1")])

    assert sorted(result.ranks[result.query_of == 0].tolist()) == [28, 29]
    assert result.ranks[result.query_of == 1].tolist() == [29]


def test_single_target_metrics_by_hand():
    ranks = torch.tensor([1, 3, 11])
    nothing = torch.zeros(3, dtype=torch.int64)
    metrics = published_metrics(RetrievalResult(ranks, 50, 0, 0, nothing, nothing), [1, 10])

    assert metrics["recall@1"].tolist() == [1, 0, 0]
    assert metrics["recall@10"].tolist() == [1, 1, 0]
    assert metrics["ndcg@10"].tolist() == [1, 0.5, 0]  # 1 / log2(1 + 3)
    assert metrics["mrr"].tolist() == pytest.approx([1, 1 / 3, 1 / 11])
    assert rank_percentiles(np.arange(1, 101)) == {"10": 10, "25": 25, "50": 50, "75": 75, "90": 90, "99": 99}


@pytest.mark.parametrize("seed", range(3))
def test_multi_positive_metrics_equal_loops_and_scikit_learn(seed):
    from sklearn.metrics import ndcg_score

    generator = np.random.default_rng(seed)
    embeddings = torch.nn.functional.normalize(torch.from_numpy(generator.normal(size=(50, 6))), dim=1)
    result = rank_all_targets(embeddings, [str(i) for i in range(50)], random_pairs(generator, 50, 150))

    metrics = multi_positive_metrics(result, [1, 5, 20])

    scores = (embeddings @ embeddings.T).numpy()
    for number, query in enumerate(result.queries.tolist()):
        ranks = result.ranks[result.query_of == number].numpy()
        relevant = np.zeros(50)
        relevant[result.targets[result.query_of == number].numpy()] = 1
        others = np.arange(50) != query
        for k in (1, 5, 20):
            assert metrics[f"recall@{k}"][number] == pytest.approx((ranks <= k).sum() / len(ranks))
            assert metrics[f"hit_rate@{k}"][number] == (ranks.min() <= k)
            ndcg = ndcg_score(relevant[None, others], scores[query][None, others], k=k)
            assert metrics[f"ndcg@{k}"][number] == pytest.approx(ndcg)
        assert metrics["mrr"][number] == pytest.approx(1 / ranks.min())


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        drawn = {"hit": (generator.random(200) < 0.3).astype(float)}
        found = intervals(drawn, Bootstrap(resamples=300, confidence=0.9, seed=seed))["hit"]
        assert found["low"] <= found["value"] <= found["high"]
        covered += found["low"] <= 0.3 <= found["high"]

    assert 0.85 < covered / 300 < 0.95


def test_draws_depend_on_the_seed_alone_and_not_on_the_memory(monkeypatch):
    values = {"a": np.random.default_rng(1).random(40), "b": np.ones(40)}
    whole = intervals(values, Bootstrap(resamples=100, seed=3))
    monkeypatch.setattr("training.evaluation.metrics.DRAWS", 120)

    pieces = intervals(values, Bootstrap(resamples=100, seed=3))
    assert all(pieces[name] == pytest.approx(whole[name]) for name in values)
    assert intervals(values, Bootstrap(resamples=100, seed=4)) != whole
    assert whole["b"] == {"value": 1, "low": 1, "high": 1}


def test_comparison_finds_a_difference_and_only_where_there_is_one():
    generator = np.random.default_rng(0)
    options = Bootstrap(resamples=500)
    base = single_target_metrics(generator.integers(1, 100, size=400), [10])
    better = {name: np.minimum(1, values + 0.1 * generator.random(400)) for name, values in base.items()}

    found = compare(better, base, options)
    swapped = compare(base, better, options)
    same = compare(base, base, options)

    for name in base:
        assert found[name]["difference"] == pytest.approx((better[name] - base[name]).mean())
        assert 0 < found[name]["low"] < found[name]["difference"] < found[name]["high"]
        assert found[name]["p_value"] == pytest.approx(1 / 501)
        assert swapped[name]["p_value"] == found[name]["p_value"]
        assert (same[name]["difference"], same[name]["p_value"]) == (0, 1)
    with pytest.raises(ValueError, match="same metrics of the same queries: 400 and 399"):
        compare(base, {name: values[1:] for name, values in base.items()}, options)


def test_p_values_are_uniform_without_a_difference():
    generator = np.random.default_rng(0)
    options = Bootstrap(resamples=200)
    noise = [{"x": generator.normal(size=60)} for _ in range(200)]
    p_values = np.array([compare(one, {"x": np.zeros(60)}, options)["x"]["p_value"] for one in noise])

    assert 0.01 < (p_values <= 0.05).mean() < 0.1
    assert 0.4 < p_values.mean() < 0.6


def test_nearest_equals_a_sort_and_leaves_the_query_out(monkeypatch):
    monkeypatch.setattr(retrieval, "SCORES", 10)
    embeddings = torch.nn.functional.normalize(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    candidates = torch.arange(3, 40)
    scores = embeddings.double() @ embeddings.double().T

    found, rows = nearest(embeddings, torch.tensor([0, 7]), candidates, 4)

    for row, query in enumerate([0, 7]):
        order = sorted((i for i in candidates.tolist() if i != query), key=lambda i: -scores[query, i])
        assert rows[row].tolist() == order[:4]
        assert torch.allclose(found[row], scores[query, order[:4]])


def test_unusable_settings_are_refused():
    with pytest.raises(ValueError, match="confidence"):
        Bootstrap(confidence=1.5)
    with pytest.raises(ValueError, match="No query"):
        intervals({"a": np.zeros(0)}, Bootstrap())
    with pytest.raises(ValueError, match="No pair can be evaluated: of 1 pairs 1 name"):
        rank_all_targets(torch.eye(3), list("abc"), [("x", "y")])
