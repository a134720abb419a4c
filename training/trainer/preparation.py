"""Makes what a run trains with: the vision features of its pictures, and the trainer with batches, masks and evaluation."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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


STANDARD_ITEMS = 256
"""Train items on which states are measured."""


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
    standardize(model, collate, data, arguments)
    masks = (options.mask_known_positives, options.mask_same_image, options.mask_same_text)
    workers = arguments.dataloader_num_workers
    image_tokens = processor.num_query_tokens if processor.early_fusion else 0
    grouped = arguments.train_sampling_strategy == "group_by_length"
    if arguments.several_positives and not options.mask_known_positives:
        raise ValueError("several_positives needs mask_known_positives: its positives are the known ones.")
    false_negatives = once_per_machine(lambda: FalseNegatives.of(data.items, data.train, *masks, num_workers=workers))
    return NoteLLM2Trainer(
        train_dataset=PairDataset(data.items, data.train),
        false_negatives=false_negatives,
        positives=false_negatives.known if arguments.several_positives else None,
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


@torch.no_grad()
def standardize(model: Any, collate: ItemCollator, data: RunData, arguments: NoteLLM2TrainingArguments) -> None:
    """Measure mean and deviation of the LLM's states on some train items, where the model wants that and has none yet.

    Raises:
        ValueError: with ZeRO-3, which has the weights in shards already.
    """
    base = unwrap_adapter(model)
    parts = {
        name: part for name in ("", "visual_") if (part := getattr(base, f"{name}standardization", None)) is not None
    }
    if not parts or all(part.is_fitted for part in parts.values()):
        return
    if is_deepspeed_zero3_enabled():
        raise ValueError("standardize_states can't measure states with ZeRO-3: take ZeRO-2 or FSDP2, or leave it off.")
    states: dict[str, list[torch.Tensor]] = {name: [] for name in parts}
    hooks = [
        part.register_forward_pre_hook(lambda _, args, name=name: states[name].append(args[0].float().cpu()))
        for name, part in parts.items()
    ]
    was_training, device = model.training, base.device
    generator = np.random.default_rng(arguments.seed)
    chosen = generator.permutation(np.unique(data.train.pairs))[:STANDARD_ITEMS].tolist()
    shown = []
    model.eval()
    for start in range(0, len(chosen), arguments.per_device_eval_batch_size):
        items = [data.items[position] for position in chosen[start : start + arguments.per_device_eval_batch_size]]
        inputs = {name: value.to(device) for name, value in collate(items).items()}
        dtype = arguments.precision.dtype
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            shown.append(model(**inputs).has_image.cpu())
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    with_picture = torch.cat(shown)
    for name, part in parts.items():
        measured = torch.cat(states[name])
        measured = measured[with_picture] if name else measured
        if len(measured) > 1:
            part.fit(measured)
