"""Every command that writes, as a small job of a second, run in a process of its own with whatever shall go wrong there."""

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path

import hub.assemble
import hub.card
import hub.convert_official
import hub.encode
import hub.gallery
import hub.index
import hub.publish
import hub.semantic_ids
import training.align
import training.evaluate
import training.hard_negatives
import training.mine
import training.report
import training.run
from tests.support.catalogue import make_items, write_items
from tests.support.models import make_backbones, make_image_processor, make_tokenizer


RESEARCH = Path(__file__).parents[1] / "reference" / "official" / "full"


@dataclass(frozen=True)
class Job:
    """A command with its options.

    Attributes:
        main: its entry point.
        options: as they are typed; INPUTS stands for the folder of `write_inputs`, PLACE for where it shall write.
        result: patterns of files that two good runs write alike, byte for byte.
        stays: patterns of files that a run that failed may leave, for the next one to go on with or to replace.
    """

    main: Callable[[list[str]], int]
    options: str
    result: tuple[str, ...]
    stays: tuple[str, ...] = ()


TRAIN = (
    "--model INPUTS/model --items INPUTS/items.parquet --train_pairs INPUTS/pairs.jsonl --eval_pairs INPUTS/pairs.jsonl "
    "--output_dir PLACE/run --use_cpu --dtype float32 --max_steps 3 --per_device_train_batch_size 2 --report_to none "
    "--save_strategy steps --save_steps 1 --save_total_limit 2 --resume_from_checkpoint true --logging_steps 1"
)
JOBS = {
    "train": Job(
        training.run.main,
        TRAIN,
        ("run/model/*", "run/rejects.jsonl"),
        ("run/rejects.jsonl", "run/checkpoint-*"),
    ),
    "align": Job(
        training.align.main,
        "--model INPUTS/model --items INPUTS/items.parquet --output PLACE/model --vision_cache_dir PLACE/vision --steps 3 "
        "--batch_size 2 --caption_weight 0 --dtype float32",
        ("model/*.safetensors", "model/config.json"),
        ("vision/*",),
    ),
    "evaluate": Job(
        training.evaluate.main,
        "--model INPUTS/model --items INPUTS/items.parquet --pairs INPUTS/pairs.jsonl --output PLACE/evaluation "
        "--dtype float32",
        ("evaluation/plots/recall.png", "evaluation/rejects.jsonl"),
        ("evaluation/rejects.jsonl", "evaluation/plots/*.png", "evaluation/evaluation.md"),
    ),
    "report": Job(training.report.main, "--run PLACE/run", ("run/report.html",), ("run/metrics.json", "run/plots/*")),
    "mine": Job(
        training.mine.main,
        "--interactions INPUTS/log.csv --output PLACE/train.parquet --test_output PLACE/test.parquet --split_time 1000",
        ("train.parquet", "test.parquet", "train.rejects.jsonl"),
    ),
    "hard_negatives": Job(
        training.hard_negatives.main,
        "--model INPUTS/model --items INPUTS/items.parquet --pairs INPUTS/pairs.jsonl --output PLACE/hard.parquet "
        "--dtype float32",
        ("hard.parquet",),
    ),
    "assemble": Job(
        hub.assemble.main,
        "--text INPUTS/text --vision INPUTS/vision --output PLACE/model --qformer_layers 1 --qformer_hidden_size 32 "
        "--qformer_heads 2 --no_check",
        ("model/*.safetensors", "model/config.json"),
    ),
    "convert": Job(
        hub.convert_official.main,
        f"--weights {RESEARCH}/weights.safetensors --config {RESEARCH}/config.json --output PLACE/model",
        ("model/*",),
    ),
    "encode": Job(
        hub.encode.main,
        "--model INPUTS/model --items INPUTS/items.parquet --output PLACE/vectors --batch_size 4 --rows_per_block 4 "
        "--rows_per_shard 4 --num_workers 0 --dtype float32",
        ("vectors/*",),
        ("vectors/shard-*.parquet", "vectors/manifest.json"),
    ),
    "index": Job(
        hub.index.main,
        "--embeddings INPUTS/vectors --items INPUTS/items.parquet --output PLACE/index",
        ("index/*",),
    ),
    "export": Job(
        hub.index.main,
        "export --format qdrant --embeddings INPUTS/vectors --output PLACE/export",
        ("export/*",),
    ),
    "semantic_ids": Job(
        hub.semantic_ids.main,
        "--embeddings INPUTS/vectors --output PLACE/codes --levels 2 --codes 4",
        ("codes/*",),
    ),
    "gallery": Job(
        hub.gallery.main,
        "--model INPUTS/model --items INPUTS/items.parquet --output PLACE/page.html --dtype float32",
        ("page.html", "page.rejects.jsonl"),
    ),
    "card": Job(hub.card.main, "--model PLACE/model", ("model/README.md",), ("model/*",)),
    "publish_model": Job(hub.publish.main, "--model INPUTS/model --repo a/b --dry_run", ()),
    "publish_data": Job(
        hub.publish.main,
        "--dataset --items INPUTS/items.parquet --pairs INPUTS/pairs.jsonl --repo a/b --dry_run "
        "--rejects PLACE/rejects.jsonl",
        ("rejects.jsonl",),
        ("rejects.jsonl",),
    ),
}


def write_inputs(folder: Path, model: Path) -> None:
    """What the jobs read: backbones, a model, 24 items of which one is broken, pairs, a log, vectors, metrics."""
    (folder / "model").symlink_to(model)
    vision, text = make_backbones()
    for name, parts in {"vision": (vision, make_image_processor()), "text": (text, make_tokenizer())}.items():
        for part in parts:
            part.save_pretrained(folder / name)
    items = make_items(24)
    items[10]["image"] = b"broken"
    write_items(items, folder / "items.parquet")
    pairs = [(f"n{first}", f"n{first + 2}") for first in range(22)]
    lines = (json.dumps({"query_id": query, "target_id": target}) + "\n" for query, target in pairs)
    (folder / "pairs.jsonl").write_text("".join(lines))
    log = [f"u{user},i{(user * item) % 7},{200 * item}\n" for user in range(9) for item in range(1, 11)]
    (folder / "log.csv").write_text("user_id,item_id,timestamp\n" + "".join(log) + "u,,1\n")
    JOBS["encode"].main(options_of("encode", folder, folder))
    JOBS["train"].main(options_of("train", folder, folder / "trained"))


def prepare(name: str, inputs: Path, place: Path) -> None:
    """Put into `place` what a job finds there: the run that is reported, the model that gets a card."""
    if name == "report":
        (place / "run").mkdir(parents=True)
        shutil.copy(inputs / "trained" / "run" / "metrics.json", place / "run")
    if name == "card":
        (place / "model").mkdir(parents=True)
        for file in (inputs / "model").iterdir():
            (place / "model" / file.name).symlink_to(file)


def options_of(name: str, inputs: Path, place: Path) -> list[str]:
    """A job's options for the command line."""
    return JOBS[name].options.replace("INPUTS", str(inputs)).replace("PLACE", str(place)).split()


def result_of(name: str, place: Path) -> dict[str, bytes]:
    """The files of a job's result, by path below `place`."""
    return {path: (place / path).read_bytes() for path in files_of(place) if _matches(path, JOBS[name].result)}


def strangers_of(name: str, place: Path) -> list[str]:
    """Files below `place` that a failed job should not have left."""
    return [path for path in files_of(place) if not _matches(path, JOBS[name].stays)]


def files_of(place: Path) -> list[str]:
    """Paths of all files below a folder."""
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir())


def run_job(
    processes, name: str, inputs: Path, place: Path, arrange: Callable[[], object] | None = None, more: str = ""
) -> tuple[int | None, list[str]]:
    """Exit code and lines on stderr of a job.

    Args:
        processes: the fixture.
        arrange: called in the job's process before it begins.
        more: options that count in place of the job's own.
    """
    child, errors = start_job(processes, name, inputs, place, arrange, more)
    lines = read_lines(errors)
    child.join()
    return child.exitcode, lines


def start_job(
    processes, name: str, inputs: Path, place: Path, arrange: Callable[[], object] | None = None, more: str = ""
):
    """A job's process, started, and the end of the pipe that gives its stderr."""
    reader, writer = processes.Pipe(duplex=False)
    child = processes.Process(target=_run, args=(name, inputs, place, writer, arrange, more))
    child.start()
    writer.close()
    return child, reader


def read_lines(errors: Connection) -> list[str]:
    """All lines that a job's processes write on stderr, until the last of them ends."""
    with os.fdopen(os.dup(errors.fileno()), encoding="utf-8", newline="") as stream:
        return stream.read().replace("\r", "\n").splitlines()


def _run(
    name: str, inputs: Path, place: Path, errors: Connection, arrange: Callable[[], object] | None, more: str
) -> None:
    os.dup2(errors.fileno(), 2)
    errors.close()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a shell has started
    tempfile.tempdir = str(place) if place.is_dir() else None
    if arrange is not None:
        arrange()
    sys.exit(JOBS[name].main([*options_of(name, inputs, place), *more.split()]))


def workers_of(process: int) -> list[int]:
    """Ids of the processes that a process has forked and that are there; programs that it has started are none."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if _command_of(child) == _command_of(process)]


def _command_of(process: int | str) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:  # it has just ended
        return ""


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)
