"""From tables and models to an evaluation's folder: what `training/evaluate.py` does, with its options."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modeling_notellm2 import choose_precision
from training.batches.collators import drop_repeated_lines
from training.evaluation.embedders import Loading, open_embedder
from training.evaluation.evidence import evaluate_model, write_results
from training.evaluation.measuring import MeasureOptions
from training.evaluation.slices import count_in_pairs
from training.reporting.evaluation_plots import EVALUATION
from training.reporting.evaluation_tables import show
from training.tables.commands.bounds import AtLeastOne, Processes, check_bounds
from training.tables.commands.hashes import weights_of
from training.tables.commands.options import (
    allow_remote_option,
    device_option,
    dtype_option,
    encoding_option,
    split_option,
)
from training.tables.commands.outputs import Output, claimed
from training.tables.pairs import load_evaluation, pair_positions, trained_share
from training.tables.rejects import write_rejects


WRITTEN = ("rejects.jsonl", *EVALUATION)


@dataclass
class EvaluateArguments:
    """Which model is measured on which tables."""

    items: str = field(metadata={"help": "Item table."})
    pairs: str = field(metadata={"help": "Pair table to measure on."})
    output: str = field(metadata={"help": "Folder for evaluation.json, evaluation.md, plots and rejects.jsonl."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a NoteLLM-2 model, a Sentence Transformers model, or a dual encoder such as CLIP."
        },
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Models of any of these kinds, measured on the same queries; without --model, the first counts."
        },
    )
    prompt_name: str | None = field(
        default=None,
        metadata={"help": "Prompt of models of others, e.g. query; none: each one's default, if it has one."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with models of others; NoteLLM-2's always runs."}
    )
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    allow_remote: str | None = allow_remote_option()
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
    num_workers: Processes = field(default=0, metadata={"help": "Processes that open images."})
    device: str = device_option()
    dtype: str = dtype_option()

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.models:
            raise ValueError("pass --model, --compare, or both")

    @property
    def models(self) -> list[str]:
        """All to measure, the one that counts first."""
        return [*([self.model] if self.model else []), *self.compare]


def run(arguments: EvaluateArguments, options: MeasureOptions) -> dict[str, Any]:
    """The whole job; returns what evaluation.json holds."""
    inputs = (*arguments.models, arguments.items, arguments.pairs, arguments.train_pairs)
    with claimed([Output("--output", Path(arguments.output), WRITTEN)], inputs):
        return evaluate(arguments, options)


def evaluate(arguments: EvaluateArguments, options: MeasureOptions) -> dict[str, Any]:
    """What `run` does, with the outputs' places held."""
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
    share = popularity = None
    if arguments.train_pairs:
        share = trained_share(table.pairs, pair_positions(arguments.train_pairs, items, arguments.encoding))
        popularity = count_in_pairs(arguments.train_pairs, items, arguments.encoding)
    labels = items.column(arguments.label_column) if arguments.label_column else None
    write_rejects(rejects, output / "rejects.jsonl")

    precision = choose_precision(arguments.dtype, arguments.device)
    print(f"Precision: {precision}")
    how = Loading(
        arguments.device,
        precision.dtype,
        arguments.batch_size,
        arguments.num_workers,
        arguments.prompt_name,
        arguments.trust_remote_code,
        output / "rejects.jsonl",
    )
    first, *others = arguments.models
    figures = evaluate_model(
        open_embedder(first, how),
        items,
        table.pairs,
        options,
        others=(open_embedder(name, how) for name in others),
        labels=labels,
        popularity=popularity,
    )
    rejected_rows = drop_repeated_lines(output / "rejects.jsonl")
    report = {
        "model": first,
        "weights": weights_of(Path(first)),
        "compared_with": others,
        "precision": asdict(precision),
        "settings": {**asdict(arguments), **asdict(options)},
        "counts": {"items": len(items), "pairs": len(table.pairs), "rejected_rows": rejected_rows},
        "trained_share": share,
        **figures,
    }
    write_results(report, output)
    show(report, output)
    return report
