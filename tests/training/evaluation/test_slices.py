"""Slices: every query in one slice of each group, the right one, with the recall of its members."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from modeling_notellm2.prompts_notellm2 import FieldLimits
from tests.support.catalogue import png
from training.evaluation.metrics import Bootstrap
from training.evaluation.slices import ItemFacts, count_in_pairs, item_facts, measure_slices, query_slices
from training.tables.items import load_items


def facts_of(generator: np.random.Generator, items: int) -> ItemFacts:
    has_text = generator.random(items) < 0.8
    return ItemFacts(
        characters=np.where(has_text, generator.integers(1, 100, items), 0),
        has_text=has_text,
        has_image=~has_text | (generator.random(items) < 0.7),
        popularity=generator.integers(0, 6, items),
        labels=[None if code == 9 else f"c{code}" for code in generator.integers(0, 10, items)],
    )


@pytest.mark.parametrize("thresholds", [(), (20, 50)])
def test_every_query_is_in_one_slice_of_each_group(thresholds):
    generator = np.random.default_rng(0)
    facts = facts_of(generator, 300)
    queries, targets = generator.permutation(300).reshape(2, 150)

    slices = query_slices(facts, queries, targets, thresholds, top_categories=3)

    groups = {one.group for one in slices}
    assert groups == {
        *(f"{side} {what}" for side in ("query", "target") for what in ("text length", "fields", "popularity")),
        "unseen items",
        "query category",
    }
    for group in groups:
        assert (sum(one.members.astype(int) for one in slices if one.group == group) == 1).all()
    if thresholds:
        found = {one.name: one.members for one in slices if one.group == "query text length"}
        length, written = facts.characters[queries], facts.has_text[queries]
        assert (found["short (up to 20 characters)"] == (written & (length <= 20))).all()
        assert (found["medium (21 to 50 characters)"] == (written & (length > 20) & (length <= 50))).all()
        assert (found["long (over 50 characters)"] == (written & (length > 50))).all()
        assert (found["no text"] == ~written).all()
    unseen = {one.name: one.members for one in slices if one.group == "unseen items"}
    assert (unseen["target unseen"] == ((facts.popularity[queries] > 0) & (facts.popularity[targets] == 0))).all()
    categories = [one for one in slices if one.group == "query category"]
    assert len(categories) == 4 and categories[-1].name == "rest (all other categories)"
    assert categories[0].members.sum() >= categories[1].members.sum() >= categories[2].members.sum()


def test_recall_of_a_slice_is_that_of_its_queries():
    generator = np.random.default_rng(1)
    facts = facts_of(generator, 200)
    queries, targets = generator.permutation(200).reshape(2, 100)
    ranks = generator.integers(1, 40, 100)
    slices = query_slices(facts, queries, targets)

    rows = list(measure_slices(slices, ranks, [1, 10], Bootstrap(resamples=50)))

    for one, row in zip(slices, rows, strict=True):
        assert (row["group"], row["slice"], row["queries"]) == (one.group, one.name, one.members.sum())
        assert list(row["metrics"]) == ["recall@1", "recall@10"]
        found = row["metrics"]["recall@10"]
        assert found["value"] == pytest.approx((ranks[one.members] <= 10).mean())
        assert found["low"] <= found["value"] <= found["high"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        {"item_id": "a", "title": "four", "content": "four more", "image": None},
        {"item_id": "b", "title": None, "content": None, "image": {"bytes": png(1), "path": None}},
        {"item_id": "c", "title": "x" * 50, "content": None, "image": {"bytes": png(2), "path": None}},
    ]
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("item_id", "title", "content")}
        | {"image": datasets.Image(decode=False)}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "items.parquet")
    return tmp_path / "items.parquet"


def test_facts_of_a_table(table, tmp_path):
    items, _ = load_items(str(table))

    facts = item_facts(items, FieldLimits())

    assert facts.characters.tolist() == [13, 0, 20]  # the processor reads 20 characters of a title
    assert facts.has_text.tolist() == [True, False, True]
    assert facts.has_image.tolist() == [False, True, True]

    pairs = tmp_path / "pairs.csv"
    pairs.write_text("query_id,target_id\na,b\na,elsewhere\nnowhere,b\nb,a\nc,c\n")
    assert count_in_pairs(str(pairs), items).tolist() == [3, 3, 1]


def test_thresholds_must_ascend():
    facts = facts_of(np.random.default_rng(0), 10)
    with pytest.raises(ValueError, match="two ascending"):
        query_slices(facts, np.arange(5), np.arange(5, 10), (50, 20))


def test_items_without_a_category_are_one_slice():
    generator = np.random.default_rng(0)
    facts = replace(facts_of(generator, 6), labels=["a", None, "a", float("nan"), " ", "a"])
    slices = query_slices(facts, np.arange(6), np.arange(6))
    members = {one.name: one.members.tolist() for one in slices if one.group == "query category"}
    assert members == {
        "a": [True, False, True, False, False, True],
        "none": [False, True, False, True, True, False],
    }
