"""Rows of all processes in one tensor, with gradients back to the process they came from.

Negatives of the whole joined batch need every process's embeddings on every process. Without the gradient's way back a
process would train its items as queries only, never as somebody else's negative or target.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def row_counts(count: int, device: torch.device) -> list[int]:
    """Every process's number of rows, in rank order; this one has `count`."""
    if world_size() == 1:
        return [count]
    mine = torch.tensor([count], device=device)
    everyones = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyones, mine)
    return torch.cat(everyones).tolist()


def own_rows(counts: Sequence[int]) -> slice:
    """Where this process's rows lie among all rows, given `row_counts`."""
    rank = dist.get_rank() if world_size() > 1 else 0
    first = sum(counts[:rank])
    return slice(first, first + counts[rank])


@torch.no_grad()
def gather(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """All processes' rows in rank order, without gradients.

    Args:
        rows: `(m, ...)`, any dtype; `m` may differ between processes, the rest of the shape may not.
        counts: what `row_counts` gave for these rows; asked for anew if left out.

    Returns:
        `(M, ...)`, the same on every process; `rows` itself, detached, where there is one process.
    """
    if world_size() == 1:
        return rows.detach()
    counts = row_counts(len(rows), rows.device) if counts is None else counts
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_with_gradient(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """All processes' rows in rank order, differentiable: a row's gradient is the sum of what all processes give it.

    Every process must run the backward pass through the result, or the others wait forever.

    Args:
        rows: `(m, ...)`, floating; `m` may differ between processes, the rest of the shape may not.
        counts: what `row_counts` gave for these rows; asked for anew if left out.

    Returns:
        `(M, ...)`; `rows` itself where there is one process.
    """
    if world_size() == 1:
        return rows
    counts = row_counts(len(rows), rows.device) if counts is None else counts
    return _GatherWithGradient.apply(rows, counts)


@torch.no_grad()
def sum_over_processes(values: Tensor) -> Tensor:
    """Elementwise sum over the processes, without gradients; the same on every process."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def touch_unused(model: nn.Module, has_image: Tensor) -> Tensor | float:
    """A zero with gradients for the parts that items without images leave out, to be added to the loss.

    DDP waits for the gradient of every parameter, also on a process whose batch is of texts alone.

    Args:
        model: the NoteLLM-2 model, whatever is wrapped around its language model.
        has_image: `(n,)` bool, of the items that the loss is over.
    """
    if world_size() == 1 or has_image.any():
        return 0.0
    unused = [p for name, p in model.named_parameters() if p.requires_grad and "language_model" not in name]
    return 0.0 * sum(parameter.float().sum() for parameter in unused)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        return gather(rows, counts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over_processes(gradient.contiguous())[own_rows(ctx.counts)], None
