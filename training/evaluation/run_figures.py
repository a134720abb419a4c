"""What a run measures: its model before and after training, baselines, saliency, and evaluation.json for its report."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.batches.collators import drop_repeated_lines
from training.batches.data import RunData
from training.batches.vision_cache import VisionCache
from training.evaluation.embed import (
    MODALITIES,
    NoteLLM2Embedder,
    View,
    measure,
    measure_views,
    random_expectation,
    views,
)
from training.evaluation.evidence import evaluate_model, write_results
from training.evaluation.measuring import MeasureOptions
from training.evaluation.saliency import measure_saliency
from training.evaluation.slices import count_in_pairs
from training.trainer.arguments import DataArguments
from training.trainer.trainer import NoteLLM2Trainer


SALIENCY_PAIRS = 32
"""Evaluation pairs over which saliency is measured; no item stands in two of them."""


class Clock:
    """Seconds of each part of a run, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.monotonic()

    def lap(self, name: str) -> None:
        """End a part now."""
        now = time.monotonic()
        self.seconds[name], self.started = round(now - self.started, 1), now


class RunFigures:
    """Measures the model of a run at the stages of its training.

    Args:
        trainer: of the model.
        data: its tables; without evaluation pairs there is nothing to measure.
        tables: options: whether there is a report, and baselines.
        clock: of the run.
    """

    def __init__(self, trainer: NoteLLM2Trainer, data: RunData, tables: DataArguments, clock: Clock):
        self.trainer, self.data, self.tables, self.clock = trainer, data, tables, clock
        self.explained = tables.report and len(data.eval_pairs) > 0 and trainer.args.world_size == 1
        self.saliency: dict[str, Any] = {}
        self.embedded: list[View] = []

    def before_training(self, features: VisionCache | None) -> dict[str, Any]:
        """Metrics of chance ("random"), of the untrained model ("before") and of the baselines; and its saliency.

        Raises:
            ValueError: for baselines without vision features.
        """
        data, clock = self.data, self.clock
        chance = random_expectation(data.eval_items, data.eval_pairs, data.labels) if len(data.eval_pairs) else {}
        before = measure_views(self._views(["both"]), data.eval_pairs, data.labels)
        clock.lap("evaluate_before")
        if self.explained:
            self.saliency["before training"] = explain(self.trainer, data)
        clock.lap("saliency_before")
        seed = self.trainer.args.seed
        baselines = measure_baselines(data, features, seed) if self.tables.report_baselines else {}
        clock.lap("baselines")
        return {"random": chance, "before": before, "baselines": baselines}

    def after_training(self) -> dict[str, Any]:
        """Metrics of the trained model ("after")."""
        self.embedded = self._views(tuple(MODALITIES))
        after = measure_views(self.embedded, self.data.eval_pairs, self.data.labels)
        self.clock.lap("evaluate_after")
        return {"after": after}

    def for_report(self, weights: dict[str, str] | None) -> dict[str, Any]:
        """Saliency before and after, and evaluation.json, where there is a report.

        Args:
            weights: what `weights_of` gives for the saved model.
        """
        if self.explained:
            self.saliency["after training"] = explain(self.trainer, self.data)
            tables = self.tables
            write_evaluation(
                self.trainer,
                self.data,
                weights,
                self.embedded,
                tables.train_pairs,
                tables.label_column,
                tables.encoding,
            )
            self.clock.lap("report")
        return {"saliency": {name: shares for name, shares in self.saliency.items() if shares}}

    def _views(self, modalities: Sequence[str]) -> list[View]:
        return list(views(embedder_of(self.trainer), self.data.eval_items, self.data.eval_pairs, modalities))


def embedder_of(trainer: NoteLLM2Trainer) -> NoteLLM2Embedder:
    """The model that is trained, as the evaluation sees it."""
    arguments = trainer.args
    return NoteLLM2Embedder(
        trainer.model,
        trainer.data_collator.collate_items,
        arguments.per_device_eval_batch_size,
        arguments.dataloader_num_workers,
        str(Path(arguments.output_dir) / "model"),
    )


def measure_baselines(data: RunData, features: VisionCache | None, seed: int) -> dict[str, float]:
    """Metrics of embeddings that need no LLM, under the same protocol as the model."""
    from training.evaluation.baselines import baseline_embeddings  # scikit-learn: only needed here

    if features is None:
        raise ValueError("report_baselines needs cache_vision_features and items with images.")
    items = list(data.items)
    summary = torch.stack([features.summary(item) for item in items])
    metrics: dict[str, float] = {}
    everything = list(range(len(data.eval_items)))
    for name, embeddings in baseline_embeddings(items, summary, data.train.pairs, seed).items():
        chosen = embeddings[data.eval_positions]
        metrics |= measure(name, chosen, everything, data.eval_pairs, data.labels)
    return metrics


def explain(trainer: NoteLLM2Trainer, data: RunData) -> dict[str, Any]:
    """Where the embeddings of some evaluation pairs take their information from: `Saliency`'s fields.

    Empty where fewer than two pairs have different items.
    """
    met: set[int] = set()
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for query, target in data.eval_pairs.tolist():
        if len(pairs) == SALIENCY_PAIRS:
            break
        if query != target and met.isdisjoint((query, target)):
            met.update((query, target))
            pairs.append((data.eval_items[query], data.eval_items[target]))
    if len(pairs) < 2:
        return {}
    collate: Any = trainer.data_collator.collate_items
    return asdict(measure_saliency(trainer.model, trainer.processing_class, collate, pairs))


def write_evaluation(
    trainer: NoteLLM2Trainer,
    data: RunData,
    weights: dict[str, str] | None,
    embedded: Iterable[View],
    train_pairs: str,
    label_column: str | None,
    encoding: str | None = None,
) -> None:
    """Write evaluation.json, evaluation.md and plots of the trained model into the run's folder.

    Args:
        weights: of the trained model, by name and hash.
        embedded: the evaluation items by it.
        train_pairs: pair table, for slices by popularity and of unseen items.
        label_column: where `data.labels` come from.
        encoding: of `train_pairs`.
    """
    output, options = Path(trainer.args.output_dir), MeasureOptions()
    figures = evaluate_model(
        embedder_of(trainer),
        data.eval_items,
        data.eval_pairs,
        options,
        labels=data.labels,
        popularity=count_in_pairs(train_pairs, data.eval_items, encoding),
        embedded=embedded,
    )
    with (output / "rejects.jsonl").open(encoding="utf-8") as lines:  # the run has listed these items' pictures by now
        counts = {"items": len(data.eval_items), "pairs": len(data.eval_pairs), "rejected_rows": sum(1 for _ in lines)}
    about: dict[str, Any] = {"model": str(output / "model"), "weights": weights, "compared_with": [], "counts": counts}
    settings = {**asdict(options), "label_column": label_column, "train_pairs": train_pairs}
    write_results({**about, "settings": settings, **figures}, output)


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
