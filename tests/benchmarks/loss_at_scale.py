"""Time and memory of the tiled loss and of GradCache, against the plain loss and the plain step.

    python -m tests.benchmarks.loss_at_scale [--rows 4096 16384] [--tiled_rows 65536] [--chunk_sizes 16 8 4]

Every measurement runs in a process of its own, on one thread: the peak of resident memory in the first step beyond what
was resident before it (inputs and model), and the CPU seconds of the fastest step.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, HfArgumentParser, LlamaConfig

from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model, contrastive_pair_loss
from training.trainer.grad_cache import GradCache
from training.trainer.losses import PairLoss
from training.trainer.tiles import tiled_contrastive_loss


Step = Callable[[], object]


@dataclass
class Arguments:
    """What is measured."""

    rows: list[int] = field(default_factory=lambda: [4096, 16384], metadata={"help": "Rows of the square matrix."})
    tiled_rows: list[int] = field(default_factory=lambda: [65536], metadata={"help": "Further rows, tiled loss alone."})
    width: int = field(default=64, metadata={"help": "Width of the embeddings."})
    pairs: int = field(default=32, metadata={"help": "Pairs of the training step."})
    chunk_sizes: list[int] = field(default_factory=lambda: [16, 8, 4], metadata={"help": "Items in a chunk."})
    steps: int = field(default=3, metadata={"help": "Steps of which the fastest counts; one for --tiled_rows."})


def embeddings(rows: int, width: int) -> torch.Tensor:
    """Half of them random, the others near their partners."""
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, rows // 2, width, generator=generator)
    return F.normalize(torch.cat([first, first + noise]), dim=1).requires_grad_()


def plain_loss(rows: int, width: int) -> Step:
    given, scale = embeddings(rows, width), torch.tensor(3.0, requires_grad=True)
    return lambda: contrastive_pair_loss(given, scale).backward()


def tiled_loss(rows: int, width: int) -> Step:
    given, scale = embeddings(rows, width), torch.tensor(3.0, requires_grad=True)
    own = torch.arange(rows)
    target = own.roll(rows // 2)
    return lambda: tiled_contrastive_loss(given, given, target, own, scale)[0].mean().backward()


def model_and_inputs(pairs: int) -> tuple[NoteLLM2Model, dict[str, torch.Tensor]]:
    """A random model of 5 million parameters; items of one 64-pixel image and 120 tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=16
    )
    text = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4
    )
    qformer = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    config = NoteLLM2Config(
        vision_config=vision,
        text_config=text,
        qformer_config=qformer,
        image_token_id=1022,
        visual_embedding_token_id=1023,
    )
    items = 2 * pairs
    ids = torch.randint(1000, (items, 120))
    ids[:, 4:20], ids[:, 22] = 1022, 1023
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(items, 3, 64, 64),
        "num_images": torch.ones(items, dtype=torch.int64),
    }
    return NoteLLM2Model(config).train(), inputs


def plain_step(pairs: int) -> Step:
    model, inputs = model_and_inputs(pairs)

    def step() -> None:
        model.zero_grad()
        model(**inputs, return_loss=True).loss.backward()

    return step


def cached_step(pairs: int, chunk_size: int) -> Step:
    model, inputs = model_and_inputs(pairs)
    cache, loss = GradCache(chunk_size), partial(PairLoss(), item_index=None, num_pairs=pairs)

    def step() -> None:
        model.zero_grad()
        cache.step(model, model, inputs, loss)

    return step


def status(name: str) -> float:
    """A field of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


def measure(steps: int, make: Callable[..., Step], *arguments: int) -> tuple[float, float]:
    """CPU seconds of the fastest step, and MB of the first one's peak."""
    torch.set_num_threads(1)
    step = make(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = status("VmRSS")
    seconds = []
    for number in range(steps):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
        if number == 0:
            megabytes = status("VmHWM") - before
    return min(seconds), megabytes


def measured(steps: int, make: Callable[..., Step], *arguments: int) -> tuple[float, float]:
    """`measure` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, steps, make, *arguments).result()


def show(name: str, found: tuple[float, float], baseline: tuple[float, float] | None = None) -> None:
    line = f"{name:34}{found[0]:9.2f} s{found[1]:9.0f} MB"
    if baseline is not None:
        line += f"{found[0] / baseline[0]:10.2f} x time{found[1] / baseline[1]:8.2f} x memory"
    print(line, flush=True)


def main(arguments: Arguments) -> None:
    print(f"Loss and gradients, width {arguments.width}")
    for rows in arguments.rows:
        plain = measured(arguments.steps, plain_loss, rows, arguments.width)
        show(f"{rows:,} rows, plain", plain)
        show(f"{rows:,} rows, tiled", measured(arguments.steps, tiled_loss, rows, arguments.width), plain)
    for rows in arguments.tiled_rows:
        show(f"{rows:,} rows, tiled", measured(1, tiled_loss, rows, arguments.width))
    print(f"Training step of {arguments.pairs} pairs")
    plain = measured(arguments.steps, plain_step, arguments.pairs)
    show("plain", plain)
    for chunk_size in arguments.chunk_sizes:
        show(
            f"GradCache, chunks of {chunk_size} items",
            measured(arguments.steps, cached_step, arguments.pairs, chunk_size),
            plain,
        )


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
