"""What a run measures for its report beyond metrics.json: saliency, and evaluation.json with its plots."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from training.evaluate import MeasureOptions, evaluate_model, write_evaluation
from training.evaluation.embed import View
from training.evaluation.saliency import measure_saliency
from training.evaluation.slices import count_in_pairs
from training.trainer.batches import PairCollator
from training.trainer.trainer import NoteLLM2Trainer


if TYPE_CHECKING:  # run imports this file
    from training.run import RunData


SALIENCY_PAIRS = 32
"""Evaluation pairs over which saliency is measured; no item stands in two of them."""


def explain(trainer: NoteLLM2Trainer, data: "RunData") -> dict[str, Any]:
    """Where the embeddings of some evaluation pairs take their information from: `Saliency`'s fields.

    Empty where fewer than two pairs have different items.
    """
    rows = {item_id: row for row, item_id in enumerate(data.eval_items.item_ids)}
    met: set[str] = set()
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for query, target in data.eval_pairs:
        if len(pairs) == SALIENCY_PAIRS:
            break
        if query != target and met.isdisjoint((query, target)):
            met.update((query, target))
            pairs.append((data.eval_items[rows[query]], data.eval_items[rows[target]]))
    if len(pairs) < 2:
        return {}
    collate: Any = cast(PairCollator, trainer.data_collator).collate_items
    return asdict(measure_saliency(trainer.model, trainer.processing_class, collate, pairs))


def evaluate_whole(
    trainer: NoteLLM2Trainer,
    data: "RunData",
    embedded: Iterable[View],
    train_pairs: str,
    label_column: str | None,
    encoding: str | None = None,
) -> None:
    """evaluation.json, evaluation.md and plots of the trained model, in the run's folder.

    Args:
        embedded: the evaluation items by the trained model.
        train_pairs: pair table, for slices by popularity and of unseen items.
        label_column: where `data.labels` come from.
        encoding: of `train_pairs`.
    """
    output, options = Path(trainer.args.output_dir), MeasureOptions()
    found = evaluate_model(
        trainer.model,
        trainer.processing_class,
        data.eval_items,
        data.eval_pairs,
        options,
        labels=data.labels,
        popularity=count_in_pairs(train_pairs, data.eval_items, encoding),
        embedded=embedded,
    )
    with (output / "rejects.jsonl").open(encoding="utf-8") as lines:  # the run has listed these items' pictures by now
        counts = {"items": len(data.eval_items), "pairs": len(data.eval_pairs), "rejected_rows": sum(1 for _ in lines)}
    about = {"model": str(output / "model"), "compared_with": None, "counts": counts}
    settings = {**asdict(options), "label_column": label_column, "train_pairs": train_pairs}
    write_evaluation({**about, "settings": settings, **found}, output)
