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
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoProcessor, set_seed

from training.evaluation.embed import evaluate_in_training
from training.evaluation.run_figures import Clock, RunFigures
from training.reporting.evaluation_plots import EVALUATION
from training.reporting.page import write_report
from training.reporting.run_plots import RUN_PLOTS
from training.reporting.summary import show
from training.tables.commands.files import atomic_write, remove_files, write_json
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS, command
from training.tables.commands.hashes import weights_of
from training.tables.commands.model_folder import loading
from training.tables.commands.outputs import GENERATOR, Output, claimed
from training.tables.rejects import write_rejects
from training.tables.validate import validate
from training.trainer.adapters import load_trainable, save_merged, unwrap_adapter
from training.trainer.arguments import DataArguments, ModelArguments, NoteLLM2TrainingArguments, parse
from training.trainer.batches import (
    ItemCollator,
    PairCollator,
    PairDataset,
    cache_vision_features,
    drop_repeated_lines,
)
from training.trainer.checkpoints import checkpoint_to_resume
from training.trainer.data import RunData, load_data
from training.trainer.distributed import agreed, once_per_machine
from training.trainer.false_negatives import FalseNegatives
from training.trainer.sampling import item_lengths
from training.trainer.stopping import stoppable
from training.trainer.trainer import NoteLLM2Trainer
from training.trainer.vision_cache import VisionCache


OF_ONE_MODEL = ("metrics.json", "report.html", *EVALUATION, *RUN_PLOTS)
"""Files of a run's folder that say something false as soon as another model stands there."""
WRITTEN = ("model", "rejects.jsonl", *OF_ONE_MODEL)


def save_model(trainer: NoteLLM2Trainer, folder: Path, merge: bool) -> None:
    """Write model or adapter, processor and code, in place of an older one with what was said of it.

    All processes call it.
    """
    first = trainer.is_world_process_zero()
    with ExitStack() as stack:
        place = broadcast_object_list([stack.enter_context(atomic_write(folder)) if first else None])[0]
        saved = place.with_name("adapter") if merge else place
        trainer.save_model(str(saved))  # gathers weights that are spread over processes; saves the processor too
        if merge and first:
            save_merged(saved, place, unwrap_adapter(trainer.model).dtype)
            trainer.processing_class.save_pretrained(place)
        if first:
            (place / "training_args.bin").unlink(missing_ok=True)  # a pickle with this machine's paths
            remove_files(folder.parent, OF_ONE_MODEL)  # first: a kill now leaves none that speaks of another model


def make_trainer(
    model: Any,
    processor: Any,
    data: RunData,
    features: VisionCache | None,
    options: DataArguments,
    arguments: NoteLLM2TrainingArguments,
) -> NoteLLM2Trainer:
    """The trainer with its batches, masks and evaluation."""
    output = Path(arguments.output_dir)
    collate = ItemCollator(processor, features, unwrap_adapter(model).dtype, output / "rejects.jsonl")
    masks = (options.mask_known_positives, options.mask_same_image, options.mask_same_text)
    workers = arguments.dataloader_num_workers
    image_tokens = processor.num_query_tokens if processor.early_fusion else 0
    grouped = arguments.train_sampling_strategy == "group_by_length"
    return NoteLLM2Trainer(
        train_dataset=PairDataset(data.items, data.train),
        false_negatives=once_per_machine(
            lambda: FalseNegatives.of(data.items, data.train, *masks, num_workers=workers)
        ),
        lengths=item_lengths(data.items, processor.limits, image_tokens) if grouped else None,
        measure=partial(
            evaluate_in_training,
            collate=collate,
            items=data.eval_items,
            pairs=data.eval_pairs,
            labels=data.labels,
            batch_size=arguments.per_device_eval_batch_size,
            num_workers=workers,
        )
        if len(data.eval_pairs)
        else None,
        model=model,
        args=arguments,
        data_collator=PairCollator(collate, options.image_dropout, options.text_dropout, arguments.seed),
        eval_dataset=data.eval_items,
        processing_class=processor,
    )


def vision_features(
    model: Any, processor: Any, data: RunData, tables: DataArguments, arguments: NoteLLM2TrainingArguments
) -> VisionCache | None:
    """What the frozen vision encoder makes of all pictures; None where it is to be computed in each step."""
    if not tables.cache_vision_features:
        return None
    root = Path(tables.vision_cache_dir) if tables.vision_cache_dir else None
    return once_per_machine(
        lambda: cache_vision_features(
            unwrap_adapter(model),
            processor,
            data.items,
            root,
            tables.vision_cache_gb,
            num_workers=arguments.dataloader_num_workers,
            dtype=arguments.precision.dtype,
        )
    )


def counts(trainer: NoteLLM2Trainer, data: RunData) -> dict[str, int | None]:
    """How much of everything there was; the first process alone counts the rejects."""
    rejects = Path(trainer.args.output_dir) / "rejects.jsonl"
    rejected = drop_repeated_lines(rejects) if trainer.is_world_process_zero() else None
    parameters = list(trainer.model.parameters())
    return {
        "items": len(data.items),
        "eval_items": len(data.eval_items),
        "train_pairs": len(data.train),
        "eval_pairs": len(data.eval_pairs),
        "rejected_rows": rejected,
        "steps": trainer.state.global_step,
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "all_parameters": sum(p.numel() for p in parameters),
    }


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
    model: nn.Module = load_trainable(options, arguments.precision.dtype)
    model.to(arguments.device)
    with loading(options.model):
        processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    clock.lap("load")
    features = vision_features(model, processor, data, tables, arguments)
    trainer = make_trainer(model, processor, data, features, tables, arguments)
    clock.lap("vision_features")

    figures = RunFigures(trainer, data, tables, clock)
    report: dict[str, Any] = {
        **GENERATOR,
        "precision": asdict(arguments.precision),
        **figures.before_training(features),
    }
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
    )


@command("training/run.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    model, tables, arguments = parse(sys.argv[1:] if options is None else options)
    if tables.validate_only:
        with held(model, tables, arguments, ("rejects.jsonl",)):
            check_tables(tables, arguments)
        return DONE
    report = run(model, tables, arguments)
    # A launcher of several processes takes any code but 0 for a failure.
    with_rejects = report["counts"]["rejected_rows"] and arguments.world_size == 1
    return DONE_WITH_REJECTS if with_rejects else DONE


if __name__ == "__main__":
    sys.exit(main())
