"""Train NoteLLM-2 and measure it before and after: `python training/run.py CONFIG.yaml [--key value ...]`.

Writes into `output_dir`: `model/` (weights or adapter, processor and code, for AutoModel), `metrics.json`,
`rejects.jsonl` (rows that were left out, with the reason), `logs/` (TensorBoard) and `checkpoint-N/` on the way. With
`report`, on one process, also `report.html`, `evaluation.json` and `plots/`.
"""

import training.tables.own_folder  # noqa: F401  # isort: skip

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import AutoProcessor, set_seed

from training.evaluation.embed import evaluate_in_training, measure, measure_views, random_expectation, views
from training.evaluation.evidence import evaluate_whole, explain
from training.evaluation.overlap import trained_share
from training.report import write_report
from training.reporting.summary import show
from training.tables.commands import DONE, DONE_WITH_REJECTS, command
from training.tables.files import atomic_write, write_json
from training.tables.items import ItemTable, PairTable, load_items, load_pairs
from training.tables.model_folder import loading
from training.tables.reading import Rejects, write_rejects
from training.tables.validate import validate
from training.trainer.adapters import base_of, load_trainable, save_merged
from training.trainer.arguments import DataArguments, ModelArguments, NoteLLM2TrainingArguments, parse
from training.trainer.batches import (
    ItemCollator,
    PairCollator,
    PairDataset,
    cache_vision_features,
    drop_repeated_lines,
)
from training.trainer.checkpoints import checkpoint_to_resume
from training.trainer.distributed import agreed, once_per_machine
from training.trainer.false_negatives import FalseNegatives
from training.trainer.sampling import item_lengths
from training.trainer.stopping import stoppable
from training.trainer.trainer import NoteLLM2Trainer
from training.trainer.vision_cache import VisionCache


OF_ONE_MODEL = ("evaluation.json", "evaluation.md", "report.html")
"""Files of a run's folder that say something false as soon as another model stands there."""


@dataclass(frozen=True)
class RunData:
    """The tables of a run: all items, those to evaluate on, and the pairs of both, with every rejected row."""

    items: ItemTable
    train: PairTable
    eval_items: ItemTable
    eval_positions: np.ndarray
    eval_pairs: list[tuple[str, str]]
    labels: list[Any] | None
    rejects: Rejects
    trained_share: float = 0.0
    """Of the pairs to evaluate on: how many are train pairs."""


def load_data(arguments: DataArguments, num_workers: int) -> RunData:
    """Read and check the tables that the arguments name."""
    items, rejects = load_items(
        arguments.items, arguments.split, arguments.check_images, num_workers, arguments.encoding
    )
    train, rejected = load_pairs(
        arguments.train_pairs, items, distinct_column=arguments.distinct_column, encoding=arguments.encoding
    )
    rejects += rejected
    positions = np.arange(len(items))
    if arguments.eval_split is not None:
        positions = items.where("split", arguments.eval_split)
    eval_items = items.select(positions)
    pairs: list[tuple[str, str]] = []
    share = 0.0
    if arguments.eval_pairs is not None:
        table, rejected = load_pairs(arguments.eval_pairs, eval_items, encoding=arguments.encoding)
        rejects += rejected
        share = trained_share(positions[table.pairs], train.pairs)
        pairs = [(eval_items.item_ids[query], eval_items.item_ids[target]) for query, target in table.pairs.tolist()]
    labels = eval_items.column(arguments.label_column) if arguments.label_column else None
    return RunData(items, train, eval_items, positions, pairs, labels, rejects, share)


def save_model(trainer: NoteLLM2Trainer, folder: Path, merge: bool) -> None:
    """Write model or adapter, processor and code, in place of an older one. All processes call it."""
    with ExitStack() as stack:
        first = trainer.is_world_process_zero()
        place = broadcast_object_list([stack.enter_context(atomic_write(folder)) if first else None])[0]
        saved = place.with_name("adapter") if merge else place
        trainer.save_model(str(saved))  # gathers weights that are spread over processes; saves the processor too
        if merge and first:
            save_merged(saved, place, base_of(trainer.model).dtype)
            trainer.processing_class.save_pretrained(place)
        if first:
            (place / "training_args.bin").unlink(missing_ok=True)  # a pickle with this machine's paths


def measure_baselines(data: RunData, features: VisionCache | None, seed: int) -> dict[str, float]:
    """Metrics of embeddings that need no LLM, under the same protocol as the model."""
    from training.evaluation.baselines import baseline_embeddings  # scikit-learn: only needed here

    if features is None:
        raise ValueError("report_baselines needs cache_vision_features and items with images.")
    items = list(data.items)
    summary = torch.stack([features.summary(item) for item in items])
    train_pairs = [(items[query]["item_id"], items[target]["item_id"]) for query, target in data.train.pairs.tolist()]
    metrics: dict[str, float] = {}
    everything = list(range(len(data.eval_items)))
    for name, embeddings in baseline_embeddings(items, summary, train_pairs, seed).items():
        chosen = embeddings[data.eval_positions]
        metrics |= measure(name, chosen, everything, data.eval_items, data.eval_pairs, data.labels)
    return metrics


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
    collate = ItemCollator(processor, features, base_of(model).dtype, output / "rejects.jsonl")
    masks = (options.mask_known_positives, options.mask_same_image, options.mask_same_text)
    workers = arguments.dataloader_num_workers
    image_tokens = processor.num_query_tokens if processor.early_fusion else 0
    grouped = arguments.train_sampling_strategy == "group_by_length"
    return NoteLLM2Trainer(
        train_dataset=PairDataset(data.items, data.train),
        negatives=once_per_machine(lambda: FalseNegatives.of(data.items, data.train, *masks, num_workers=workers)),
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
        if data.eval_pairs
        else None,
        model=model,
        args=arguments,
        data_collator=PairCollator(collate, options.image_dropout, options.text_dropout, arguments.seed),
        eval_dataset=data.eval_items,
        processing_class=processor,
    )


def run(options: ModelArguments, tables: DataArguments, arguments: NoteLLM2TrainingArguments) -> dict[str, Any]:
    """The whole job; returns what metrics.json holds."""
    output = Path(arguments.output_dir)
    resume = agreed(checkpoint_to_resume(arguments.resume_from_checkpoint, output))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")  # the switch that Trainer's callback knows
    set_seed(arguments.seed)
    clock = _Clock()
    workers = arguments.dataloader_num_workers
    data = once_per_machine(lambda: load_data(tables, workers))
    if arguments.process_index == 0:
        print(f"Precision: {arguments.precision}")
        write_rejects(data.rejects, output / "rejects.jsonl")
    model = load_trainable(options, arguments.precision.dtype).to(arguments.device)
    with loading(options.model):
        processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    clock.lap("load")

    features = None
    if tables.cache_vision_features:
        root = Path(tables.vision_cache_dir) if tables.vision_cache_dir else None
        features = once_per_machine(
            lambda: cache_vision_features(
                base_of(model),
                processor,
                data.items,
                root,
                tables.vision_cache_gb,
                num_workers=workers,
                dtype=arguments.precision.dtype,
            )
        )
    trainer = make_trainer(model, processor, data, features, tables, arguments)
    clock.lap("vision_features")

    embed_views = partial(
        views,
        model,
        trainer.data_collator.collate_items,
        data.eval_items,
        data.eval_pairs,
        arguments.per_device_eval_batch_size,
        workers,
    )

    report: dict[str, Any] = {
        "precision": asdict(arguments.precision),
        "random": random_expectation(data.eval_items, data.eval_pairs, data.labels) if data.eval_pairs else {},
        "before": measure_views(embed_views(["both"]), data.eval_items, data.eval_pairs, data.labels),
    }
    clock.lap("evaluate_before")
    explained = tables.report and bool(data.eval_pairs) and arguments.world_size == 1
    saliency = {"before training": explain(trainer, data)} if explained else {}
    clock.lap("saliency_before")
    report["baselines"] = measure_baselines(data, features, arguments.seed) if tables.report_baselines else {}
    clock.lap("baselines")
    with stoppable(trainer):
        trained = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    clock.lap("train")
    trainer.leave_autocast()
    embedded = list(embed_views())
    report["after"] = measure_views(embedded, data.eval_items, data.eval_pairs, data.labels)
    clock.lap("evaluate_after")
    report["counts"] = {
        "items": len(data.items),
        "eval_items": len(data.eval_items),
        "train_pairs": len(data.train),
        "eval_pairs": len(data.eval_pairs),
        "rejected_rows": drop_repeated_lines(output / "rejects.jsonl") if trainer.is_world_process_zero() else None,
        "steps": trainer.state.global_step,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "all_parameters": sum(p.numel() for p in model.parameters()),
    }
    report["trained_share"] = data.trained_share
    save_model(trainer, output / "model", options.merge_adapter)  # before what is only for the report, which may fail
    if trainer.is_world_process_zero():
        for name in OF_ONE_MODEL:
            (output / name).unlink(missing_ok=True)
    if explained:
        saliency["after training"] = explain(trainer, data)
        evaluate_whole(trainer, data, embedded, tables.train_pairs, tables.label_column, tables.encoding)
        clock.lap("report")
    report["saliency"] = {name: shares for name, shares in saliency.items() if shares}

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


class _Clock:
    """Seconds of each part of a run, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.monotonic()

    def lap(self, name: str) -> None:
        """The part that ends now."""
        now = time.monotonic()
        self.seconds[name], self.started = round(now - self.started, 1), now


@command("training/run.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    model, tables, arguments = parse(sys.argv[1:] if options is None else options)
    if tables.validate_only:
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
        return DONE
    report = run(model, tables, arguments)
    # A launcher of several processes takes any code but 0 for a failure.
    with_rejects = report["counts"]["rejected_rows"] and arguments.world_size == 1
    return DONE_WITH_REJECTS if with_rejects else DONE


if __name__ == "__main__":
    sys.exit(main())
