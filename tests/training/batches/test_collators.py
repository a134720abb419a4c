"""Batches: distinct items in a fixed order, hard negatives behind the pairs, dropped modalities, images that break late."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_notellm2.prompts_notellm2 import ItemError
from tests.conftest import make_model
from training.batches.collators import ItemCollator, Pair, PairCollator, PairDataset, drop_repeated_lines
from training.batches.sampling import DistinctItemsSampler, item_lengths
from training.tables.items import ItemTable
from training.tables.pairs import PairTable


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def make_items(count: int, broken: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> ItemTable:
    """Items with picture and title; those in `broken` have a cut picture, those in `silent` no title."""
    pictures = [png(number)[:40] if number in broken else png(number) for number in range(count)]
    titles = [None if number in silent else f"title {number}" for number in range(count)]
    return ItemTable.of(
        [
            {"item_id": f"i{number}", "title": title, "image": picture}
            for number, (title, picture) in enumerate(zip(titles, pictures, strict=True))
        ]
    )


@pytest.mark.parametrize("lengths", [None, np.random.default_rng(1).integers(1, 100, 60)])
def test_batches_hold_no_item_and_no_group_twice(lengths):
    generator = np.random.default_rng(0)
    pairs = np.array([generator.choice(60, 2, replace=False) for _ in range(203)])
    negatives = np.array([[generator.integers(0, 60)] for _ in pairs])
    groups = generator.integers(0, 12, len(pairs))
    sampler = DistinctItemsSampler(PairTable(pairs, groups, negatives), 8, seed=3, lengths=lengths)

    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == 200
        for start in range(0, 200, 8):
            batch = epochs[-1][start : start + 8]
            members = [{*pairs[pair].tolist(), *negatives[pair].tolist()} for pair in batch]
            assert len(set.union(*members)) == sum(map(len, members))
            assert len({groups[pair] for pair in batch}) == 8
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0])) > 150
    assert list(sampler) == epochs[1]
    with pytest.raises(ValueError, match="can't be filled"):
        DistinctItemsSampler(PairTable(pairs, groups), 13)
    with pytest.raises(ValueError, match="don't fill one batch"):
        DistinctItemsSampler(PairTable(pairs), 204)


def test_pairs_without_a_group_meet_each_other_and_all_of_them_are_seen():
    pairs = np.arange(4000).reshape(-1, 2)
    groups = np.where(np.arange(2000) % 2, -1, np.arange(2000) // 2 % 40)
    sampler = DistinctItemsSampler(PairTable(pairs, groups), 16)
    order = list(sampler)
    assert len(set(order) & set(range(1, 2000, 2))) > 990  # a few of any kind are left over at the end
    batches = np.array(order).reshape(-1, 16)
    assert max(np.sum(groups[batch] == -1) for batch in batches) > 4
    for batch in batches:
        known = groups[batch][groups[batch] >= 0]
        assert len(set(known)) == len(known)
    assert sorted(DistinctItemsSampler(PairTable(pairs, np.full(2000, -1)), 16)) == list(range(2000))


def test_an_order_without_conflicts_is_a_permutation_and_a_popular_item_does_not_stop_it():
    pairs = np.arange(20_000).reshape(-1, 2)
    assert sorted(DistinctItemsSampler(PairTable(pairs), 16)) == list(range(10_000))
    skewed = pairs.copy()
    skewed[:3_000, 0] = 0
    order = list(DistinctItemsSampler(PairTable(skewed), 16))
    assert all((np.array(order[start : start + 16]) < 3_000).sum() <= 1 for start in range(0, 10_000, 16))
    assert len(set(order)) > 6_000


def test_length_groups_pad_less_and_come_in_no_order():
    generator = np.random.default_rng(0)
    pairs = np.arange(40_000).reshape(-1, 2)
    lengths = generator.integers(10, 200, 40_000)

    def padded(sampler):
        longest = lengths[pairs[list(sampler)]].max(1).reshape(-1, 32)
        return (longest.max(1, keepdims=True) - longest).mean(), np.diff(longest.mean(1))

    mixed, _ = padded(DistinctItemsSampler(PairTable(pairs), 32))
    grouped, steps = padded(DistinctItemsSampler(PairTable(pairs), 32, lengths=lengths))
    assert grouped < mixed / 5
    assert 0.3 < (steps > 0).mean() < 0.7


def test_estimated_lengths_follow_the_processor():
    _, processor = make_model()
    items = make_items(4, silent=(2,))
    lengths = item_lengths(items.select([2, 0]), processor.limits, processor.num_query_tokens)
    assert lengths.tolist() == [8, 8 + len("title 0")]


def test_rows_stand_as_queries_targets_then_negatives():
    _, processor = make_model()
    items = make_items(9, silent=(4,))
    pairs = PairTable(np.array([[0, 1], [2, 3]]), None, np.array([[4, 5], [6, 7]]))
    dataset = PairDataset(items, pairs)

    batch = PairCollator(ItemCollator(processor))([dataset[0], dataset[1]])

    assert batch.pop("num_pairs") == 2
    assert batch.pop("item_index").tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    expected = processor([items[position] for position in (0, 2, 1, 3, 4, 6, 5, 7)], return_tensors="pt")
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name


def test_an_image_that_breaks_late_is_listed_and_its_pair_is_replaced_unless_another_is_left(tmp_path):
    _, processor = make_model()
    items = make_items(8, broken=(1, 4), silent=(4,))
    several = {**items[6], "image": [items[1]["image"], items[6]["image"]]}
    dataset = PairDataset(items, PairTable(np.array([[0, 1], [2, 3], [4, 5], [6, 7]])))
    collate = PairCollator(ItemCollator(processor, rejects=tmp_path / "rejects.jsonl"))
    pairs = [dataset[number] for number in range(4)]
    pairs[3] = Pair(pairs[3].positions, [several, pairs[3].items[1]])

    for _ in range(2):
        batch = collate(pairs)

    assert batch["num_pairs"] == 4
    assert batch["item_index"].tolist() == [2, 2, 2, 6, 3, 3, 3, 7]
    assert batch["num_images"].tolist() == [1] * 8
    again = PairCollator(ItemCollator(processor, rejects=tmp_path / "rejects.jsonl"))
    again(pairs)
    lines = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert drop_repeated_lines(tmp_path / "rejects.jsonl") == 3
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [reject["ids"] for reject in rejects] == [["i1"], ["i4"], ["i6"]]
    with pytest.raises(ItemError, match="i4"):
        collate([dataset[2]])
    assert collate.collate_items([items[4]])["num_images"].tolist() == [0]
    assert len(collate.collate_items([items[4]])["pixel_values"]) == 1  # nobody's


def test_modality_dropout_depends_on_seed_and_batch_alone_and_never_empties_an_item():
    _, processor = make_model()
    items = make_items(400, silent=tuple(range(40)))
    dataset = PairDataset(items, PairTable(np.arange(400).reshape(-1, 2)))
    pairs = [dataset[number] for number in range(200)]

    def dropped(**options):
        collate = PairCollator(ItemCollator(processor), **options)
        batch = collate(pairs)
        without_image = batch["num_images"] == 0
        texts = processor.tokenizer.batch_decode(batch["input_ids"])
        without_text = torch.tensor(
            [
                "title 1" not in text
                and "title 2" not in text
                and "title 3" not in text
                and not any(f"title {n}" in text for n in range(4, 10))
                for text in texts
            ]
        )
        return batch["item_index"], without_image, without_text

    index, without_image, without_text = dropped(image_dropout=0.3, text_dropout=0.2, seed=1)
    had_both = index >= 40
    assert not (without_image & without_text).any()
    assert not without_image[~had_both].any()
    assert 0.2 < without_image[had_both].float().mean() < 0.4
    assert 0.1 < without_text[had_both].float().mean() < 0.3
    assert torch.equal(dropped(image_dropout=0.3, text_dropout=0.2, seed=1)[1], without_image)
    assert not torch.equal(dropped(image_dropout=0.3, text_dropout=0.2, seed=2)[1], without_image)
    assert not dropped()[1].any()
    with pytest.raises(ValueError, match="at most 1"):
        PairCollator(ItemCollator(processor), image_dropout=0.6, text_dropout=0.6)
