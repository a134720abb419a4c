"""The head first: late fusion and reduction learn from pairs on the LLM's states as they are, before a step goes through the LLM.

The LLM reads each item once, and then thousands of pairs cost what a small linear map costs. A head that starts at random
would hand the LLM gradients that say little, and take as many steps through it to learn what it learns here in seconds
(linear probing, then fine-tuning: arXiv 2202.10054).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from training.batches.sampling import DistinctItemsSampler
from training.trainer.adapters import training_only, unwrap_adapter
from training.trainer.trainer import NoteLLM2Trainer, parameter_groups


HEAD = ("late_fusion", "reduction", "logit_scale")
WARM_UP = 0.1
LOG_STEPS = 50


@dataclass(frozen=True)
class States:
    """What the head makes embeddings of, for some items, as the model's output has it; on the CPU.

    Attributes:
        multimodal, visual: `(n, LLM width)` float32; the second with mICL only.
        summary: `(n, vision width)` float32, zeros for items without an image; None where none has one.
        has_image: `(n,)` bool.
    """

    multimodal: Tensor
    visual: Tensor | None
    summary: Tensor | None
    has_image: Tensor

    def embed(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """`embeddings`, `visual_embeddings` and `has_image` of some rows, with gradients for the model's head."""
        device, shown = model.device, self.has_image[rows].to(model.device)
        summary = None if self.summary is None else self.summary[rows].to(device)
        visual = None if self.visual is None else model.finish(self.visual[rows].to(device), summary, shown)
        embeddings = model.finish(self.multimodal[rows].to(device), summary, shown)
        return {"embeddings": embeddings, "visual_embeddings": visual, "has_image": shown}


def head_first(trainer: NoteLLM2Trainer, steps: int) -> list[dict[str, float]]:
    """Train the head of a trainer's model in place, with its loss, masks, rates and batches; the rest stays as it is.

    Returns:
        Mean losses over every 50 steps: `step`, `loss`.

    Raises:
        ValueError: on several processes, for a model without a head, and for one whose folder's code is older than this.
    """
    model, arguments = unwrap_adapter(trainer.model), trainer.args
    if arguments.world_size > 1:
        raise ValueError("head_steps works on one process: train the head there, and go on from its model with all.")
    if not hasattr(model, "finish"):
        raise ValueError("head_steps needs a model whose code gives its states: save it anew with this version.")
    head = [parameter for name, parameter in model.named_parameters() if name.startswith(HEAD)]
    with training_only(trainer.model, head):
        return _train(trainer, model, steps)


def _train(trainer: NoteLLM2Trainer, model: Any, steps: int) -> list[dict[str, float]]:
    arguments, table = trainer.args, trainer.train_dataset.pairs
    size = arguments.per_device_train_batch_size
    sampler = DistinctItemsSampler(table, size, arguments.seed)
    batches = np.fromiter(islice(endless(sampler), steps * size), dtype=np.int64).reshape(steps, size)
    pairs = torch.from_numpy(table.pairs[batches].astype(np.int64))  # (steps, size, 2)
    positions, rows = pairs.unique(return_inverse=True)
    weights = None if table.weights is None else torch.from_numpy(table.weights[batches]).to(model.device)
    states = read_states(trainer, model, positions.tolist())
    optimizer = torch.optim.AdamW(parameter_groups(trainer.model, arguments))
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARM_UP * steps), steps)
    log, losses = [], []
    for step in tqdm(range(1, steps + 1), desc="Head", unit="step"):
        chosen = rows[step - 1].T.reshape(-1)  # first members, then second ones
        loss = trainer.pair_loss(
            **states.embed(model, chosen),
            item_index=positions[chosen].to(model.device),
            num_pairs=size,
            logit_scale=model.logit_scale,
            pair_weight=None if weights is None else weights[step - 1],
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % LOG_STEPS == 0 or step == steps:
            log.append({"step": step, "loss": float(np.mean(losses))})
            losses.clear()
    trainer.monitor.take()  # its first line is about steps through the LLM
    return log


def endless(sampler: DistinctItemsSampler) -> Iterator[int]:
    """Numbers of pairs, epoch after epoch."""
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from sampler


@torch.no_grad()
def read_states(trainer: NoteLLM2Trainer, model: Any, positions: Sequence[int]) -> States:
    """The states of items at some positions of the train items' table, by the model as it is."""
    arguments, items, collate = trainer.args, trainer.train_dataset.items, trainer.data_collator.collate_items
    size, dtype = arguments.per_device_eval_batch_size, arguments.precision.dtype
    was_training, outputs = model.training, []
    model.eval()
    for start in tqdm(range(0, len(positions), size), desc="Reading items", unit="batch"):
        batch = [items[position] for position in positions[start : start + size]]
        inputs = {name: value.to(model.device) for name, value in collate(batch).items()}
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            outputs.append(model(**inputs, output_states=True))
    model.train(was_training)
    width = next((output.summary.shape[-1] for output in outputs if output.summary is not None), None)
    if width is not None:
        for output in outputs:
            if output.summary is None:
                output.summary = output.states.new_zeros(len(output.states), width)
    multimodal, visual, summary = (
        None if outputs[0].get(name) is None else torch.cat([output[name].float().cpu() for output in outputs])
        for name in ("states", "visual_states", "summary")
    )
    assert multimodal is not None
    return States(multimodal, visual, summary, torch.cat([output.has_image.cpu() for output in outputs]))
