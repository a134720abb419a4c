"""The loss at scale equals the plain one: tile by tile, with entries left out, and on several processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_notellm2 import complete_pairs, contrastive_pair_loss
from tests.support.models import QFORMER, make_model
from training.trainer.distributed import gather, gather_with_gradient
from training.trainer.losses import PairLoss, tiled_contrastive_loss


def vectors(rows: int, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=1).requires_grad_()


def scale(value: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def partners(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.arange(rows)
    return own.roll(rows // 2), own


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


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


def masked_oracle(rows, columns, target, own, logit_scale, excluded) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole matrix, cross-entropy, and whether nothing that counts is as near as the target."""
    out = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    out[excluded] = True
    out[torch.arange(len(rows)), own] = True
    out[torch.arange(len(rows)), target] = False
    similarity = (rows @ columns.T * logit_scale.exp()).masked_fill(out, -torch.inf)
    others = similarity.scatter(1, target.unsqueeze(1), -torch.inf)
    hits = similarity.gather(1, target.unsqueeze(1)).squeeze(1) > others.amax(1)
    return F.cross_entropy(similarity, target, reduction="none"), hits


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


def everything(embeddings, visual, has_image, factor, num_pairs, item_index=None, **settings):
    """Loss and gradients of PairLoss."""
    output = PairLoss(**settings)(embeddings, visual, has_image, item_index, num_pairs, factor)
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


# Several processes ----------------------------------------------------------------------------------------------------


def in_processes(worker: Callable[[int, int], Any], worlds: list[int], folder: Path) -> dict[int, list[Any]]:
    """What `worker(rank, world)` gives in each gloo process, for worlds of several sizes one after the other.

    The processes are started once, as many as the largest world needs; an error in one of them is raised here.
    """
    torch.multiprocessing.spawn(_process, (worker, worlds, folder), nprocs=max(worlds))
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in worlds}


def _process(rank: int, worker: Callable[[int, int], Any], worlds: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    for world in worlds:
        if rank < world:
            dist.init_process_group("gloo", f"file://{folder}/store-{world}", rank=rank, world_size=world)
            torch.save(worker(rank, world), folder / f"{world}-{rank}.pt")
            dist.destroy_process_group()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def item(number: int, with_image: bool) -> dict[str, Any]:
    text = {"title": f"item {number} " + "x" * (number % 5)}
    return {**text, "image": picture(number)} if with_image else text


# (pairs, hard negatives) of each of four processes; the pictures come by the item's number.
SHARES = [(3, 1), (2, 0), (3, 2), (1, 1)]
PICTURED = {0, 1, 3, 4, 5, 6, 8, 9, 12, 16, 17, 19, 21, 22}


def share(rank: int) -> tuple[list[dict[str, Any]], list[int], int]:
    """A process's items, their numbers, and its pairs. The second process has no complete pair."""
    pairs, hard = SHARES[rank]
    first = sum(2 * p + h for p, h in SHARES[:rank])
    numbers = list(range(first, first + 2 * pairs + hard))
    return [item(number, number in PICTURED) for number in numbers], numbers, pairs


def known_positives(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Items whose numbers differ by 6 or 11: across the processes' borders."""
    difference = (index.unsqueeze(1) - index).abs()
    return ((difference == 6) | (difference == 11)).nonzero().unbind(1)


def undropped_model():
    without_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    model, processor = make_model(qformer_config={**QFORMER, **without_dropout})
    return model.train(), processor


LOSSES = {
    "plain": PairLoss(),
    "everything": PairLoss(false_negatives=known_positives, matryoshka_dims=(8,), tile=5),
    "margin": PairLoss(false_negatives=known_positives, matryoshka_dims=(8,), tile=5, false_negative_margin=0.02),
}


def train_on(
    loss: PairLoss, items, numbers, pairs, model, processor
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Reported values and parameter gradients of this process."""
    model.zero_grad()
    embedded = model(**processor(items, return_tensors="pt"))
    output = loss(
        embedded.embeddings,
        embedded.visual_embeddings,
        embedded.has_image,
        torch.tensor(numbers),
        pairs,
        model.logit_scale,
    )
    output.loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {name: value.item() for name, value in output.items()}, gradients


def train_on_share(rank: int, world: int) -> dict[str, Any]:
    """Gradients averaged over the processes, as DDP does."""
    model, processor = undropped_model()
    results = {}
    for name, loss in LOSSES.items():
        values, gradients = train_on(loss, *share(rank), model, processor)
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= world
        results[name] = values, gradients
    weight = torch.full((rank, 2), float(rank), requires_grad=True)
    joined = gather_with_gradient(weight)
    (joined * torch.arange(len(joined)).unsqueeze(1) * (rank + 1)).sum().backward()
    flags = gather(torch.tensor([True, False])[: rank % 3])
    return {**results, "gathered": (joined.detach(), weight.grad, flags)}


def joined_batch(world: int) -> tuple[list[dict[str, Any]], list[int], int]:
    """All processes' items as one process has them: all first members, all second members, all hard negatives."""
    shares = [share(rank) for rank in range(world)]
    parts: list[list[int]] = [[], [], []]
    for _, numbers, pairs in shares:
        for part, chosen in zip(
            parts, (numbers[:pairs], numbers[pairs : 2 * pairs], numbers[2 * pairs :]), strict=True
        ):
            part += chosen
    items = {number: one for some, numbers, _ in shares for one, number in zip(some, numbers, strict=True)}
    numbers = [number for part in parts for number in part]
    return [items[number] for number in numbers], numbers, len(parts[0])


def assert_equal_gradients(found, expected, tolerance: float = 1e-5):
    """Relative to each parameter's own; keys' biases have a gradient of zero and its rounding. The scale's is a small
    difference of sums of logits, some twenty each, and has their rounding."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        rounding = 1e-5 if name == "logit_scale" else 1e-7
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + rounding, name


@pytest.fixture(scope="module")
def trained_on_shares(tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    return in_processes(train_on_share, [4, 2], tmp_path_factory.mktemp("processes"))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_train_as_one_on_the_joined_batch(world, trained_on_shares):
    results = trained_on_shares[world]
    model, processor = undropped_model()
    for name, loss in LOSSES.items():
        values, gradients = train_on(loss, *joined_batch(world), model, processor)
        assert values["visual_loss"] > 0
        for result in results:
            assert result[name][0] == pytest.approx(values, rel=1e-5)
            assert_equal_gradients(result[name][1], gradients)
    assert len({results[0][name][0]["loss"] for name in LOSSES}) == len(LOSSES)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_gathering_keeps_order_and_sums_gradients(world, trained_on_shares):
    """Process r has r rows of the value r, and gives the joined rows the gradients 0, 1, ... times r + 1."""
    for rank, result in enumerate(trained_on_shares[world]):
        joined, gradient, flags = result["gathered"]
        assert joined[:, 0].tolist() == [float(owner) for owner in range(world) for _ in range(owner)]
        first, factor = sum(range(rank)), sum(range(1, world + 1))
        assert gradient[:, 0].tolist() == [factor * place for place in range(first, first + rank)]
        assert flags.tolist() == [flag for owner in range(world) for flag in [True, False][: owner % 3]]
