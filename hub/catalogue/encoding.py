"""The job of hub/encode.py: what decides the shards is described first, then every block that is missing is encoded."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm
from transformers import AutoConfig

from hub.catalogue.encoder import EncodedBlock, ItemEncoder, Rows
from hub.catalogue.engines import encode_here
from hub.catalogue.shards import ARROW_TYPES, Plan, ShardWriter, close_job, open_job, read_rejects
from hub.catalogue.versions import Version, version_to_write
from modeling_notellm2 import Precision, choose_precision
from training.tables.commands.bounds import AtLeastOne, Bounds, Processes, check_bounds
from training.tables.commands.hashes import file_sha256
from training.tables.commands.model_folder import ADAPTER_CONFIG, loading
from training.tables.commands.options import (
    allow_remote_option,
    device_option,
    dtype_option,
    encoding_option,
    split_option,
)
from training.tables.commands.outputs import Output, check_inputs
from training.tables.items import load_items
from training.tables.reading import Table


MODEL_FILES = (".safetensors", ".bin", ".json", ".py", ".txt", ".model", ".jinja")
"""Endings of the files that decide what a model gives; a README beside them does not."""


@dataclass
class EncodeArguments:
    """What to encode, and how."""

    model: str = field(metadata={"help": "Folder or Hub id of a NoteLLM-2 model, or of an adapter of one."})
    items: str = field(
        metadata={
            "help": "Item table: Parquet file or folder of them, .jsonl, .csv, image folder with metadata, or Hub "
            "data set (ORG/DATA, or ORG/DATA:CONFIG)."
        }
    )
    output: str = field(metadata={"help": "Folder to write, or one that an earlier start of the same job left."})
    update: bool = field(
        default=False,
        metadata={
            "help": "Where --output holds an earlier version of the catalogue, encode only new and changed items; the "
            "new version takes its place as a whole."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model of the Hub."})
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    allow_remote: str | None = allow_remote_option()
    embedding_type: str = field(
        default="float32",
        metadata={
            "help": "How embeddings are stored; int8 holds round(127 * x).",
            "choices": list(ARROW_TYPES),
        },
    )
    visual: bool = field(default=False, metadata={"help": "Store the visual embeddings and has_image too."})
    dtype: str = dtype_option()
    compile: bool = field(default=False, metadata={"help": "Run the model through torch.compile."})
    device: str = device_option()
    batch_size: AtLeastOne = field(default=32, metadata={"help": "Items in a batch."})
    rows_per_block: AtLeastOne = field(
        default=256, metadata={"help": "Rows sorted by length and prepared together; bounds the memory."}
    )
    rows_per_shard: AtLeastOne = field(
        default=8192, metadata={"help": "Rows of a shard, a multiple of --rows_per_block; a kill loses less than one."}
    )
    num_workers: Processes = field(
        default=min(8, max(1, (os.cpu_count() or 2) // 2)),
        metadata={"help": "Processes that open pictures and tokenize while the model runs; 0: no extra process."},
    )
    engine: str = field(
        default="process",
        metadata={"help": "One process (with its workers), or a Ray cluster.", "choices": ["process", "ray"]},
    )
    ray_address: str | None = field(
        default=None, metadata={"help": "Of a running Ray cluster, or 'auto'; none: this machine alone."}
    )
    ray_actors: Annotated[int, Bounds(1, 100_000)] = field(
        default=1, metadata={"help": "With Ray: processes that run the model."}
    )
    ray_cpus_per_actor: AtLeastOne = field(
        default=1, metadata={"help": "With Ray: CPUs, and threads, of each of them."}
    )
    ray_gpus_per_actor: Annotated[float, Bounds(0, 1000)] = field(
        default=0.0, metadata={"help": "With Ray: GPUs of each of them."}
    )

    def __post_init__(self) -> None:
        check_bounds(self)


def encode(arguments: EncodeArguments) -> dict[str, Any]:
    """The whole job; returns the manifest.

    Raises:
        ValueError: for a table, model, output folder or options that can't be used, or when no row can be.
        OSError: when a file can't be read or written.
    """
    check_inputs([Output("--output", Path(arguments.output))], (arguments.model, arguments.items))
    model_folder = find_model(arguments.model, arguments.revision)
    precision = choose_precision(arguments.dtype, arguments.device)
    print(f"Precision: {precision}")
    encoder = ItemEncoder(
        str(model_folder),
        precision.name,
        arguments.device,
        arguments.batch_size,
        arguments.visual,
        arguments.compile,
    )
    config = AutoConfig.from_pretrained(adapted_model(model_folder) or model_folder, trust_remote_code=True)
    if arguments.visual and not config.micl:
        raise ValueError(
            f"{arguments.model} was trained without mICL and has no visual embeddings; leave out --visual."
        )
    rows = Rows(
        *load_items(
            arguments.items,
            arguments.split,
            check_images=False,  # the encoder opens them
            num_workers=arguments.num_workers,
            encoding=arguments.encoding,
            allow_remote=arguments.allow_remote,
        )
    )
    plan = Plan(len(rows), arguments.rows_per_block, arguments.rows_per_shard)
    job = describe_job(arguments, model_folder, rows.items.table)
    with version_to_write(Path(arguments.output), job, arguments.update) as version:
        return write_version(version, encoder, rows, plan, job, arguments, precision)


def write_version(
    version: Version,
    encoder: ItemEncoder,
    rows: Rows,
    plan: Plan,
    job: dict[str, Any],
    arguments: EncodeArguments,
    precision: Precision,
) -> dict[str, Any]:
    """Writes the shards that are missing and closes the job; returns the manifest.

    Raises:
        ValueError: when no row could be encoded.
    """
    rows = replace(rows, earlier=version.earlier)
    with open_job(version.folder, version.started_as(job), plan) as done:
        writer = ShardWriter(version.folder, plan, arguments.embedding_type, done)
        rows_done = sum(plan.rows_of(shard) for shard in done)
        with tqdm(total=plan.rows, initial=rows_done, desc="Encoding", unit="item", smoothing=0.05) as bar:
            for block in run_engine(encoder, rows, plan, writer.pending_blocks(), arguments):
                writer.add(block)
                first, behind = plan.block_range(block.number)
                bar.update(behind - first)
        manifest = close_job(version.folder, job, plan, rows.items.table.empty_lines(), _made_with(precision))
    if not manifest["counts"]["items"]:
        rejects = read_rejects(version.folder, 1)
        first_reason = f"; the first: {rejects[0].reason}" if rejects else ""
        raise ValueError(f"{arguments.items}: none of {plan.rows} rows could be encoded{first_reason}.")
    return manifest


def run_engine(
    encoder: ItemEncoder, rows: Rows, plan: Plan, blocks: list[int], arguments: EncodeArguments
) -> Iterator[EncodedBlock]:
    """Encodes blocks by the engine that the arguments name, in any order."""
    if not blocks:
        return iter(())
    if arguments.engine == "ray":
        from hub.catalogue.ray_engine import RayOptions, encode_with_ray  # Ray is an extra

        options = RayOptions(
            arguments.ray_address,
            arguments.num_workers,
            arguments.ray_actors,
            arguments.ray_cpus_per_actor,
            arguments.ray_gpus_per_actor,
        )
        return encode_with_ray(encoder, rows, plan, blocks, options)
    return encode_here(encoder, rows, plan, blocks, arguments.num_workers)


def find_model(model: str, revision: str | None) -> Path:
    """Folder of a model, downloaded from the Hub if need be."""
    with loading(model):
        return Path(model) if Path(model).is_dir() else Path(snapshot_download(model, revision=revision))


def adapted_model(folder: Path) -> Path | None:
    """Folder of the model that an adapter changes, downloaded if need be; None for a folder that is no adapter."""
    config = folder / ADAPTER_CONFIG
    if not config.is_file() or (folder / "config.json").is_file():
        return None
    return find_model(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"], None)


def describe_model(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model's folder that decides its embeddings: weights, settings, code; for an adapter, of the
    model that it changes too."""
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in MODEL_FILES}
    with tqdm(files.items(), desc="Hashing the model", unit="file", leave=False) as bar:
        hashes = {name: file_sha256(path) for name, path in bar}
    base = adapted_model(folder)
    return hashes if base is None else {**hashes, **{f"base/{name}": sha for name, sha in describe_model(base).items()}}


def model_changes(known: Mapping[str, str], files: Mapping[str, str]) -> list[str]:
    """Files in which two models differ, both as `describe_model` gives them. Of files that only one of them has, weights
    count; publishing adds others."""
    weights = {name for name in {*known, *files} if name.endswith((".safetensors", ".bin"))}
    return sorted(name for name in weights | (known.keys() & files.keys()) if known.get(name) != files.get(name))


def describe_job(arguments: EncodeArguments, model_folder: Path, table: Table) -> dict[str, Any]:
    """Everything that decides what the shards hold. The engine and its workers don't."""
    files = describe_model(model_folder)
    total = hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in files.items()).encode()).hexdigest()
    revision = model_folder.name if model_folder.parent.name == "snapshots" else arguments.revision
    names = ("encoding", "embedding_type", "visual", "compile", "batch_size", "rows_per_block", "rows_per_shard")
    settings = {name: getattr(arguments, name) for name in names}
    if arguments.allow_remote is not None:  # jobs of earlier programs don't have it
        settings["allow_remote"] = arguments.allow_remote
    dtype = choose_precision(arguments.dtype, arguments.device).name
    return {
        "model": {"source": arguments.model, "revision": revision, "sha256": total, "files": files},
        "table": {"source": arguments.items, "rows": len(table), "files": table.files},
        "settings": {**settings, "dtype": dtype, "device": torch.device(arguments.device).type},
    }


def _made_with(precision: Precision) -> dict[str, Any]:
    """Said, not compared: another version may give other last digits."""
    return {
        "precision": asdict(precision),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
