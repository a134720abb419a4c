"""GradCache gives the gradients of the whole batch: with dropout, under autocast, accumulation and DDP."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from tests.support.models import make_model
from tests.training.trainer.test_loss_processes import (
    PICTURED,
    assert_equal_gradients,
    in_processes,
    item,
    joined_batch,
    known_positives,
    picture,
    share,
    undropped_model,
)
from training.trainer.grad_cache import GradCache, split_inputs
from training.trainer.losses import PairLoss


LOSS = PairLoss(false_negatives=known_positives, positives=known_positives, matryoshka_dims=(8,), tile=16)
# Four pairs and two hard negatives; texts of different lengths, no image in the first two and the last items.
ITEMS = [
    *(item(number, with_image=number not in (0, 1, 5, 9)) for number in range(8)),
    {"title": "several", "content": "pictures " * 5, "image": [picture(20), picture(21)]},
    item(9, with_image=False),
]


def loss_of(pairs: int, numbers: list[int]):
    """The loss as a function of the model's outputs alone."""
    weights = torch.tensor(numbers[:pairs]) % 3 + 0.5
    return partial(LOSS, item_index=torch.tensor(numbers), num_pairs=pairs, pair_weight=weights)


def plain_step(wrapped, model, inputs, loss, divisor=1):
    embedded = wrapped(**inputs)
    output = loss(
        embeddings=embedded.embeddings,
        visual_embeddings=embedded.visual_embeddings,
        has_image=embedded.has_image,
        logit_scale=model.logit_scale,
    )
    (output.loss / divisor).backward()
    return output


def taken_gradients(model) -> dict[str, torch.Tensor]:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_gradients_are_those_of_the_whole_batch(chunk_size, padding_side):
    model, processor = undropped_model()
    inputs = dict(processor(ITEMS, return_tensors="pt", padding_side=padding_side))
    loss = loss_of(4, list(range(10)))
    expected = plain_step(model, model, inputs, loss)
    gradients = taken_gradients(model)

    output = GradCache(chunk_size).step(model, model, inputs, loss)

    torch.testing.assert_close(dict(output), {**expected, "loss": expected.loss.detach()})
    assert not output.loss.requires_grad
    assert_equal_gradients(taken_gradients(model), gradients)


@pytest.mark.parametrize("variant", [{"micl": False}, {"micl": False, "early_fusion": False}, {"freeze_vision": False}])
def test_every_variant_of_the_model(variant):
    model, processor = make_model(**variant)
    inputs = dict(processor(ITEMS, return_tensors="pt"))
    loss = loss_of(4, list(range(10)))
    plain_step(model, model, inputs, loss)
    expected = taken_gradients(model)
    GradCache(3).step(model, model, inputs, loss)
    assert_equal_gradients(taken_gradients(model), expected)
    assert any(name.startswith("vision_model.") for name in expected) != model.config.freeze_vision


class InBfloat16(nn.Module):
    """The forward pass under autocast, as accelerate wraps a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(**inputs)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_dropout_drops_the_same_in_both_passes(half):
    """Against the chunks run once with a graph from the same random state; afterwards that state is the same too."""
    model, processor = make_model()
    assert model.config.qformer_config.hidden_dropout_prob > 0
    model.train()
    wrapped = InBfloat16(model) if half else model
    inputs = dict(processor(ITEMS, return_tensors="pt"))
    loss = loss_of(4, list(range(10)))

    torch.manual_seed(5)
    embedded = [wrapped(**chunk) for chunk in split_inputs(model, inputs, 3)]
    parts = {name: torch.cat([e[name] for e in embedded]) for name in ("embeddings", "visual_embeddings", "has_image")}
    loss(**parts, logit_scale=model.logit_scale).loss.backward()
    expected, next_number = taken_gradients(model), torch.rand(1)

    torch.manual_seed(5)
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=half)
    GradCache(3, autocast=autocast).step(wrapped, model, inputs, loss)

    assert torch.equal(torch.rand(1), next_number)
    found = taken_gradients(model)
    assert_equal_gradients(found, expected)
    torch.manual_seed(6)
    GradCache(3, autocast=autocast).step(wrapped, model, inputs, loss)
    other = taken_gradients(model)["query_tokens"]
    assert (other - found["query_tokens"]).norm() > 0.01 * found["query_tokens"].norm()


def test_a_caller_under_autocast_gets_all_gradients():
    """None may get lost between the pass without a graph and the one with it, which share a cache of casts."""
    model, processor = undropped_model()
    inputs = dict(processor(ITEMS, return_tensors="pt"))
    loss = loss_of(4, list(range(10)))
    GradCache(5).step(InBfloat16(model), model, inputs, loss)
    expected = taken_gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        GradCache(5).step(model, model, inputs, loss)
    # Accumulated over the chunks in bfloat16 there.
    assert_equal_gradients(taken_gradients(model), expected, tolerance=0.05)


def test_accumulated_batches_are_averaged():
    model, processor = undropped_model()
    batches = [dict(processor(items, return_tensors="pt")) for items in (ITEMS[:8], ITEMS[2:10], ITEMS)]
    loss = loss_of(3, list(range(8)))
    losses = [loss, loss, loss_of(4, list(range(10)))]
    for inputs, one in zip(batches, losses, strict=True):
        plain_step(model, model, inputs, one, divisor=3)
    expected = taken_gradients(model)

    scaled = []

    def backward(surrogate):
        scaled.append(surrogate)
        surrogate.backward()

    for inputs, one in zip(batches, losses, strict=True):
        GradCache(3, backward).step(model, model, inputs, one, divisor=3)
    assert_equal_gradients(taken_gradients(model), expected)
    assert len(scaled) == 3 + 3 + 4


def test_a_frozen_vision_encoder_runs_once_and_only_for_pixels():
    model, processor = undropped_model()
    inputs = dict(processor(ITEMS, return_tensors="pt"))
    loss = loss_of(4, list(range(10)))
    seen = []
    model.vision_model.register_forward_hook(lambda module, args, kwargs, output: seen.append(1), with_kwargs=True)
    GradCache(3).step(model, model, inputs, loss)
    expected = taken_gradients(model)
    assert len(seen) == 4  # the last of four chunks has no picture and takes one along

    features = model.get_vision_features(inputs.pop("pixel_values"))
    seen.clear()
    inputs |= {
        "vision_hidden_states": features.last_hidden_state,
        "vision_pooler_output": features.pooler_output,
    }
    GradCache(3).step(model, model, inputs, loss)
    assert not seen
    assert_equal_gradients(taken_gradients(model), expected)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_chunks_have_their_own_images_and_no_needless_padding(padding_side):
    model, processor = make_model()
    inputs = dict(processor(ITEMS, return_tensors="pt", padding_side=padding_side))
    counted = {name: value for name, value in inputs.items() if name != "num_images"}
    for given in (inputs, counted):
        chunks = split_inputs(model, given, 3)
        assert [len(chunk["input_ids"]) for chunk in chunks] == [3, 3, 3, 1]
        assert [len(chunk["pixel_values"]) for chunk in chunks] == [1, 2, 4, 1]
        assert torch.equal(torch.cat([c["pixel_values"] for c in chunks[:3]]), inputs["pixel_values"])
        assert torch.equal(
            chunks[3]["pixel_values"], inputs["pixel_values"][:1]
        )  # nobody's, so that all parts take part
        assert torch.equal(torch.cat([c["num_images"] for c in chunks]), inputs["num_images"])
        for start, chunk in zip(range(0, 10, 3), chunks, strict=True):
            whole = inputs["attention_mask"][start : start + 3]
            assert chunk["attention_mask"].any(0).all()
            assert torch.equal(chunk["attention_mask"].sum(1), whole.sum(1))
            tokens = chunk["input_ids"][chunk["attention_mask"].bool()]
            assert torch.equal(tokens, inputs["input_ids"][start : start + 3][whole.bool()])
    with pytest.raises(ValueError, match="token_type_ids has 9 rows; expected 10"):
        split_inputs(model, {**inputs, "token_type_ids": inputs["input_ids"][:9]}, 3)
    with pytest.raises(ValueError, match="at least 1"):
        GradCache(0)


def test_frozen_parts_take_no_gradient():
    """A trained connector alone: texts have nothing to train, and the logit scale stays."""
    model, processor = make_model(embedding_dim=None, late_fusion=False)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    inputs = dict(processor(ITEMS, return_tensors="pt"))
    loss = loss_of(4, list(range(10)))
    plain_step(model, model, inputs, loss)
    expected = taken_gradients(model)
    GradCache(2).step(model, model, inputs, loss)
    assert_equal_gradients(taken_gradients(model), expected)


# Several processes ----------------------------------------------------------------------------------------------------


def counting(buckets: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    buckets[0] += 1
    return allreduce_hook(None, bucket)


def without_hard_negatives(items, numbers, pairs):
    """Nor with the second process's images."""
    numbers = numbers[: 2 * pairs]
    return [item(number, number in PICTURED and number < 7) for number in numbers], numbers, pairs


def in_step(inputs):
    """With an image of nobody where there is none, as the collator gives it."""
    if "pixel_values" not in inputs:
        inputs |= {
            "pixel_values": torch.zeros(1, 3, 32, 32),
            "num_images": torch.zeros(len(inputs["input_ids"]), dtype=int),
        }
    return inputs


def train_under_ddp(rank: int, world: int) -> dict[str, Any]:
    """Two accumulated batches in each of two steps: gradients, and how often DDP exchanged a bucket."""
    model, processor = undropped_model()
    ddp = DistributedDataParallel(model)
    exchanged = [0]
    ddp.register_comm_hook(exchanged, counting)
    cache = GradCache(3, no_sync=ddp.no_sync)  # the second process's last chunk has no image
    batches = [share(rank), without_hard_negatives(*share(rank))]
    results = []
    for _ in range(2):
        for number, (items, numbers, pairs) in enumerate(batches):
            inputs = in_step(dict(processor(items, return_tensors="pt")))
            step = partial(cache.step, ddp, model, inputs, loss_of(pairs, numbers), divisor=2)
            if number == 0:
                with ddp.no_sync():
                    output = step()
            else:
                output = step()
        results.append((taken_gradients(model), output.loss.item()))
    plain = [0]
    other = DistributedDataParallel(undropped_model()[0])
    other.register_comm_hook(plain, counting)
    items, numbers, pairs = share(rank)
    inputs = in_step(dict(processor(items, return_tensors="pt")))
    for _ in range(2):
        plain_step(other, other.module, inputs, loss_of(pairs, numbers))
    return {"steps": results, "exchanged": exchanged[0], "exchanged_plain": plain[0]}


@pytest.mark.slow
def test_ddp_exchanges_once_and_gives_the_gradients_of_one_process(tmp_path):
    results = in_processes(train_under_ddp, [2], tmp_path)[2]

    model, processor = undropped_model()
    for items, numbers, pairs in (joined_batch(2), without_hard_negatives(*joined_batch(2))):
        inputs = dict(processor(items, return_tensors="pt"))
        last = plain_step(model, model, inputs, loss_of(pairs, numbers), divisor=2).loss.item()
    expected = taken_gradients(model)

    for result in results:
        assert result["exchanged"] == result["exchanged_plain"] > 0
        for gradients, loss in result["steps"]:
            assert_equal_gradients(gradients, expected)
            assert loss == pytest.approx(last, rel=1e-5)
