"""False negatives of a batch, against a look at every entry of the matrix."""

import numpy as np
import pytest
import torch

from training.batches import false_negatives
from training.batches.false_negatives import FalseNegatives, KnownPositives, text_hashes
from training.tables.items import ItemTable


def as_matrix(found, size):
    rows, columns = found
    matrix = torch.zeros(size, size, dtype=torch.bool)
    matrix[rows, columns] = True
    return matrix


@pytest.mark.parametrize("entries", [4_000_000, 7])
def test_entries_are_those_of_a_look_at_each(monkeypatch, entries):
    monkeypatch.setattr(false_negatives, "ENTRIES", entries)
    generator = np.random.default_rng(0)
    pairs = generator.integers(0, 50, (120, 2)).astype(np.int32)
    images = generator.integers(-1, 15, 50)
    texts = generator.integers(-1, 30, 50)
    item_index = torch.from_numpy(generator.integers(0, 50, 40))
    items = item_index.numpy()
    known = {tuple(pair) for pair in pairs.tolist()} | {tuple(pair[::-1]) for pair in pairs.tolist()}
    same = {
        "item": items[:, None] == items,
        "image": (images[items][:, None] == images[items]) & (images[items] >= 0),
        "text": (texts[items][:, None] == texts[items]) & (texts[items] >= 0),
        "known": np.array([[(a, b) in known for b in items.tolist()] for a in items.tolist()]),
    }
    off_diagonal = ~np.eye(40, dtype=bool)
    positives = KnownPositives(pairs, 50)

    for options, kinds in (
        ({}, ["item"]),
        ({"positives": positives}, ["item", "known"]),
        ({"image_hashes": images}, ["item", "image"]),
        ({"positives": positives, "image_hashes": images, "text_hashes": texts}, ["item", "image", "text", "known"]),
    ):
        found = as_matrix(FalseNegatives(**options)(item_index), 40).numpy()
        expected = np.any([same[kind] for kind in kinds], axis=0)
        assert (found & off_diagonal == expected & off_diagonal).all(), options
    found = as_matrix(FalseNegatives(positives, images, texts).known(item_index), 40).numpy()
    assert (found == same["known"]).all()
    grid = np.arange(50)
    assert (positives.contains(grid[:, None], grid) == [[(a, b) in known for b in range(50)] for a in range(50)]).all()


def test_a_placeholder_of_many_items_masks_nothing():
    hashes = np.zeros(false_negatives.MOST_ALIKE + 1, dtype=np.int64)
    item_index = torch.arange(len(hashes))
    assert len(FalseNegatives(image_hashes=hashes)(item_index)[0]) == 0
    assert len(FalseNegatives(image_hashes=hashes)(item_index[1:])[0]) == (len(hashes) - 1) * (len(hashes) - 2)
    assert len(FalseNegatives(KnownPositives(np.empty((0, 2), np.int32), 9))(torch.arange(0))[0]) == 0


def test_text_hashes_are_equal_for_equal_texts_only():
    columns = {
        "title": ["a", " a ", "b", None, "", "a", "xa", "x"],
        "content": [None, "", None, "a", " ", None, None, "a"],
        "topics": [["x"], ["x"], ["x"], [], None, ["y"], None, None],
    }
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    hashes = text_hashes(ItemTable.of(rows).select(range(7, -1, -1)))[::-1]
    assert hashes[0] == hashes[1]
    assert hashes[4] == -1
    assert len(set(hashes.tolist())) == 7
