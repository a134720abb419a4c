"""Encodes a whole catalogue: an item table in, a folder of Parquet shards with embeddings out.

    python hub/encode.py --model PATH --items ITEMS --output DIR

DIR gets shard-*.parquet (`item_id`, `embedding`; with --visual `visual_embedding` and `has_image`), manifest.json and
rejects.parquet (rows left out: `item_id`, `file`, `row`, `reason`). Killed at any moment and started again with the same
options, the job goes on with the first missing shard; on one kind of machine with one number of threads
(OMP_NUM_THREADS) the shards come out the same, byte for byte. With --engine ray it runs on the machines of a Ray cluster,
which must all see ITEMS and PATH.

Exit code: 0 all rows encoded; 3 finished, with rows in rejects.parquet; 1 failed; 2 wrong options.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig

from hub.catalogue.encoder import EncodedBlock, ItemEncoder, PreparedBlock, Rows
from hub.catalogue.shards import (
    ARROW_TYPES,
    REJECTS,
    Plan,
    ShardWriter,
    close_job,
    open_job,
    read_rejects,
)
from modeling_notellm2 import DTYPES, Precision, choose_precision
from training.tables.commands.bounds import AtLeastOne, Bounds, NotNegative, check_bounds
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS, command, parse
from training.tables.commands.hashes import file_sha256
from training.tables.commands.model_folder import loading
from training.tables.commands.outputs import Output, check_inputs
from training.tables.items import load_items
from training.tables.reading import Table


MODEL_FILES = (".safetensors", ".bin", ".json", ".py", ".txt", ".model", ".jinja")
"""Endings of the files that decide what a model gives; a README beside them does not."""


@dataclass
class EncodeArguments:
    """What to encode, and how."""

    model: str = field(metadata={"help": "Folder or Hub id of a NoteLLM-2 model with its processor."})
    items: str = field(
        metadata={
            "help": "Item table: Parquet file or folder of them, .jsonl, .csv, image folder with metadata, or Hub "
            "data set (ORG/DATA, or ORG/DATA:CONFIG)."
        }
    )
    output: str = field(metadata={"help": "Folder to write, or one that an earlier start of the same job left."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model of the Hub."})
    split: str | None = field(
        default=None, metadata={"help": "Split of a data set or folder; none: all, one after another."}
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "Of CSV and JSON lines tables, e.g. gbk or latin-1; none: UTF-8, or as their mark says."},
    )
    embedding_type: str = field(
        default="float32",
        metadata={
            "help": "How embeddings are stored; int8 holds round(127 * x).",
            "choices": list(ARROW_TYPES),
        },
    )
    visual: bool = field(default=False, metadata={"help": "Store the visual embeddings and has_image too."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the weights; auto: bfloat16 where the machine has it.", "choices": list(DTYPES)},
    )
    compile: bool = field(default=False, metadata={"help": "Run the model through torch.compile."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu",
        metadata={"help": "Where the model runs, e.g. cpu, cuda, cuda:1; by default a GPU if there is one."},
    )
    batch_size: AtLeastOne = field(default=32, metadata={"help": "Items in a batch."})
    rows_per_block: AtLeastOne = field(
        default=256, metadata={"help": "Rows sorted by length and prepared together; bounds the memory."}
    )
    rows_per_shard: AtLeastOne = field(
        default=8192, metadata={"help": "Rows of a shard, a multiple of --rows_per_block; a kill loses less than one."}
    )
    num_workers: NotNegative = field(
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
    ray_actors: AtLeastOne = field(default=1, metadata={"help": "With Ray: processes that run the model."})
    ray_cpus_per_actor: AtLeastOne = field(
        default=1, metadata={"help": "With Ray: CPUs, and threads, of each of them."}
    )
    ray_gpus_per_actor: Annotated[float, Bounds(0)] = field(
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
    config = AutoConfig.from_pretrained(model_folder, trust_remote_code=True)
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
        )
    )
    plan = Plan(len(rows), arguments.rows_per_block, arguments.rows_per_shard)
    job = describe_job(arguments, model_folder, rows.items.table)
    output = Path(arguments.output)
    with open_job(output, job, plan) as done:
        writer = ShardWriter(output, plan, arguments.embedding_type, done)
        rows_done = sum(plan.rows_of(shard) for shard in done)
        with tqdm(total=plan.rows, initial=rows_done, desc="Encoding", unit="item", smoothing=0.05) as bar:
            for block in run_engine(encoder, rows, plan, writer.pending_blocks(), arguments):
                writer.add(block)
                first, behind = plan.block_range(block.number)
                bar.update(behind - first)
        manifest = close_job(output, job, plan, rows.items.table.empty_lines(), _made_with(precision))
    if not manifest["counts"]["items"]:
        rejects = read_rejects(output, 1)
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


def encode_here(
    encoder: ItemEncoder, rows: Rows, plan: Plan, blocks: list[int], num_workers: int
) -> Iterator[EncodedBlock]:
    """The model in this process, the next blocks prepared in worker processes meanwhile."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else each worker warns that it was forked
    _ = encoder.processor  # before the workers start, which then share it
    loader = DataLoader(
        _Blocks(encoder, rows, plan, blocks),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        # Children of this very process: they end when it is killed, which a fork server's would not.
        multiprocessing_context="fork" if num_workers else None,
    )
    return map(encoder.embed, loader)


class _Blocks(Dataset[PreparedBlock]):
    """Prepared blocks, as a loader's workers ask for them."""

    def __init__(self, encoder: ItemEncoder, rows: Rows, plan: Plan, blocks: list[int]):
        self.encoder, self.rows, self.plan, self.blocks = encoder, rows, plan, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> PreparedBlock:
        block = self.blocks[index]
        return self.rows.prepare(self.encoder, block, self.plan.block_range(block))


def _as_it_is(block: Any) -> Any:
    return block


def find_model(model: str, revision: str | None) -> Path:
    """Folder of a model, downloaded from the Hub if need be."""
    with loading(model):
        return Path(model) if Path(model).is_dir() else Path(snapshot_download(model, revision=revision))


def describe_model(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model's folder that decides its embeddings: weights, settings, code."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in MODEL_FILES)
    with tqdm(files, desc="Hashing the model", unit="file", leave=False) as bar:
        return {path.name: file_sha256(path) for path in bar}


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


def summary(manifest: dict[str, Any], output: Path) -> str:
    """What the job did, for people."""
    counts, settings = manifest["counts"], manifest["job"]["settings"]
    lines = [
        f"{output}: {counts['items']:,} items, {manifest['width']} dimensions as {settings['embedding_type']}, "
        f"shards: {len(manifest['shards'])}"
    ]
    if counts["rejects"]:
        lines.append(f"{counts['rejects']:,} of {counts['rows']:,} rows left out, see {output / REJECTS}; the first:")
        lines += [
            f"  {reject.file}, row {reject.row}, item_id {reject.ids[0]!r}: {reject.reason}"
            for reject in read_rejects(output, 5)
        ]
    return "\n".join(lines)


@command("hub/encode.py", go_on="Start it again with the same options: it goes on with the first missing shard.")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(EncodeArguments, options=options)
    manifest = encode(arguments)
    print(summary(manifest, Path(arguments.output)))
    return DONE_WITH_REJECTS if manifest["counts"]["rejects"] else DONE


if __name__ == "__main__":
    sys.exit(main())
