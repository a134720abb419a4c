"""The catalogue job as a Ray Data pipeline: block numbers -> actors that prepare -> actors with the model -> the driver.

Every actor maps the table itself, so only prepared blocks and embeddings travel; the driver alone writes.
"""

import logging
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.data
import torch

from hub.catalogue.encoder import EncodedBlock, ItemEncoder, Rows
from hub.catalogue.shards import Plan


@dataclass(frozen=True)
class RayOptions:
    """Where the pipeline runs, and its actors.

    Attributes:
        address: of a running cluster; None starts Ray on this machine, unless it runs in this process.
        prepare_actors: actors of one CPU each that open pictures and tokenize.
        model_actors: actors that run the model.
        cpus: and torch threads, of each model actor.
        gpus: of each model actor.
    """

    address: str | None
    prepare_actors: int
    model_actors: int
    cpus: int
    gpus: float


class Preparing:
    """The CPU half of the encoder, as an actor."""

    def __init__(self, encoder: ItemEncoder, rows: Rows, plan: Plan):
        torch.set_num_threads(1)
        self.encoder, self.rows, self.plan = encoder, rows, plan

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prepared = self.rows.prepare(self.encoder, row["block"], self.plan.block_range(row["block"]))
        return {"block": row["block"], "prepared": pickle.dumps(prepared)}


class Embedding:
    """The model half of the encoder, as an actor."""

    def __init__(self, encoder: ItemEncoder, threads: int):
        torch.set_num_threads(threads)
        self.encoder = encoder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"block": row["block"], "encoded": pickle.dumps(self.encoder.embed(pickle.loads(row["prepared"])))}


def encode_with_ray(
    encoder: ItemEncoder, rows: Rows, plan: Plan, blocks: list[int], options: RayOptions
) -> Iterator[EncodedBlock]:
    """Encodes blocks on the cluster and yields them as they are finished.

    Raises:
        ValueError: when this machine has fewer CPUs or GPUs than the actors need, for they would wait for ever.
    """
    _connect(options)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the job has its own
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    bare = replace(encoder)  # without what this process has loaded
    pipeline = (
        ray.data.from_items([{"block": block} for block in blocks], override_num_blocks=len(blocks))
        .map(
            Preparing,  # type: ignore[arg-type]  # Ray takes classes of actors
            fn_constructor_args=(bare, rows, plan),
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=max(1, options.prepare_actors)),
        )
        .map(
            Embedding,  # type: ignore[arg-type]
            fn_constructor_args=(bare, options.cpus),
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            compute=ray.data.ActorPoolStrategy(size=options.model_actors),
        )
    )
    for row in pipeline.iter_rows():
        yield pickle.loads(row["encoded"])


def _connect(options: RayOptions) -> None:
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; else it warns
        ray.init(options.address, include_dashboard=False, logging_level=logging.WARNING)
    if options.address is not None:
        return  # a cluster may grow
    there = ray.cluster_resources()
    needed = {
        "CPU": max(1, options.prepare_actors) + options.model_actors * options.cpus,
        "GPU": options.model_actors * options.gpus,
    }
    for resource, number in needed.items():
        if number > there.get(resource, 0):
            raise ValueError(
                f"The actors need {number:g} {resource}s and Ray has {there.get(resource, 0):g}: lower --ray_actors, "
                "--ray_cpus_per_actor, --ray_gpus_per_actor or --num_workers, or pass --ray_address of a cluster."
            )
