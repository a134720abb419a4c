"""The pair loss: weights, prefixes, hard negatives, false negatives, several positives."""

import pytest
import torch
import torch.nn.functional as F

from modeling_notellm2 import complete_pairs, contrastive_pair_loss
from tests.support.losses import masked_oracle, partners, scale, vectors
from training.trainer.losses import PairLoss


def everything(embeddings, visual, has_image, factor, num_pairs, item_index=None, **settings):
    """Loss and gradients of PairLoss."""
    weight = settings.pop("pair_weight", None)
    output = PairLoss(**settings)(embeddings, visual, has_image, item_index, num_pairs, factor, weight)
    wanted = [x for x in (embeddings, visual, factor) if x is not None]
    return output, torch.autograd.grad(output.loss, wanted)


def test_pair_loss_is_the_models_own_without_extras():
    embeddings, visual, factor = vectors(12), vectors(12, seed=1), scale()
    has_image = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    multimodal = contrastive_pair_loss(embeddings, factor)
    visual_loss = contrastive_pair_loss(visual[complete_pairs(has_image)], factor)
    expected = (9 * multimodal + visual_loss) / 10

    output, gradients = everything(embeddings, visual, has_image, factor, 6)

    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close((output.multimodal_loss, output.visual_loss), (multimodal, visual_loss))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (embeddings, visual, factor)))
    output, gradients = everything(embeddings, visual, torch.zeros(12, dtype=torch.bool), factor, 6)
    assert output.visual_loss == 0
    assert not gradients[1].any()
    output, _ = everything(embeddings, None, has_image, factor, 6)
    torch.testing.assert_close(output.loss, multimodal)
    assert output.visual_loss is None
    empty = vectors(0)
    output, _ = everything(empty, empty, has_image[:0], factor, 0)
    assert output.loss == 0


def test_hard_negatives_are_columns_only_and_known_positives_are_left_out():
    embeddings, visual, factor = vectors(9), vectors(9, seed=1), scale()
    has_image = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    item_index = torch.tensor([10, 11, 12, 20, 21, 22, 30, 11, 31])

    def same_item_or_known(index):
        assert torch.equal(index, item_index)
        known = (index.unsqueeze(1) == 10) & (index == 31)
        return ((index.unsqueeze(1) == index) | known).nonzero().unbind(1)

    output, gradients = everything(
        embeddings, visual, has_image, factor, 3, item_index, false_negatives=same_item_or_known, tile=4
    )

    target, own = partners(6)
    excluded = (torch.tensor([1, 0]), torch.tensor([7, 8]))
    multimodal, hits = masked_oracle(embeddings[:6], embeddings, target, own, factor, excluded)
    shown, target, own = visual[[0, 1, 3, 4, 6, 8]], torch.tensor([2, 3, 0, 1]), torch.arange(4)
    visual_loss, _ = masked_oracle(shown[:4], shown, target, own, factor, (torch.tensor([0]), torch.tensor([5])))
    expected = (9 * multimodal.mean() + visual_loss.mean()) / 10
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.in_batch_recall, hits.float().mean())
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (embeddings, visual, factor)))
    assert gradients[0][6:].any(1).all()

    for place, name in ((0, "row"), (1, "column")):
        wrong = [torch.tensor([2]), torch.tensor([2])]
        wrong[place] = torch.tensor([9])
        with pytest.raises(ValueError, match=f"excluded entry has {name} 9; there are 9"):
            everything(
                embeddings,
                visual,
                has_image,
                factor,
                3,
                item_index,
                false_negatives=lambda _, wrong=wrong: tuple(wrong),
            )
    with pytest.raises(ValueError, match="needs item_index"):
        everything(embeddings, visual, has_image, factor, 3, false_negatives=same_item_or_known)
    with pytest.raises(ValueError, match="5 pairs have 10 members, but the batch has 9 items"):
        everything(embeddings, visual, has_image, factor, 5)


def test_prefixes_are_embeddings_too():
    embeddings, visual, factor = vectors(8), vectors(8, seed=1), scale()
    has_image = torch.ones(8, dtype=torch.bool)
    parts = [
        (9 * contrastive_pair_loss(e, factor) + contrastive_pair_loss(v, factor)) / 10
        for e, v in [
            (embeddings, visual),
            *((F.normalize(embeddings[:, :dim], dim=1), F.normalize(visual[:, :dim], dim=1)) for dim in (8, 3)),
        ]
    ]
    expected = torch.stack(parts).mean()
    output, gradients = everything(embeddings, visual, has_image, factor, 4, matryoshka_dims=[8, 3])
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (embeddings, visual, factor)))
    with pytest.raises(ValueError, match="below the embedding's 16; got .16."):
        everything(embeddings, visual, has_image, factor, 4, matryoshka_dims=[16])


def test_the_loss_keeps_its_precision_under_autocast():
    embeddings, visual, factor = vectors(12).detach().bfloat16().requires_grad_(), None, scale()
    has_image = torch.ones(12, dtype=torch.bool)
    expected, expected_gradients = everything(embeddings, visual, has_image, factor, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gradients = everything(embeddings, visual, has_image, factor, 6)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(gradients[0], expected_gradients[0])


def known(row_items, column_items):
    """Finds entries of pairs of items, in both directions."""
    pairs = {*zip(row_items, column_items, strict=True), *zip(column_items, row_items, strict=True)}

    def entries(index):
        found = [(r, c) for r, a in enumerate(index.tolist()) for c, b in enumerate(index.tolist()) if (a, b) in pairs]
        return torch.tensor(found, dtype=torch.long).reshape(-1, 2).unbind(1)

    return entries


def mean_over_positives(vectors_, positives_of, partner, factor, weights):
    """The mean over a row's positives, each against the row's negatives alone."""
    similarity = vectors_ @ vectors_.T * factor.exp()
    losses = []
    for row, further in positives_of.items():
        positives = [partner[row], *further]
        negatives = [c for c in range(len(vectors_)) if c not in (row, *positives)]
        against = [torch.cat([similarity[row, [p]], similarity[row, negatives]]) for p in positives]
        losses.append(torch.stack([a.logsumexp(0) - a[0] for a in against]).mean())
    return (torch.stack(losses) * weights).sum() / weights.sum()


@pytest.mark.parametrize("weight", [None, [0.0, 2.0, 0.5]])
def test_several_positives_and_weighted_pairs(weight):
    """Item 1's partners are 4 and, known from elsewhere, 2 and the hard negative 6; 2 has no image and no visual part."""
    embeddings, visual, factor = vectors(7), vectors(7, seed=1), scale()
    has_image = torch.tensor([1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    item_index = torch.arange(7)
    entries = known([0, 1, 2, 1, 1], [3, 4, 5, 2, 6])
    options = {"false_negatives": entries, "positives": entries, "tile": 3}
    if weight is not None:
        options["pair_weight"] = torch.tensor(weight)

    output, gradients = everything(embeddings, visual, has_image, factor, 3, item_index, **options)

    of_pairs = torch.ones(3) if weight is None else torch.tensor(weight)
    further = {0: [], 1: [2, 6], 2: [1], 3: [], 4: [], 5: []}
    multimodal = mean_over_positives(embeddings, further, [3, 4, 5, 0, 1, 2], factor, of_pairs.repeat(2))
    shown = visual[[0, 1, 3, 4, 6]]
    visual_loss = mean_over_positives(
        shown, {0: [], 1: [4], 2: [], 3: []}, [2, 3, 0, 1], factor, of_pairs[:2].repeat(2)
    )
    expected = (9 * multimodal + visual_loss) / 10
    torch.testing.assert_close((output.multimodal_loss, output.visual_loss), (multimodal, visual_loss))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (embeddings, visual, factor)))


def test_rows_with_one_positive_have_the_published_loss():
    embeddings, visual, factor = vectors(8), vectors(8, seed=1), scale()
    has_image = torch.ones(8, dtype=torch.bool)
    entries = known([0, 1, 2, 3], [4, 5, 6, 7])
    index = torch.arange(8)
    expected = everything(embeddings, visual, has_image, factor, 4)
    for settings in (
        {"positives": entries, "false_negatives": entries},
        {"positives": known([], [])},
        {"pair_weight": torch.full((4,), 3.0)},
    ):
        found = everything(embeddings, visual, has_image, factor, 4, index, **settings)
        torch.testing.assert_close(found[0].loss, expected[0].loss)
        torch.testing.assert_close(found[1], expected[1])
    nothing, gradients = everything(embeddings, visual, has_image, factor, 4, index, pair_weight=torch.zeros(4))
    assert nothing.loss == 0
    assert not any(gradient.any() for gradient in gradients)
