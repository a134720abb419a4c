"""What a training log shows beyond the loss: the gate, the embeddings' size, how fast, and how long data kept it waiting."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeling_notellm2 import NoteLLM2Model
from training.trainer.losses import PairLossOutput
from training.trainer.tiles import Entries


class TrainingMonitor:
    """Collects figures between two lines of the log, about the model that it was told to `watch` last.

    Figures:
        multimodal_loss, visual_loss, in_batch_recall: means over the steps, of the joined batch of all processes.
        logit_scale: logarithm of the factor on the similarities, now; temperature: one over that factor.
        gate_mean: mean of late fusion's gate over items with an image; 1 would leave the image out.
        embedding_norm: mean length of the embeddings before they are normalised.
        masked_negatives: share of the similarity matrix that is left out as no negative.
        items_per_second: of all processes.
        data_wait: share of the time in which training waited for a batch.
    """

    def __init__(self) -> None:
        self.model: NoteLLM2Model | None = None
        self.logit_scale: Tensor | None = None
        self.sums: dict[str, list[Tensor]] = defaultdict(list)
        self.items = 0
        self.waited = 0.0
        self.since = time.monotonic()

    def watch(self, model: NoteLLM2Model) -> None:
        """Look at this NoteLLM-2 model's gate and reduction from now on, in training mode only."""
        if model is self.model:
            return
        self.model = model
        if model.late_fusion is not None:
            model.late_fusion.gate.register_forward_hook(self._watch_gate)
        if model.reduction is not None:
            model.reduction.register_forward_hook(self._watch_norm)

    def add(self, output: PairLossOutput, items: int, logit_scale: Tensor) -> None:
        """A step's losses, the number of items in the batches of all processes, and the logit scale (one element)."""
        for name in ("multimodal_loss", "visual_loss", "in_batch_recall"):
            value = getattr(output, name)
            if value is not None:
                self.sums[name].append(value)
        self.items += items
        self.logit_scale = logit_scale.detach().float()

    def counting(self, false_negatives: Callable[[Tensor], Entries]) -> Callable[[Tensor], Entries]:
        """`false_negatives`, with the share of entries that it leaves out taken down."""

        def counted(item_index: Tensor) -> Entries:
            rows, columns = false_negatives(item_index)
            self.sums["masked_negatives"].append(torch.tensor(len(rows) / max(len(item_index) ** 2, 1)))
            return rows, columns

        return counted

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever fetches the next batch."""
        started = time.monotonic()
        yield
        self.waited += time.monotonic() - started

    def take(self) -> dict[str, float]:
        """All figures since the last call."""
        elapsed = max(time.monotonic() - self.since, 1e-9)
        figures = {
            name: torch.stack([value.float() for value in values]).mean().item() for name, values in self.sums.items()
        }
        if self.logit_scale is not None:
            figures |= {"logit_scale": self.logit_scale.item(), "temperature": (-self.logit_scale).exp().item()}
        figures |= {
            "items_per_second": self.items / elapsed,
            "data_wait": self.waited / elapsed,
        }
        self.sums.clear()
        self.items, self.waited, self.since = 0, 0.0, time.monotonic()
        return figures

    def _watch_gate(self, gate: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if self.model is not None and self.model.training:
            visual = inputs[0][..., output.shape[-1] :]  # behind the hidden state; zero for items without an image
            shown = visual.detach().any(-1)
            if shown.any():
                self.sums["gate_mean"].append(output.detach()[shown].sigmoid().mean())

    def _watch_norm(self, reduction: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.model is not None and self.model.training:
            self.sums["embedding_norm"].append(output.detach().float().norm(dim=-1).mean())
