"""What several processes do together: joined rows with gradients, work done once per machine, weights in shards.

Negatives of the whole joined batch need every process's embeddings on every process. Without the gradient's way back a
process would train its items as queries only, never as somebody else's negative or target.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


Result = TypeVar("Result")
NO_LIMIT = timedelta(days=365)
"""Of a wait for work that may take hours. A process that ends closes its connections, and so ends the wait of others."""


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join_restarted() -> None:
    """Let processes that torchrun has started again after a death find each other.

    torchrun hands them the store of the attempt before, where gloo and NCCL would read the addresses of processes that are
    gone. So each further attempt has names of its own in it. The first one is left to accelerate.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    dist.init_process_group(store=dist.PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=size)


def share_with_deepspeed() -> None:
    """Let DeepSpeed know the processes that are there: accelerate tells it on GPUs alone, and it would take itself for one."""
    import deepspeed  # only for those who ask for it

    if world_size() > 1:
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)


class EngineBackward:
    """Backward passes of DeepSpeed's engine, which takes its step with the last of a batch's chunks alone.

    Args:
        engine: as accelerate wraps it.
        steps: whether the engine takes a step at the end of this batch; not, where further batches are added to it.
    """

    def __init__(self, engine: Any, steps: bool):
        self.engine, self.steps, self.waits = engine, steps, False

    def __call__(self, loss: Tensor) -> None:
        """Add a chunk's gradients, and take the step with those of the last one."""
        self.engine.backward(loss, sync_gradients=self.steps and not self.waits, scale_wrt_gas=False)

    @contextmanager
    def no_step(self) -> Iterator[None]:
        """Within it no pass is a batch's last."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False


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


def once_per_machine(work: Callable[[], Result]) -> Result:
    """What `work` gives, done by the first process of each machine and handed to its others.

    They wait as long as it takes, and so does every machine for the others: no later exchange runs out of time because one
    had more to do. All processes call it.

    Args:
        work: gives what can be pickled.

    Raises:
        Exception: what `work` raised, on every process of the machine.
    """
    if world_size() == 1:
        return work()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    everyone = dist.new_group(backend="gloo", timeout=NO_LIMIT)
    machine, _ = dist.new_subgroups(group_size=here, backend="gloo", timeout=NO_LIMIT)
    outcome: list[Any] = [None, None]
    if dist.get_rank() % here == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # not swallowed: raised below, here and on the machine's other processes
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=machine, group_src=0)
    failures: list[Any] = [None] * world_size()
    dist.all_gather_object(failures, outcome[1], group=everyone)
    for group in (machine, everyone):
        dist.destroy_process_group(group)
    failure = next((failure for failure in failures if failure is not None), None)
    if failure is not None:
        raise failure
    return outcome[0]


def agreed(value: Result) -> Result:
    """The first process's value, on all of them."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def shard_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Let accelerate spread a model by FSDP2 over processes without GPUs, where it leaves the plugin out.

    The rest is accelerate's way on GPUs: its wrapping, checkpoints and clipping. For tests and for trying a config out.
    """
    # In both of accelerate's shared states, as on GPUs: one is read from the other again and again.
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)


def layer_classes(*models: nn.Module) -> list[str]:
    """Class names of what the models' outermost lists of modules hold: the layers that are gathered one by one."""
    classes: set[str] = set()
    waiting = [*models]
    while waiting:
        for part in waiting.pop().children():
            if isinstance(part, nn.ModuleList):
                classes |= {type(layer).__name__ for layer in part}
            else:
                waiting.append(part)
    return sorted(classes)


@contextmanager
def gathered_once(model: nn.Module, reshard_after: bool) -> Iterator[None]:
    """Within it each weight that FSDP2 gathers stays until the end, however often the model is run forward and backward.

    Memory: the whole model's weights, and its gradients as far as their exchange is put off. Nothing happens without
    FSDP2.

    Args:
        model: as FSDP2 wraps it.
        reshard_after: whether weights are given up after a forward pass again from then on.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    model.set_reshard_after_backward(False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(reshard_after)
        model.set_reshard_after_backward(True)
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def gathered_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """A model's state on the CPU, gathered tensor by tensor from all processes, which all call it.

    Args:
        keep: whether this process wants it; empty otherwise.
    """
    state = {}
    for name, values in model.state_dict().items():
        gathered = whole(values)
        if keep:
            state[name] = gathered.to("cpu", copy=True)
    return state


def whole(values: Tensor) -> Tensor:
    """A parameter that may be spread over processes as one tensor without gradient. All of them call it."""
    return values.full_tensor().detach() if isinstance(values, DTensor) else values.detach()


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        return gather(rows, counts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over_processes(gradient.contiguous())[own_rows(ctx.counts)], None
