"""Requests a second, p50 and p95 of hub/serve.py at 1, 8 and 64 clients, beside batch encoding of the same items.

    python -m tests.benchmarks.bench_serve [--requests 256] [--rounds 3]

Each request is one item of text and a JPEG. Server and encoder run the model on one thread. The CPU seconds of an item
are those of the server's process, or of this one while it encodes; the clients' are not among them. Rounds alternate, and
medians are printed.
"""

import asyncio
import io
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from transformers import HfArgumentParser

from hub.catalogue.encoder import ItemEncoder, Place
from tests.benchmarks.bench_encode import make_model
from tests.support.catalogue import make_items
from tests.support.server import Running, data_url, serving


CLIENTS = (1, 8, 64)
BATCH = 64
SIZES = {"small": {}, "tiny": {"width": 64, "layers": 1}}
"""Of the LLM and the vision encoder; the small one takes about as long for an item as small real models do."""


@dataclass
class Options:
    """Sizes of the benchmark."""

    size: str = field(
        default="small",
        metadata={"help": "tiny: hardly any model, for what all around it costs.", "choices": ["small", "tiny"]},
    )
    requests: int = field(default=256, metadata={"help": "Items of each run."})
    rounds: int = field(default=3, metadata={"help": "Runs of each kind, alternating."})


@dataclass(frozen=True)
class Run:
    """What a run took.

    Attributes:
        rate: items a second.
        cpu: seconds of an item.
        latencies: seconds of each request, sorted.
    """

    rate: float
    cpu: float
    latencies: list[float]

    def latency(self, share: float) -> float:
        """Seconds within which this share of the requests was answered."""
        return self.latencies[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


def jpeg(number: int) -> bytes:
    """A picture as a shop sends it, of 20 to 30 kB."""
    coarse = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((320, 320), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def encode(encoder: ItemEncoder, items: list[dict[str, Any]]) -> Run:
    """Batch encoding, in blocks that are sorted by length."""
    wall, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(items), 256):
        block = [(Place(str(row), "", row), item) for row, item in enumerate(items[first : first + 256])]
        assert not encoder.embed(encoder.prepare(0, block)).rejects
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Run(len(items) / seconds, cpu / len(items), [seconds])


def serve(running: Running, bodies: list[dict[str, Any]], clients: int) -> Run:
    """As many clients, each of which sends its next item when the last is answered."""
    latencies: list[float] = []
    waiting = iter(bodies)

    async def client(http: httpx.AsyncClient) -> None:
        for body in waiting:
            start = time.perf_counter()
            answer = await http.post("/embed", json=body)
            answer.raise_for_status()
            latencies.append(time.perf_counter() - start)

    async def ask() -> None:
        async with httpx.AsyncClient(
            base_url=running.url, timeout=600, limits=httpx.Limits(max_connections=64)
        ) as http:
            await asyncio.gather(*(client(http) for _ in range(clients)))

    before, start = sum(psutil.Process(running.process.pid).cpu_times()[:2]), time.perf_counter()
    asyncio.run(ask())
    seconds = time.perf_counter() - start
    cpu = sum(psutil.Process(running.process.pid).cpu_times()[:2]) - before
    return Run(len(bodies) / seconds, cpu / len(bodies), sorted(latencies))


def table(encoding: list[Run], served: dict[int, list[Run]]) -> str:
    """A line for batch encoding and one for each number of clients."""
    lines = [f"{'':18}{'items/s':>9}{'p50 ms':>9}{'p95 ms':>9}{'CPU ms/item':>13}{'of encoding: rate':>20}{'CPU':>7}"]
    rate, cpu = (statistics.median(getattr(run, name) for run in encoding) for name in ("rate", "cpu"))
    lines.append(f"{'batch encoding':18}{rate:9.1f}{'':18}{1000 * cpu:13.1f}")
    for clients, runs in served.items():
        middle = sorted(runs, key=lambda run: run.rate)[len(runs) // 2]
        latencies = "".join(f"{1000 * middle.latency(share):9.0f}" for share in (0.5, 0.95))
        # Round by round, so that a busy machine is busy for both.
        rates = statistics.median(ours.rate / plain.rate for ours, plain in zip(runs, encoding, strict=True))
        cpus = statistics.median(plain.cpu / ours.cpu for ours, plain in zip(runs, encoding, strict=True))
        lines.append(
            f"{f'{clients} clients':18}{middle.rate:9.1f}{latencies}{1000 * middle.cpu:13.1f}{rates:20.2f}{cpus:7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Alternate all, print a table."""
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    torch.set_num_threads(1)
    items = [item | {"image": jpeg(number)} for number, item in enumerate(make_items(options.requests))]
    bodies = [{"items": [item | {"image": data_url(item["image"])}]} for item in items]
    encoding: list[Run] = []
    served: dict[int, list[Run]] = {clients: [] for clients in CLIENTS}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", **SIZES[options.size])
        encoder = ItemEncoder(f"{folder}/model", batch_size=BATCH, visual=True)
        with serving(Path(folder) / "model", "--batch_items", BATCH) as running:
            encode(encoder, items[:BATCH])
            for _ in range(options.rounds):
                encoding.append(encode(encoder, items))
                for clients, runs in served.items():
                    runs.append(serve(running, bodies, clients))
            joined = running.metric("items_total") / running.metric("batch_items_count")
    print(table(encoding, served))
    print(f"{joined:.1f} items in a batch on average of all")


if __name__ == "__main__":
    main()
