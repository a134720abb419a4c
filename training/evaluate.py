"""Measure a model on pairs: `python training/evaluate.py --model PATH --items ITEMS --pairs PAIRS --output DIR`.

Writes DIR/evaluation.json, DIR/evaluation.md (the same as tables), DIR/plots/*.png and DIR/rejects.jsonl (rows that were
left out, with the reason). `training.evaluation.evidence` has its schema, and `evaluate_model` for Python callers.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor

from modeling_notellm2 import choose_precision
from training.evaluation.evidence import MeasureOptions, evaluate_model, write_results
from training.evaluation.slices import count_in_pairs
from training.reporting.evaluation_plots import EVALUATION
from training.reporting.evaluation_tables import show
from training.tables.commands.bounds import AtLeastOne, NotNegative, check_bounds
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS, command, parse
from training.tables.commands.hashes import weights_of
from training.tables.commands.model_folder import loading
from training.tables.commands.options import device_option, dtype_option, encoding_option, split_option
from training.tables.commands.outputs import Output, claimed
from training.tables.items import load_items
from training.tables.pairs import load_pairs, pair_positions, trained_share
from training.tables.rejects import TableError, write_rejects


WRITTEN = ("rejects.jsonl", *EVALUATION)


@dataclass
class EvaluateArguments:
    """Which model is measured on which tables."""

    model: str = field(metadata={"help": "Folder or Hub id of a NoteLLM-2 model with its processor."})
    items: str = field(metadata={"help": "Item table."})
    pairs: str = field(metadata={"help": "Pair table to measure on."})
    output: str = field(metadata={"help": "Folder for evaluation.json, evaluation.md, plots and rejects.jsonl."})
    compare: str | None = field(default=None, metadata={"help": "Another model, measured on the same queries."})
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    eval_split: str | None = field(
        default=None, metadata={"help": "Measure on items whose column `split` says this; none: on all."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the items with a category, for precision@10 and slices."}
    )
    train_pairs: str | None = field(
        default=None, metadata={"help": "Pair table of the training, for slices by popularity and of unseen items."}
    )
    batch_size: AtLeastOne = field(default=32, metadata={"help": "Items embedded at once."})
    num_workers: NotNegative = field(default=0, metadata={"help": "Processes that open images."})
    device: str = device_option()
    dtype: str = dtype_option()

    def __post_init__(self) -> None:
        check_bounds(self)


def run(arguments: EvaluateArguments, options: MeasureOptions) -> dict[str, Any]:
    """The whole job; returns what evaluation.json holds."""
    inputs = (arguments.model, arguments.compare, arguments.items, arguments.pairs, arguments.train_pairs)
    with claimed([Output("--output", Path(arguments.output), WRITTEN)], inputs):
        return evaluate(arguments, options)


def evaluate(arguments: EvaluateArguments, options: MeasureOptions) -> dict[str, Any]:
    """What `run` does, with the outputs' places held."""
    output = Path(arguments.output)
    items, rejects = load_items(
        arguments.items, arguments.split, num_workers=arguments.num_workers, encoding=arguments.encoding
    )
    if arguments.eval_split is not None:
        items = items.select(items.where("split", arguments.eval_split))
        if not len(items):
            raise TableError(f"{arguments.items}: no item whose column 'split' says '{arguments.eval_split}'.")
    table, rejected = load_pairs(arguments.pairs, items, encoding=arguments.encoding)
    rejects += rejected
    share = popularity = None
    if arguments.train_pairs:
        share = trained_share(table.pairs, pair_positions(arguments.train_pairs, items, arguments.encoding))
        popularity = count_in_pairs(arguments.train_pairs, items, arguments.encoding)
    labels = items.column(arguments.label_column) if arguments.label_column else None
    write_rejects(rejects, output / "rejects.jsonl")

    precision = choose_precision(arguments.dtype, arguments.device)
    print(f"Precision: {precision}")
    figures = evaluate_model(
        *_load(arguments.model, arguments.device, precision.dtype),
        items,
        table.pairs,
        options,
        other=_load(arguments.compare, arguments.device, precision.dtype) if arguments.compare else None,
        labels=labels,
        popularity=popularity,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        rejects=output / "rejects.jsonl",
    )
    with (output / "rejects.jsonl").open(encoding="utf-8") as lines:
        counts = {"items": len(items), "pairs": len(table.pairs), "rejected_rows": sum(1 for _ in lines)}
    report = {
        "model": arguments.model,
        "weights": weights_of(Path(arguments.model)),
        "compared_with": arguments.compare,
        "precision": asdict(precision),
        "settings": {**asdict(arguments), **asdict(options)},
        "counts": counts,
        "trained_share": share,
        **figures,
    }
    write_results(report, output)
    show(report, output)
    return report


def _load(name: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model, in eval mode, and processor."""
    with loading(name):
        model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype=dtype).to(device).eval()
        return model, AutoProcessor.from_pretrained(name, trust_remote_code=True)


@command("training/evaluate.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    arguments, measured = parse(EvaluateArguments, MeasureOptions, options=options)
    report = run(arguments, measured)
    return DONE_WITH_REJECTS if report["counts"]["rejected_rows"] else DONE


if __name__ == "__main__":
    sys.exit(main())
