"""Items a second of the Ray engine: one and two model workers of one thread each, and what the machine itself allows.

    python -m tests.benchmarks.bench_encode [--blocks 24] [--repeats 3]

The baseline is twice the rate of one worker. Rates are taken while every worker is busy: the first and last blocks, in
which workers start and run dry, don't count. `machine` is the same ratio of two plain processes that run the model on one
block again and again, without Ray, pictures or writing: on busy or hyper-threaded cores it is below 1 too.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, HfArgumentParser, LlamaConfig, LlamaModel

from hub.catalogue.encoder import ItemEncoder, Rows
from hub.catalogue.ray_engine import RayOptions, encode_with_ray
from hub.catalogue.shards import Plan
from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from tests.support.catalogue import make_items
from tests.support.models import QFORMER, make_image_processor, make_tokenizer
from training.tables.items import load_items


ROWS = 16


@dataclass
class Options:
    """Sizes of the benchmark."""

    blocks: int = field(default=24, metadata={"help": f"Blocks of {ROWS} items that each run encodes."})
    repeats: int = field(default=3, metadata={"help": "Runs of each kind, alternating; medians are printed."})


def make_model(folder: Path, width: int = 256, layers: int = 4) -> None:
    """A model of random weights; by default it takes about a tenth of a second for an item, as small real ones do.

    Args:
        folder: to write.
        width, layers: of the vision encoder; the LLM has twice of both.
    """
    torch.manual_seed(0)
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    )
    text = LlamaModel(
        LlamaConfig(
            vocab_size=260,
            hidden_size=2 * width,
            intermediate_size=8 * width,
            num_hidden_layers=2 * layers,
            num_attention_heads=8,
        )
    )
    model = NoteLLM2Model.from_vision_text_pretrained(vision, text, qformer_config=QFORMER, embedding_dim=64)
    processor = NoteLLM2Processor.from_vision_text_pretrained(make_image_processor(), make_tokenizer(), model=model)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def ray_rate(model: str, table_path: str, blocks: int, actors: int) -> float:
    """Items a second of the pipeline with this many model workers."""
    rows, plan = Rows(*load_items(table_path)), Plan(blocks * ROWS, ROWS, ROWS)
    encoder = ItemEncoder(model, batch_size=ROWS)
    arrivals = [
        time.perf_counter()
        for _ in encode_with_ray(encoder, rows, plan, list(range(blocks)), RayOptions(None, 1, actors, 1, 0))
    ]
    first, last = 2 * actors, blocks - actors
    return (last - first) * ROWS / (arrivals[last - 1] - arrivals[first - 1])


def embed_again_and_again(model: str, table_path: str, seconds: float, all_ready: Barrier, done: Queue) -> None:
    """Counts the items that this process embeds in this many seconds."""
    torch.set_num_threads(1)
    encoder = ItemEncoder(model, batch_size=ROWS)
    block = Rows(*load_items(table_path)).prepare(encoder, 0, (0, ROWS))
    encoder.embed(block)
    all_ready.wait()
    start, items = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        items += len(encoder.embed(block).item_ids)
    done.put(items / (time.perf_counter() - start))


def machine_rate(model: str, table_path: str, processes: int, seconds: float = 15) -> float:
    """Items a second of this many processes that share nothing."""
    context = multiprocessing.get_context("spawn")
    done, all_ready = context.Queue(), context.Barrier(processes)
    arguments = (model, table_path, seconds, all_ready, done)
    running = [context.Process(target=embed_again_and_again, args=arguments) for _ in range(processes)]
    for process in running:
        process.start()
    rate = sum(done.get() for _ in running)
    for process in running:
        process.join()
    return rate


def main() -> None:
    """Alternates the kinds, so that a busy machine is busy for all of them, and prints a line for each round."""
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}  # Ray would let all others go first
    with tempfile.TemporaryDirectory() as folder:
        model, table = f"{folder}/model", f"{folder}/items.parquet"
        make_model(Path(model))
        pq.write_table(pa.Table.from_pylist(make_items(options.blocks * ROWS)), table)
        ratios: dict[str, list[float]] = {"ray": [], "machine": []}
        ray.init(num_cpus=3, object_store_memory=200 * 2**20, include_dashboard=False, logging_level="error")
        for _ in range(options.repeats):
            one, two = (ray_rate(model, table, options.blocks, actors) for actors in (1, 2))
            alone, both = (machine_rate(model, table, processes) for processes in (1, 2))
            ratios["ray"].append(two / (2 * one))
            ratios["machine"].append(both / (2 * alone))
            rates = {"one": one, "two": two, "machine_one": alone, "machine_two": both}
            load = os.getloadavg()[0]
            print(
                json.dumps({name: round(rate, 1) for name, rate in rates.items()} | {"load": round(load, 1)}),
                flush=True,
            )
        ray.shutdown()
    medians = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    print(json.dumps({"two_workers_of_twice_one": medians["ray"], "machine": medians["machine"]}))


if __name__ == "__main__":
    main()
