"""Train NoteLLM-2 and measure it before and after: `python training/run.py CONFIG.yaml [--key value ...]`.

Writes into `output_dir`: `model/` (weights or adapter, processor and code, for AutoModel), `metrics.json`,
`rejects.jsonl` (rows that were left out, with the reason), `logs/` (TensorBoard) and `checkpoint-N/` on the way. With
`report`, on one process, also `report.html`, `evaluation.json` and `plots/`.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import AutoProcessor, set_seed

from training.batches.data import load_data
from training.evaluation.run_figures import Clock, RunFigures, counts
from training.reporting.page import write_report
from training.reporting.summary import show
from training.tables.commands.files import remove_files, write_json
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS, command
from training.tables.commands.hashes import weights_of
from training.tables.commands.model_folder import loading
from training.tables.commands.outputs import GENERATOR, Output, claimed
from training.tables.rejects import write_rejects
from training.tables.validate import validate
from training.trainer.adapters import load_trainable
from training.trainer.aligning import RECORD, alignment_of, first_phase
from training.trainer.arguments import DataArguments, ModelArguments, NoteLLM2TrainingArguments, parse
from training.trainer.checkpoints import checkpoint_to_resume
from training.trainer.distributed import agreed, join_restarted, once_per_machine, share_with_deepspeed
from training.trainer.head_first import head_first
from training.trainer.preparation import make_trainer, vision_features
from training.trainer.saving import OF_ONE_MODEL, save_model
from training.trainer.stopping import stoppable


WRITTEN = ("model", "rejects.jsonl", RECORD, *OF_ONE_MODEL)


def run(options: ModelArguments, tables: DataArguments, arguments: NoteLLM2TrainingArguments) -> dict[str, Any]:
    """Train a model and measure it before and after; returns what metrics.json holds."""
    with held(options, tables, arguments, WRITTEN):
        return train(options, tables, arguments)


def held(
    options: ModelArguments, tables: DataArguments, arguments: NoteLLM2TrainingArguments, parts: tuple[str, ...]
) -> AbstractContextManager[None]:
    """Check and hold what is written of the output folder; the first process does so for all of them."""
    if arguments.process_index:
        return nullcontext()
    inputs = (options.model, tables.items, tables.train_pairs, tables.eval_pairs)
    return claimed([Output("--output_dir", Path(arguments.output_dir), parts)], inputs)


def train(options: ModelArguments, tables: DataArguments, arguments: NoteLLM2TrainingArguments) -> dict[str, Any]:
    """What `run` does, with the output folder held."""
    output, clock = Path(arguments.output_dir), Clock()
    resume = agreed(once_per_machine(lambda: checkpoint_to_resume(arguments.resume_from_checkpoint, output)))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")  # the switch that Trainer's callback knows
    set_seed(arguments.seed)
    data = once_per_machine(lambda: load_data(tables, arguments.dataloader_num_workers))
    if arguments.process_index == 0:
        print(f"Precision: {arguments.precision}")
        write_rejects(data.rejects, output / "rejects.jsonl")
        if not resume:
            remove_files(output, [RECORD])
    if arguments.deepspeed:
        share_with_deepspeed()
    model: nn.Module = load_trainable(options, arguments.precision.dtype)
    model.to(arguments.device)
    with loading(options.model):
        processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    clock.lap("load")
    features = vision_features(model, processor, data, tables, arguments)
    clock.lap("vision_features")
    aligned = {}
    if resume:  # a checkpoint's connector has the phase behind it
        aligned = alignment_of(output)
    elif options.align_steps:
        aligned = first_phase(model, processor, data, features, options, arguments)
        clock.lap("align")
    trainer = make_trainer(model, processor, data, features, tables, arguments)
    clock.lap("prepare")

    figures = RunFigures(trainer, data, tables, clock)
    report: dict[str, Any] = {
        **GENERATOR,
        "precision": asdict(arguments.precision),
        "alignment": aligned,
        **figures.before_training(features),
    }
    if options.head_steps and not resume:
        report["head_first"] = head_first(trainer, options.head_steps)
        clock.lap("head_first")
    with stoppable(trainer):
        trained = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    clock.lap("train")
    trainer.leave_autocast()
    report |= {**figures.after_training(), "counts": counts(trainer, data), "trained_share": data.trained_share}
    save_model(trainer, output / "model", options.merge_adapter)  # before what is only for the report, which may fail
    report["weights"] = weights_of(output / "model") if trainer.is_world_process_zero() else None
    report |= figures.for_report(report["weights"])

    report["train_loss"] = trained.metrics["train_loss"]
    report["log"] = trainer.state.log_history
    report["settings"] = {**vars(options), **vars(tables), **json.loads(arguments.to_json_string())}
    report["seconds"] = clock.seconds
    if trainer.is_world_process_zero():
        write_json(report, output / "metrics.json")
        if tables.report and arguments.world_size == 1:
            write_report(output, data.eval_items)
        show(report, output)
    return report


def check_tables(tables: DataArguments, arguments: NoteLLM2TrainingArguments) -> None:
    """What --validate_only does."""
    output, workers = Path(arguments.output_dir), arguments.dataloader_num_workers
    validate(
        tables.items,
        tables.train_pairs,
        tables.eval_pairs,
        output,
        tables.eval_split,
        workers,
        split=tables.split,
        encoding=tables.encoding,
        allow_remote=tables.allow_remote,
    )


@command("training/run.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    join_restarted()
    model, tables, arguments = parse(sys.argv[1:] if options is None else options)
    if tables.validate_only:
        with held(model, tables, arguments, ("rejects.jsonl",)):
            check_tables(tables, arguments)
        return DONE
    report = run(model, tables, arguments)
    PartialState().destroy_process_group()  # threads that still exchange may abort a process at its exit
    # A launcher of several processes takes any code but 0 for a failure.
    with_rejects = report["counts"]["rejected_rows"] and arguments.world_size == 1
    return DONE_WITH_REJECTS if with_rejects else DONE


if __name__ == "__main__":
    sys.exit(main())
