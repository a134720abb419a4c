"""The pair loss on several processes is that of one process on the joined batch, with its gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tests.support.models import QFORMER, make_model
from training.trainer.distributed import gather, gather_with_gradient
from training.trainer.losses import PairLoss


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
    "several positives": PairLoss(
        false_negatives=known_positives, positives=known_positives, matryoshka_dims=(8,), tile=5
    ),
    "weighted": PairLoss(false_negatives=known_positives, positives=known_positives),
    "margin": PairLoss(false_negatives=known_positives, matryoshka_dims=(8,), tile=5, false_negative_margin=0.02),
}


def train_on(
    name: str, loss: PairLoss, items, numbers, pairs, model, processor
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Reported values and parameter gradients of this process."""
    model.zero_grad()
    embedded = model(**processor(items, return_tensors="pt"))
    weights = torch.tensor([number % 3 + 0.5 for number in numbers[:pairs]]) if name == "weighted" else None
    output = loss(
        embedded.embeddings,
        embedded.visual_embeddings,
        embedded.has_image,
        torch.tensor(numbers),
        pairs,
        model.logit_scale,
        weights,
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
        values, gradients = train_on(name, loss, *share(rank), model, processor)
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
        values, gradients = train_on(name, loss, *joined_batch(world), model, processor)
        assert values["visual_loss"] > 0
        for result in results:
            assert result[name][0] == pytest.approx(values, rel=1e-5)
            assert_equal_gradients(
                result[name][1], gradients, tolerance=2e-5
            )  # a token's rows are summed in another order
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
