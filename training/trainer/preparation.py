"""Makes what a run trains with: the vision features of its pictures, and the trainer with batches, masks and evaluation."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from training.batches.collators import BLANK, ItemCollator, PairCollator, PairDataset, cache_vision_features
from training.batches.data import RunData
from training.batches.false_negatives import FalseNegatives
from training.batches.sampling import item_lengths
from training.batches.vision_cache import VisionCache
from training.evaluation.embed import evaluate_in_training
from training.trainer.adapters import unwrap_adapter
from training.trainer.arguments import DataArguments, NoteLLM2TrainingArguments
from training.trainer.distributed import once_per_machine
from training.trainer.trainer import NoteLLM2Trainer


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


def make_trainer(
    model: Any,
    processor: Any,
    data: RunData,
    features: VisionCache | None,
    options: DataArguments,
    arguments: NoteLLM2TrainingArguments,
) -> NoteLLM2Trainer:
    """The trainer with its batches, masks and evaluation."""
    freeze_unread(model, processor)
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


def freeze_unread(model: Any, processor: Any) -> None:
    """Freeze what no embedding reads of a vision encoder that is trained: a pooling head, a mask token.

    It would never change, and processes would wait for its gradients. ZeRO-3, which has the weights in shards already, copes.
    """
    base = unwrap_adapter(model)
    trained = [weight for part in base.vision_parts for weight in part.parameters() if weight.requires_grad]
    if not trained or is_deepspeed_zero3_enabled():
        return
    was_training = model.training
    inputs = processor([{"title": "", "image": BLANK}], return_tensors="pt")
    output = model.eval()(**{name: value.to(base.device) for name, value in inputs.items()})
    read = [output[name].sum() for name in ("embeddings", "visual_embeddings") if output.get(name) is not None]
    gradients = torch.autograd.grad(torch.stack(read).sum(), trained, allow_unused=True)
    model.train(was_training)
    for weight, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            weight.requires_grad_(False)
