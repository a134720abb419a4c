"""Train NoteLLM-2 and measure it before and after: `python training/run.py CONFIG.yaml [--key value ...]`.

Writes into `output_dir`: `model/` (weights, processor and code, for AutoModel), `metrics.json`, `rejects.jsonl` (rows
that were left out, with the reason) and `logs/` (TensorBoard).
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModel, AutoProcessor, set_seed
from transformers.integrations import TensorBoardCallback

from training.arguments import DataArguments, ModelArguments, NoteLLM2TrainingArguments, parse
from training.batches import ItemCollator, PairCollator, PairDataset, VisionFeatures, cache_vision_features
from training.data import ItemTable, PairTable, Reject, TableError, load_items, load_pairs, write_rejects
from training.evaluation import evaluate, measure, random_expectation
from training.trainer import NoteLLM2Trainer


SHOWN = ("recall@1", "recall@10", "recall@100", "precision@10")


@dataclass(frozen=True)
class RunData:
    """The tables of a run: all items, those to evaluate on, and the pairs of both, with every rejected row."""

    items: ItemTable
    train: PairTable
    eval_items: ItemTable
    eval_positions: list[int]
    eval_pairs: list[tuple[str, str]]
    labels: list[Any] | None
    rejects: list[Reject]


def load_data(arguments: DataArguments) -> RunData:
    """Read and check the tables that the arguments name."""
    items, rejects = load_items(arguments.items)
    train, rejected = load_pairs(arguments.train_pairs, items, distinct_column=arguments.distinct_column)
    rejects += rejected
    positions = list(range(len(items)))
    if arguments.eval_split is not None:
        splits = items.column("split")
        positions = [position for position in positions if splits[position] == arguments.eval_split]
    eval_items = items.select(positions)
    pairs = []
    if arguments.eval_pairs is not None:
        table, rejected = load_pairs(arguments.eval_pairs, eval_items)
        rejects += rejected
        pairs = [(eval_items.item_ids[query], eval_items.item_ids[target]) for query, target in table.pairs]
    labels = eval_items.column(arguments.label_column) if arguments.label_column else None
    return RunData(items, train, eval_items, positions, pairs, labels, rejects)


def load_model(arguments: ModelArguments) -> tuple[Any, Any]:
    """Model and processor; with LoRA around the LLM if asked for."""
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    model = AutoModel.from_pretrained(
        arguments.model, trust_remote_code=True, dtype=getattr(torch, arguments.dtype), **options
    )
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    if arguments.lora_r:
        targets = arguments.lora_target_modules
        lora = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            task_type=TaskType.FEATURE_EXTRACTION,
        )
        model.language_model = get_peft_model(model.language_model, lora)
    return model, processor


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Model, processor and code, with LoRA merged into the LLM; written beside, then put in place of an older one."""
    if hasattr(model.language_model, "merge_and_unload"):
        model.language_model = model.language_model.merge_and_unload()
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    processor.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def measure_baselines(data: RunData, features: VisionFeatures | None, seed: int) -> dict[str, float]:
    """Metrics of embeddings that need no LLM, under the same protocol as the model."""
    from training.baselines import baseline_embeddings  # scikit-learn: only needed here

    if features is None:
        raise ValueError("report_baselines needs cache_vision_features and items with images.")
    summary = torch.stack([features.summary(item_id) for item_id in data.items.item_ids])
    train_pairs = [(data.items.item_ids[query], data.items.item_ids[target]) for query, target in data.train.pairs]
    metrics: dict[str, float] = {}
    everything = list(range(len(data.eval_items)))
    for name, embeddings in baseline_embeddings(list(data.items), summary, train_pairs, seed).items():
        chosen = embeddings[data.eval_positions]
        metrics |= measure(name, chosen, everything, data.eval_items, data.eval_pairs, data.labels)
    return metrics


def run(
    model_arguments: ModelArguments, data_arguments: DataArguments, arguments: NoteLLM2TrainingArguments
) -> dict[str, Any]:
    """The whole job; returns what metrics.json holds."""
    output = Path(arguments.output_dir or "runs/train")
    set_seed(arguments.seed)
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name], started = round(time.monotonic() - started, 1), time.monotonic()

    data = load_data(data_arguments)
    write_rejects(data.rejects, output / "rejects.jsonl")
    model, processor = load_model(model_arguments)
    model.to(arguments.device)
    lap("load")

    features = cache_vision_features(model, processor, data.items) if data_arguments.cache_vision_features else None
    collate = ItemCollator(processor, features, model.dtype)
    lap("vision_features")

    def measured() -> dict[str, float]:
        if not data.eval_pairs:
            return {}
        size = arguments.per_device_eval_batch_size
        return evaluate(model, collate, data.eval_items, data.eval_pairs, data.labels, size)

    report: dict[str, Any] = {
        "random": random_expectation(data.eval_items, data.eval_pairs, data.labels) if data.eval_pairs else {},
        "before": measured(),
    }
    lap("evaluate_before")
    report["baselines"] = measure_baselines(data, features, arguments.seed) if data_arguments.report_baselines else {}
    lap("baselines")

    trainer = NoteLLM2Trainer(
        pairs=data.train,
        train_dataset=PairDataset(data.items, data.train),
        model=model,
        args=arguments,
        data_collator=PairCollator(collate),
        processing_class=processor,
        callbacks=[TensorBoardCallback(SummaryWriter(str(output / "logs")))],
    )
    trained = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    lap("train")
    report["after"] = measured()
    lap("evaluate_after")

    report["counts"] = {
        "items": len(data.items),
        "eval_items": len(data.eval_items),
        "train_pairs": len(data.train.pairs),
        "eval_pairs": len(data.eval_pairs),
        "rejected_rows": len(data.rejects),
        "steps": trainer.state.global_step,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "all_parameters": sum(p.numel() for p in model.parameters()),
    }
    report["train_loss"] = trained.training_loss
    report["log"] = trainer.state.log_history
    report["settings"] = {**vars(model_arguments), **vars(data_arguments), **trainer_settings(arguments)}
    report["seconds"] = seconds
    if trainer.is_world_process_zero():
        save_model(model, processor, output / "model")
        write_json(report, output / "metrics.json")
        show(report, output)
    return report


def trainer_settings(arguments: NoteLLM2TrainingArguments) -> dict[str, Any]:
    """The training options as plain values."""
    return json.loads(arguments.to_json_string())


def write_json(content: dict[str, Any], path: Path) -> None:
    """Written beside, then renamed."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def show(report: dict[str, Any], output: Path) -> None:
    """The closing table, and where everything is."""
    console = Console()
    if report["after"]:
        table = Table(title=f"{report['random']['queries']} queries among {report['random']['candidates']} candidates")
        table.add_column("embedding")
        shown = [metric for metric in SHOWN if f"random/{metric}" in report["random"]]
        for metric in shown:
            table.add_column(metric, justify="right")
        for stage in ("random", "baselines", "before", "after"):
            names = dict.fromkeys(key.rsplit("/", 1)[0] for key in report[stage] if "/" in key)
            for name in names:
                label = name if stage == "random" else f"{stage.removesuffix('s')}: {name}"
                table.add_row(
                    label, *(f"{report[stage].get(f'{name}/{metric}', float('nan')):.3f}" for metric in shown)
                )
            table.add_section()
        console.print(table)
    rejected = report["counts"]["rejected_rows"]
    console.print(f"Rows left out: {rejected}" + (f", see {output / 'rejects.jsonl'}" if rejected else ""))
    console.print(f"Model:   {output / 'model'}\nMetrics: {output / 'metrics.json'}\nLogs:    {output / 'logs'}")


def main() -> None:
    """Entry point; an unusable table ends with its message alone."""
    try:
        run(*parse(sys.argv[1:]))
    except TableError as error:
        raise SystemExit(f"training/run.py: {error}") from error


if __name__ == "__main__":
    main()
