"""Models measured on a catalogue by mteb: what `hub/mteb_task.py` does, and the content of its scores.json.

Importing it needs no mteb.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from hub.benchmark.folder import CATEGORIES, SPLIT, write_task
from modeling_notellm2 import choose_precision
from training.tables.commands.bounds import AtLeastOne, Processes, check_bounds
from training.tables.commands.files import remove_files, write_json, write_text
from training.tables.commands.handler import FileError
from training.tables.commands.hashes import weights_of
from training.tables.commands.options import (
    allow_remote_option,
    device_option,
    dtype_option,
    encoding_option,
    split_option,
)
from training.tables.commands.outputs import GENERATOR, MARK
from training.tables.items import ItemTable
from training.tables.pairs import load_evaluation
from training.tables.rejects import Reject, write_rejects


TASK = "task"
SCORES, SHOWN_SCORES, REJECTS = "scores.json", "scores.md", "rejects.jsonl"
SHOWN = ("ndcg_at_10", "recall_at_1", "recall_at_10", "recall_at_100", "mrr_at_10")
"""Of mteb's scores; recall is the multi-positive one of training/evaluate.py."""


@dataclass
class TaskArguments:
    """Which catalogue becomes a task, and which models are measured on it."""

    items: str = field(metadata={"help": "Item table."})
    pairs: str = field(metadata={"help": "Pair table: what is relevant to what."})
    output: str = field(metadata={"help": "Folder for the task and the scores."})
    model: list[str] = field(
        metadata={"help": "Folders of NoteLLM-2 and Sentence Transformers models, and ids that mteb or the Hub knows."}
    )
    category: str = field(
        default="it2it",
        metadata={
            "help": "What queries and items are shown as: t text, i picture, it both.",
            "choices": list(CATEGORIES),
        },
    )
    name: str = field(default="Catalogue", metadata={"help": "Of the task, in mteb's results."})
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    allow_remote: str | None = allow_remote_option()
    eval_split: str | None = field(
        default=None, metadata={"help": "Take the items whose column `split` says this; none: all."}
    )
    batch_size: AtLeastOne = field(default=32, metadata={"help": "Items embedded at once."})
    num_workers: Processes = field(default=0, metadata={"help": "Processes that open images to check them."})
    device: str = device_option()
    dtype: str = dtype_option()
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with models of others; NoteLLM-2's always runs."}
    )

    def __post_init__(self) -> None:
        check_bounds(self)


def measure(arguments: TaskArguments) -> dict[str, Any]:
    """The whole job; returns what scores.json holds.

    Raises:
        FileError: without mteb, and for a model that can't be loaded.
        TableError: for tables without what the task shows.
    """
    try:
        import mteb
    except ImportError as error:
        raise FileError("mteb is not installed: pip install -e . --group mteb") from error

    from hub.benchmark.models import open_model
    from hub.benchmark.task import MAIN_SCORE, catalogue_task

    output = Path(arguments.output)
    items, table, rejects = load_evaluation(
        arguments.items,
        arguments.pairs,
        arguments.split,
        arguments.eval_split,
        arguments.encoding,
        arguments.num_workers,
        arguments.allow_remote,
    )
    remove_files(output, (SCORES, SHOWN_SCORES))
    written = write_task(items, table.pairs, output / TASK, arguments.category)
    lacking = [_lacking(items, position, arguments) for position in written.lacking]
    write_rejects(chain(rejects, lacking), output / REJECTS)
    task = catalogue_task(output / TASK, arguments.category, arguments.name)
    precision = choose_precision(arguments.dtype, arguments.device)
    print(f"Precision: {precision}")
    report: dict[str, Any] = {
        **GENERATOR,
        "task": {"name": arguments.name, "category": arguments.category, "main_score": MAIN_SCORE},
        "counts": {"corpus": written.corpus, "queries": written.queries, "relevant": written.relevant},
        "rejected_rows": len(rejects) + len(lacking),
        "settings": asdict(arguments),
        "precision": asdict(precision),
        "mteb": mteb.__version__,
        "models": [],
    }
    for source in arguments.model:
        model = open_model(source, arguments.device, precision.dtype, arguments.trust_remote_code)
        result = mteb.evaluate(
            model, task, cache=None, co2_tracker=False, encode_kwargs={"batch_size": arguments.batch_size}
        )
        report["models"].append(_measured(source, model.mteb_model_meta, result.task_results[0]))
    write_json(report, output / SCORES)
    write_text(_markdown(report), output / SHOWN_SCORES)
    return report


def _lacking(items: ItemTable, position: int, arguments: TaskArguments) -> Reject:
    file, row = items.place(position)
    reason = f"lacks what a task of {arguments.category} shows"
    return Reject(arguments.items, row, [items.item_ids[position]], reason, file)


def _measured(source: str, meta: Any, result: Any) -> dict[str, Any]:
    return {
        "model": source,
        "name": meta.name,
        "revision": meta.revision,
        "weights": weights_of(Path(source)),
        "modalities": meta.modalities,
        "main_score": result.scores[SPLIT][0]["main_score"],
        "result": json.loads(result.model_dump_json()),
    }


def score_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """Model and main scores, a row for each."""
    for model in report["models"]:
        scores = model["result"]["scores"][SPLIT][0]
        yield [model["name"], ", ".join(model["modalities"]), *(f"{scores[name]:.3f}" for name in SHOWN)]


def _markdown(report: dict[str, Any]) -> str:
    counts, rows = report["counts"], [["model", "reads", *SHOWN], ["---"] * (2 + len(SHOWN)), *score_rows(report)]
    lines = [
        f"<!-- {MARK} -->",
        f"# {report['task']['name']}, a {report['task']['category']} retrieval task",
        "",
        f"{counts['queries']} queries, {counts['corpus']} items, {counts['relevant']} relevant pairs; mteb {report['mteb']}.",
        "",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
