"""Contrastive batches larger than memory: embed in chunks, take the loss over all, backpropagate chunk by chunk.

GradCache (Gao et al. 2021, arXiv 2101.06983): the loss needs only the embeddings, so its gradients by the embeddings are
found without the model's graph; each chunk is then run again with a graph and backpropagates its own embeddings'
gradients. The sum is exactly the gradient of the whole batch, at the memory of one chunk and the price of a second
forward pass. Frozen vision encoders have no gradient and run in the first pass only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.inputs_notellm2 import count_images
from modeling_notellm2.pixels_notellm2 import VISION_INPUTS
from training.trainer.losses import PairLossOutput


FEATURES = ("vision_hidden_states", "vision_pooler_output", "vision_attention_mask", "vision_grids")
PER_IMAGE = (*VISION_INPUTS, *FEATURES, "cached_images")
"""Inputs with a row for each image, or for each of those that are cached or not; all others have one for each item."""

EMBEDDINGS = ("embeddings", "visual_embeddings")


@dataclass
class GradCache:
    """One training step whose memory doesn't grow with the batch.

    Args:
        chunk_size: items embedded at once.
        backward: backpropagates a scalar, e.g. `accelerator.backward`; called once for each chunk.
        no_sync: gives the context in which all chunks but the last are run, so that processes exchange gradients once,
            e.g. `partial(accelerator.no_sync, model)`.
        autocast: gives the context for forward passes, where the model has no mixed precision of its own.

    Raises:
        ValueError: for a chunk size below 1.
    """

    chunk_size: int
    backward: Callable[[Tensor], Any] = Tensor.backward
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    autocast: Callable[[], AbstractContextManager] = nullcontext

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}.")

    def step(
        self,
        model: nn.Module,
        base: NoteLLM2Model,
        inputs: dict[str, Tensor],
        loss: Callable[..., PairLossOutput],
        divisor: float = 1,
    ) -> PairLossOutput:
        """Add the gradients of `loss / divisor` to the parameters.

        Args:
            model: what the chunks are run through: `base`, or what wraps it (DDP, accelerate).
            base: the model itself, for its config and device; its parameters are touched by `model` alone.
            inputs: the model's inputs for the whole batch. Where several processes train together, each with as many
                items, an image of nobody belongs to a batch without images (see the model's `pixel_values`).
            loss: called with `embeddings` `(n, d)`, `visual_embeddings` `(n, d)` or `None`, `has_image` `(n,)` and
                `logit_scale`; parameters that its output's `loss` gets by another way are not trained.
            divisor: gradient accumulation steps.

        Returns:
            What `loss` gave, with `loss` detached.
        """
        with torch.no_grad():
            chunks = [self._embed(model, base, part) for part in split_inputs(base, inputs, self.chunk_size)]
        # Older versions of torch reuse, under a caller's autocast, casts of weights made without a graph.
        torch.clear_autocast_cache()

        output, scale_gradient = _loss_gradients(chunks, loss, divisor)
        # Every chunk has a gradient for every parameter, the scale too: ZeRO-3 keeps one that the first of a step leaves out.
        scale_gradient = scale_gradient / len(chunks)
        *first, last = chunks
        for chunk in first:
            with self.no_sync():
                self._backpropagate(self._surrogate(model, base, chunk, scale_gradient))
        self._backpropagate(self._surrogate(model, base, last, scale_gradient))
        return output

    def _embed(self, model: nn.Module, base: NoteLLM2Model, inputs: dict[str, Tensor]) -> "_Chunk":
        """First pass: a chunk's embeddings, and in place of its pixels what a frozen vision encoder makes of them."""
        chunk = _Chunk(inputs, _Randomness(base))
        with self.autocast():
            output = model(**chunk.inputs_on(base.device), output_vision_features=base.config.freeze_vision)
        if base.config.freeze_vision and output.vision_hidden_states is not None:
            for name in PER_IMAGE:
                inputs.pop(name, None)
            inputs |= {name: output[name].cpu() for name in FEATURES if output.get(name) is not None}
        chunk.has_image, chunk.logit_scale = output.has_image, output.logit_scale
        chunk.embeddings = {name: output[name].detach() for name in EMBEDDINGS if name in output}
        return chunk

    def _surrogate(self, model: nn.Module, base: NoteLLM2Model, chunk: "_Chunk", scale_gradient: Tensor) -> Tensor:
        """Second pass: a scalar whose gradients by the parameters are the chunk's part of the loss's."""
        with chunk.randomness.replayed(), self.autocast():
            output = model(**chunk.inputs_on(base.device))
        parts = [(output[name].float() * gradient.float()).sum() for name, gradient in chunk.gradients.items()]
        return torch.stack(parts).sum() + (output.logit_scale * scale_gradient).sum()

    def _backpropagate(self, surrogate: Tensor) -> None:
        # Where only parts of the image's way are trained, a chunk of texts has nothing to train.
        if surrogate.requires_grad:
            self.backward(surrogate)


@dataclass
class _Chunk:
    """A part of the batch, and what the first pass and the loss found for it.

    Attributes:
        inputs: the model's; its vision features lie on the CPU.
        randomness: state of the random generators before the first pass.
        has_image: `(chunk,)` bool.
        logit_scale: one element.
        embeddings: of the first pass, `(chunk, d)` each.
        gradients: of the loss by them.
    """

    inputs: dict[str, Tensor]
    randomness: "_Randomness"
    has_image: Tensor = field(init=False)
    logit_scale: Tensor = field(init=False)
    embeddings: dict[str, Tensor] = field(init=False)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def inputs_on(self, device: torch.device) -> dict[str, Tensor]:
        return {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}


def _loss_gradients(
    chunks: Sequence[_Chunk], loss: Callable[..., PairLossOutput], divisor: float
) -> tuple[PairLossOutput, Tensor]:
    """The loss over all embeddings; hands each chunk its gradients and returns that of the logit scale."""
    names = list(chunks[0].embeddings)
    leaves = [torch.cat([chunk.embeddings[name] for chunk in chunks]) for name in names]
    leaves = [leaf.detach().requires_grad_() for leaf in [*leaves, chunks[-1].logit_scale]]
    given = dict.fromkeys(EMBEDDINGS) | dict(zip([*names, "logit_scale"], leaves, strict=True))
    with torch.enable_grad():
        output = loss(**given, has_image=torch.cat([chunk.has_image for chunk in chunks]))
        *gradients, scale_gradient = torch.autograd.grad(output.loss / divisor, leaves, materialize_grads=True)
    output.loss = output.loss.detach()
    for name, gradient in zip(names, gradients, strict=True):
        parts = gradient.split([len(chunk.has_image) for chunk in chunks])
        for chunk, part in zip(chunks, parts, strict=True):
            chunk.gradients[name] = part
    return output, scale_gradient


def split_inputs(base: NoteLLM2Model, inputs: dict[str, Tensor], chunk_size: int) -> list[dict[str, Tensor]]:
    """The model's inputs in parts of `chunk_size` items: each with its own images and without padding it doesn't need.

    If the batch has an image, a part without one gets the first as an image of nobody (see the model's `pixel_values`):
    every part runs all of the model, as processes that exchange weights or gradients must do in step.

    Args:
        inputs: as the processor gives them; `num_images` is read off the placeholders if left out.

    Raises:
        ValueError: for an input with another number of rows than items or images.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    total, rows = _image_rows(inputs)
    if total == 1 and "num_images" in inputs and not inputs["num_images"].any():
        counts = inputs["num_images"]  # the batch's own image of nobody
    else:
        counts = count_images(base.config, inputs["input_ids"], inputs.get("num_images"), total)
    of_items = inputs | {"num_images": counts}
    chunks: list[dict[str, Tensor]] = [{} for _ in counts.split(chunk_size)]
    for name, value in of_items.items():
        if name in PER_IMAGE:
            continue
        if len(value) != len(counts):
            raise ValueError(f"Input {name} has {len(value)} rows; expected {len(counts)}.")
        for chunk, part in zip(chunks, value.split(chunk_size), strict=True):
            chunk[name] = part
    start = 0
    for chunk in chunks:
        end = start + int(chunk["num_images"].sum())
        mine = slice(start, end) if end > start else slice(0, min(1, total))
        for name, places in rows.items():
            if len(inputs[name]) != int(places.sum()):
                raise ValueError(f"Input {name} has {len(inputs[name])} rows; expected {int(places.sum())}.")
            before, among = int(places[: mine.start].sum()), int(places[mine].sum())
            if among:
                chunk[name] = inputs[name][before : before + among]
        start = end
    return [_trimmed(chunk) for chunk in chunks]


def _image_rows(inputs: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Images of a batch, and which of them, `(images,)` bool, have a row in each input that is there."""
    names = [name for name in PER_IMAGE if name in inputs]
    total = max((len(inputs[name]) for name in names), default=0)
    rows = {name: torch.ones(total, dtype=torch.bool) for name in names}
    if "cached_images" in inputs:
        cached = inputs["cached_images"].cpu()
        rows |= {name: cached if name in FEATURES else ~cached for name in names if name != "cached_images"}
    return total, rows


def _trimmed(chunk: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns on either side in which no item of the chunk has a token."""
    mask = chunk.get("attention_mask")
    if mask is None or not mask.any():
        return chunk
    used = mask.any(0).nonzero().flatten()
    columns = slice(int(used[0]), int(used[-1]) + 1)
    return {
        name: value[:, columns] if name not in PER_IMAGE and value.shape == mask.shape else value
        for name, value in chunk.items()
    }


class _Randomness:
    """The random generators' states on the CPU and on a model's devices, so that dropout drops the same again."""

    def __init__(self, model: nn.Module):
        on_device = {parameter.device: parameter for parameter in model.parameters()}
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*on_device.values())
        # Of no device, where all is on the CPU; but torch 2.6 wants a name.
        self.device_type = next((device.type for device in on_device if device.type != "cpu"), "cuda")

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Random numbers as they were drawn then; afterwards the generators stand where they stood."""
        with torch.random.fork_rng(self.devices, device_type=self.device_type):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.device_type)
            yield
