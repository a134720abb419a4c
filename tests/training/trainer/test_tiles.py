"""The loss in tiles equals the plain one, with entries left out by place and by similarity."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_notellm2 import contrastive_pair_loss
from tests.support.losses import masked_oracle, partners, relative_difference, scale, vectors
from training.trainer.tiles import tiled_contrastive_loss


@pytest.mark.parametrize("tile", [5, 16, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_give_the_plain_loss_and_its_gradients(tile, dtype):
    plain, factor = vectors(38), scale()
    tiled, tiled_factor = vectors(38).detach().to(dtype).requires_grad_(), scale(dtype=dtype)
    expected = contrastive_pair_loss(plain, factor)
    expected.backward()

    losses, _ = tiled_contrastive_loss(tiled, tiled, *partners(38), tiled_factor, tile=tile)
    losses.mean().backward()

    assert losses.dtype == dtype
    torch.testing.assert_close(losses.mean().float(), expected, rtol=1e-5, atol=0)
    assert relative_difference(tiled.grad, plain.grad) < 1e-5
    assert relative_difference(tiled_factor.grad, factor.grad) < 1e-5


@pytest.mark.parametrize("tile", [4, 7, 64])
def test_excluded_entries_count_for_nothing(tile):
    """Among them entries named twice, own targets, own columns, whole tiles and a whole row."""
    rows, columns, factor = (
        vectors(22, 6, 1, torch.float64),
        vectors(31, 6, 2, torch.float64),
        scale(1.5, torch.float64),
    )
    generator = torch.Generator().manual_seed(3)
    target, own = torch.randperm(31, generator=generator)[:22], torch.randperm(31, generator=generator)[:22]
    own = torch.where(own == target, (own + 1) % 31, own)
    drawn = torch.randint(22, (60,), generator=generator), torch.randint(31, (60,), generator=generator)
    block = torch.cartesian_prod(torch.arange(4, 8), torch.arange(4, 8)).unbind(1)
    excluded = tuple(
        torch.cat([*parts])
        for parts in zip(
            drawn, drawn, block, (torch.arange(22), target), (torch.full((31,), 9), torch.arange(31)), strict=True
        )
    )
    weights = torch.linspace(-1, 2, 22, dtype=torch.float64)

    losses, hits = tiled_contrastive_loss(rows, columns, target, own, factor, excluded, tile)
    gradients = torch.autograd.grad((losses * weights).sum(), (rows, columns, factor))
    expected, expected_hits = masked_oracle(rows, columns, target, own, factor, excluded)

    assert losses[9] == 0
    assert torch.equal(hits, expected_hits)
    assert 0 < hits.sum() < 22
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), (rows, columns, factor)))
    assert torch.autograd.gradcheck(
        lambda *x: tiled_contrastive_loss(*x[:2], target, own, x[2], excluded, tile)[0], (rows, columns, factor)
    )
    with pytest.raises(ValueError, match="excluded entry has column 31; there are 31"):
        tiled_contrastive_loss(rows, columns, target, own, factor, (torch.tensor([0]), torch.tensor([31])))


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("tile", [4, 64])
def test_columns_above_the_target_by_more_than_the_margin_count_for_nothing(tile, margin):
    drawn, factor = vectors(20, 6, 1, torch.float64).detach(), scale(1.5, torch.float64)
    drawn[10:13] = drawn[:3]  # three pairs whose members are nearest
    rows = drawn.requires_grad_()
    target, own = partners(20)
    excluded = torch.tensor([2, 2, 3]), torch.tensor([4, 5, 9])
    similarity = (rows @ rows.T).detach()
    above = similarity > similarity.gather(1, target.unsqueeze(1)) + margin
    entries = tuple(torch.cat(parts) for parts in zip(excluded, above.nonzero().unbind(1), strict=True))

    losses, hits = tiled_contrastive_loss(rows, rows, target, own, factor, excluded, tile, false_negative_margin=margin)
    gradients = torch.autograd.grad(losses.sum(), (rows, factor))
    expected, _ = masked_oracle(rows, rows, target, own, factor, entries)
    _, expected_hits = masked_oracle(rows, rows, target, own, factor, excluded)

    assert 20 < above.sum() < 300  # own columns among them
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), (rows, factor)))
    assert torch.equal(hits, expected_hits)  # a recall that counts what the loss leaves out
    assert 0 < hits.sum() < 20
    without, _ = tiled_contrastive_loss(rows, rows, target, own, factor, excluded, tile)
    widest, _ = tiled_contrastive_loss(rows, rows, target, own, factor, excluded, tile, false_negative_margin=2.0)
    assert torch.equal(widest, without)
    assert (losses < without).any()


def test_nearly_solved_batches_keep_their_gradient():
    """Probabilities of nearly one: what is left of the loss is right relative to itself, not only to one."""
    first, factor = vectors(20, 32), scale(4.0)
    pairs = torch.cat([first.detach(), first.detach()])
    exact = pairs.double().requires_grad_()
    similarity = (exact @ exact.T * factor.double().exp()).masked_fill(torch.eye(40, dtype=torch.bool), -torch.inf)
    F.cross_entropy(similarity, partners(40)[0]).backward()
    pairs.requires_grad_()
    tiled_contrastive_loss(pairs, pairs, *partners(40), factor)[0].mean().backward()
    assert 0 < exact.grad.abs().max() < 1e-6
    assert relative_difference(pairs.grad, exact.grad) < 1e-3


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


def test_the_similarity_matrix_is_never_whole():
    embeddings, factor = vectors(1024, 8), scale()
    with LargestTensor() as seen:
        losses, _ = tiled_contrastive_loss(embeddings, embeddings, *partners(1024), factor, tile=128)
        losses.mean().backward()
    assert 128 * 128 <= seen.elements <= 3 * 1024 * 8
    with LargestTensor() as seen:
        contrastive_pair_loss(embeddings, factor).backward()
    assert seen.elements == 1024 * 1024
