"""The demo's tables: what they hold, and that nothing held out or telling leaks; the baselines measured on them."""

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from training.evaluation.baselines import baseline_embeddings, contrastive_linear_map
from training.evaluation.retrieval import precision_at_k
from training.experiments import emoji as emoji_items
from training.experiments.emoji import EmojiArguments, build_tables
from training.tables.items import load_items
from training.tables.pairs import load_pairs


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tables():
    return build_tables(EmojiArguments(output="unused"))


def test_items_are_whole(tables):
    assert len(tables.items) == len({item["item_id"] for item in tables.items}) == 1645
    assert tables.flags_left_out == 258
    assert tables.rejects == []
    assert Counter(item["split"] for item in tables.items) == {"train": 1234, "test": 411}
    item = next(item for item in tables.items if item["item_id"] == "1f34e")
    assert (item["title"], item["topics"], item["content"]) == ("red apple", [], None)
    assert Image.open(io.BytesIO(item["image"]["bytes"])).size == (72, 72)


def test_pairs_keep_to_their_split_and_subcategory(tables):
    of = {item["item_id"]: item for item in tables.items}
    for split, pairs in (("train", tables.train_pairs), ("test", tables.test_pairs)):
        seen = [frozenset((pair["query_id"], pair["target_id"])) for pair in pairs]
        assert len(set(seen)) == len(seen)
        for pair in pairs:
            query, target = of[pair["query_id"]], of[pair["target_id"]]
            assert query is not target
            assert query["split"] == target["split"] == split
            assert query["subcategory"] == target["subcategory"] == pair["subcategory"]
    uses = Counter(pair[end] for pair in tables.train_pairs for end in ("query_id", "target_id"))
    assert max(uses.values()) == 20
    sizes = Counter(item["subcategory"] for item in tables.items if item["split"] == "test")
    assert len(tables.test_pairs) == sum(size * (size - 1) // 2 for size in sizes.values())


def test_same_seed_same_tables(tables):
    assert build_tables(EmojiArguments(output="unused")) == tables
    other = build_tables(EmojiArguments(output="unused", seed=1, country_flags=7, language="zh"))
    assert other.flags_left_out == 251
    assert {i["item_id"] for i in other.items if i["split"] == "test"} != {
        i["item_id"] for i in tables.items if i["split"] == "test"
    }
    apple = next(item for item in other.items if item["item_id"] == "1f34e")
    assert apple["content"] == "红苹果"


def test_texts_are_names_only(monkeypatch):
    """Renaming every category and subcategory changes no text."""
    read = emoji_items.read_emoji()
    renamed = [{**entry, "category": "xyzzy", "subcategory": "plugh"} for entry in read]
    monkeypatch.setattr(emoji_items, "read_emoji", lambda: renamed)
    items = build_tables(EmojiArguments(output="unused", language="zh")).items
    assert not any("xyzzy" in text or "plugh" in text for item in items for text in _texts(item))
    assert len(items) == len(read)


def test_an_emoji_without_picture_is_listed(monkeypatch):
    entries = [*emoji_items.read_emoji()[:40], {**emoji_items.read_emoji()[0], "unified": "10FFFF", "name": "NOTHING"}]
    monkeypatch.setattr(emoji_items, "read_emoji", lambda: entries)
    tables = build_tables(EmojiArguments(output="unused", country_flags=40))
    assert tables.rejects == [{"item_id": "10ffff", "title": "NOTHING", "reason": "no picture"}]
    assert len(tables.items) == 40


def test_command_writes_tables_that_training_reads(tmp_path):
    command = [sys.executable, "-m", "training.experiments.emoji", "--output", str(tmp_path / "data")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "1645 items in 99 subcategories" in done.stdout
    items, rejects = load_items(str(tmp_path / "data" / "items.parquet"))
    assert (len(items), len(rejects)) == (1645, 0)
    for name in ("train", "test"):
        pairs, rejects = load_pairs(str(tmp_path / "data" / f"{name}_pairs.parquet"), items, "train", "subcategory")
        assert len(pairs.pairs) > 1000
        assert len(rejects) == 0
    names = {"items.parquet", "train_pairs.parquet", "test_pairs.parquet", "rejects.jsonl"}
    assert {path.name for path in (tmp_path / "data").iterdir()} == names

    wrong = subprocess.run([*command, "--test_share", "1.5"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--test_share is 1.5" in wrong.stderr


def test_baselines_on_unseen_items(tables):
    """Text baselines with a vision feature that tells the category: each beats chance, the map beats what it maps."""
    categories = sorted({item["category"] for item in tables.items})
    numbers = torch.tensor([categories.index(item["category"]) for item in tables.items])
    noise = torch.randn(len(numbers), 16, generator=torch.Generator().manual_seed(0))
    summary = F.one_hot(numbers, 16).float() + 0.3 * noise
    rows = {item["item_id"]: row for row, item in enumerate(tables.items)}
    pairs = np.array([(rows[pair["query_id"]], rows[pair["target_id"]]) for pair in tables.train_pairs])
    found = baseline_embeddings(tables.items, summary, pairs, seed=0)
    unseen = [row for row, item in enumerate(tables.items) if item["split"] == "test"]
    labels = [tables.items[row]["subcategory"] for row in unseen]
    precision = {name: precision_at_k(embeddings[unseen], labels, 10) for name, embeddings in found.items()}
    for embeddings in found.values():
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(tables.items)))
    assert min(precision.values()) > 0.08
    assert precision["frozen text"] == pytest.approx(0.15, abs=0.02)
    assert precision["linear map"] > precision["frozen both"] + 0.03


def test_linear_map_sees_training_rows_only():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 12, generator=generator)
    pairs = torch.tensor([[row, row + 10] for row in range(10)])
    changed = features.clone()
    changed[20:] = 7.0
    first, second = (contrastive_linear_map(x, pairs, seed=3, steps=20, batch_size=8) for x in (features, changed))
    assert torch.equal(first[:20], second[:20])
    assert not torch.allclose(first[20:], second[20:])
    with pytest.raises(ValueError, match="needs pairs"):
        contrastive_linear_map(features, pairs[:0], seed=0)


def test_missing_title_is_no_feature():
    items = [{"item_id": "a", "title": "red apple"}, {"item_id": "b"}, {"item_id": "c", "title": "green apple"}]
    summary = torch.eye(3)
    found = baseline_embeddings(items, summary, np.array([[0, 2]]), seed=0)
    assert found["frozen text"][1].abs().sum() == 0
    assert found["frozen text"][0] @ found["frozen text"][2] > 0.1
    with pytest.raises(ValueError, match="3 items need as many vision features; got 2"):
        baseline_embeddings(items, summary[:2], np.array([[0, 2]]), seed=0)


def _texts(item):
    return [item["title"], *item["topics"], item["content"] or "", json.dumps(item["image"]["path"])]
