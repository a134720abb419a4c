"""Connector warm-up from a catalogue alone: the visual tokens learn the LLM's language before any pair is seen.

A connector that starts at random says nothing to the LLM, and pairs are few. Two losses on items with a picture and a text
teach it, with LLM and vision encoder frozen (after BLIP-2, arXiv 2301.12597, but in the item's own prompt):

- captioning: the LLM writes the item's own text, which stands behind the picture in its prompt, token by token;
- matching: the mean of a picture's visual tokens finds, among the batch's items, its own text, as the mean of the word
  embeddings that the LLM has for it. Both are centred in the batch.

`run` is what `training/align.py` does.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor, get_cosine_schedule_with_warmup, set_seed
from transformers.trainer_utils import seed_worker

from modeling_notellm2 import choose_precision
from modeling_notellm2.vision_features_notellm2 import VisionFeatures, merge_features
from training.batches.collators import ItemCollator, cache_vision_features
from training.batches.false_negatives import TEXT_FIELDS
from training.evaluation.saliency import TEXT, token_kinds
from training.tables.commands.bounds import AtLeastOne, Bounds, NotNegative, Processes, Seed, check_bounds
from training.tables.commands.files import atomic_write, write_json
from training.tables.commands.model_folder import loading
from training.tables.commands.options import device_option, encoding_option, split_option
from training.tables.commands.outputs import Output, claimed
from training.tables.images import Item
from training.tables.items import ItemTable, load_items
from training.tables.rejects import TableError
from training.trainer.grad_cache import FEATURES


TEMPERATURE = 0.07
WARM_UP = 0.1
CLIP = 1.0
"""Largest norm of the gradients."""
LOG_STEPS = 10
RECORD = "alignment.json"


@dataclass
class AlignArguments:
    """What to warm up, on which items, how long."""

    model: str = field(metadata={"help": "Folder or Hub id of a NoteLLM-2 model with its processor."})
    items: str = field(metadata={"help": "Item table; items with a picture and a text are read."})
    output: str = field(metadata={"help": "Folder for the warmed-up model."})
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    item_split: str | None = field(
        default=None,
        metadata={"help": "Only items whose column `split` says this; none: all, as no pair is looked at."},
    )
    steps: AtLeastOne = field(default=300, metadata={"help": "Batches."})
    batch_size: Annotated[int, Bounds(2, 65_536)] = field(default=32, metadata={"help": "Items in a batch."})
    learning_rate: Annotated[float, Bounds(0, 1000)] = field(default=1e-3, metadata={"help": "Largest; cosine decay."})
    caption_weight: NotNegative = field(
        default=1, metadata={"help": "Of the captioning loss; 0: the LLM isn't run, which is many times as fast."}
    )
    matching_weight: NotNegative = field(default=1, metadata={"help": "Of the matching loss."})
    vision_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of cached vision features; none: in the cache of `datasets`."}
    )
    num_workers: Processes = field(default=0, metadata={"help": "Processes that make batches."})
    device: str = device_option()
    dtype: str = field(default="auto", metadata={"help": "Type of the computation, as of training/run.py."})
    seed: Seed = field(default=0, metadata={"help": "Of the order of the items."})

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.caption_weight and not self.matching_weight:
            raise ValueError("--caption_weight and --matching_weight are both 0: nothing would be learned.")


def run(arguments: AlignArguments) -> None:
    """The whole job; writes the model, and the losses into alignment.json beside it."""
    output = Path(arguments.output)
    with claimed([Output("--output", output)], (arguments.model, arguments.items)):
        precision = choose_precision(arguments.dtype, arguments.device)
        print(f"Precision: {precision}")
        set_seed(arguments.seed)
        with loading(arguments.model):
            model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype=torch.float32)
            processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
        model.to(arguments.device)
        check_connector(model, arguments)
        items, rejects = load_items(arguments.items, arguments.split, encoding=arguments.encoding)
        shown = WithBoth(items, arguments.item_split)
        if len(shown) < arguments.batch_size:
            raise TableError(
                f"{arguments.items}: {len(shown)} items have a picture and a text; a batch takes {arguments.batch_size}. Lower "
                "--batch_size, or skip the warm-up."
            )
        root = Path(arguments.vision_cache_dir) if arguments.vision_cache_dir else None
        features = None
        if model.config.freeze_vision:
            features = cache_vision_features(model, processor, items, root, dtype=precision.dtype)
        log = align(model, processor, shown, ItemCollator(processor, features, model.dtype), arguments, precision.dtype)
        with atomic_write(output) as place:
            model.save_pretrained(place)
            processor.save_pretrained(place)
            write_json({"settings": asdict(arguments), "items": len(shown), "log": log}, place / RECORD)
    print(f"{output}: {len(shown):,} items read, {len(rejects):,} rows left out; losses in {RECORD}.")


def check_connector(model: Any, arguments: AlignArguments) -> None:
    """Refuses a model that there is nothing to warm up of, or whose LLM can't write.

    Raises:
        ValueError: naming what to change.
    """
    if model.config.connector == "native" or not model.config.early_fusion:
        raise ValueError("There is no new connector to warm up: this model has its checkpoint's own, or none at all.")
    if arguments.caption_weight and not getattr(model.config.text_config, "tie_word_embeddings", False):
        raise ValueError(
            "The LLM's output layer is not its token embeddings, and a NoteLLM-2 model has no other: it can't write. Set "
            "--caption_weight 0 for matching alone."
        )


class WithBoth(Dataset):
    """The items of a table that have a picture and a text."""

    def __init__(self, items: ItemTable, split: str | None = None):
        self.items = items
        chosen = np.arange(len(items)) if split is None else items.where("split", split)
        self.positions = chosen[has_both(items)[chosen]]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Item:
        return self.items[int(self.positions[index])]


def has_both(items: ItemTable) -> np.ndarray:
    """(n,) bool: which items of a table have a picture and a text."""
    return np.array([bool(item.get("image")) and any(item.get(name) for name in TEXT_FIELDS) for item in items])


def align(
    model: Any,
    processor: Any,
    items: WithBoth,
    collate: ItemCollator,
    arguments: AlignArguments,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, float]]:
    """Train the connector in place.

    Args:
        dtype: of the computation (autocast).

    Returns:
        The means of both losses over every tenth of the steps or so: `step`, `caption_loss`, `matching_loss`.
    """
    model.train().requires_grad_(False)
    qformer = [] if model.qformer is None else [model.query_tokens, *model.qformer.parameters()]
    connector = [*qformer, *model.projector.parameters()]
    for parameter in connector:
        parameter.requires_grad_(True)
    if qformer and not model.query_tokens.any():  # alike in all, they would stay alike: matching sees their mean alone
        torch.nn.init.normal_(model.query_tokens, std=model.config.initializer_range)
    optimizer = torch.optim.AdamW(connector, lr=arguments.learning_rate, weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARM_UP * arguments.steps), arguments.steps)
    log, sums = [], torch.zeros(2)
    batches = endless(items, partial(_with_kinds, collate, processor), arguments)
    for step, (inputs, kinds) in zip(
        tqdm(range(1, arguments.steps + 1), desc="Align", unit="step"), batches, strict=False
    ):
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            losses = alignment_losses(model, inputs, kinds.to(model.device), arguments.caption_weight > 0)
        weights = (arguments.caption_weight, arguments.matching_weight)
        total = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(connector, CLIP)
        optimizer.step()
        schedule.step()
        sums += torch.stack(losses).detach().cpu()
        if step % LOG_STEPS == 0 or step == arguments.steps:
            count = (step - 1) % LOG_STEPS + 1
            log.append({"step": step, "caption_loss": float(sums[0]) / count, "matching_loss": float(sums[1]) / count})
            sums.zero_()
    model.requires_grad_(True).eval()
    return log


def endless(items: WithBoth, collate: Any, arguments: AlignArguments) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of the items in one order after another."""
    loader = DataLoader(
        items,
        arguments.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=arguments.num_workers,
        generator=torch.Generator().manual_seed(arguments.seed),
        worker_init_fn=partial(seed_worker, num_workers=arguments.num_workers, rank=0),
    )
    while True:
        yield from loader


def _with_kinds(collate: ItemCollator, processor: Any, items: list[Item]) -> tuple[dict[str, Tensor], Tensor]:
    inputs = collate(items)
    return inputs, token_kinds(processor, items, inputs)


def alignment_losses(model: Any, inputs: dict[str, Tensor], kinds: Tensor, captions: bool) -> list[Tensor]:
    """The captioning and the matching loss of a batch, two scalars.

    Args:
        inputs: what the model takes.
        kinds: `(n, length)`, as `training.evaluation.saliency.token_kinds` tells the item's own texts.
        captions: whether the first is wanted; else it is 0, and the LLM isn't run.
    """
    own = kinds == TEXT
    output = None
    if captions:
        output = model(**inputs, output_hidden_states=True, output_vision_features=True)
        hidden, mask = output.vision_hidden_states, output.vision_attention_mask
    else:
        hidden, mask = _features(model, inputs)
    words = model.get_input_embeddings()
    caption = hidden.new_zeros(())
    if output is not None:
        before = own[:, 1:]  # a token is written at the place before it
        logits = F.linear(output.hidden_states[-1][:, :-1][before], words.weight)
        caption = F.cross_entropy(logits.float(), inputs["input_ids"][:, 1:][before])
    visual = model.get_visual_tokens(hidden, mask).float().mean(1)
    images = inputs["num_images"]
    owner = torch.arange(len(images), device=visual.device).repeat_interleave(images)
    pictures = visual.new_zeros(len(images), visual.shape[-1]).index_add(0, owner, visual[: len(owner)])
    has_both = own.any(1) & (images > 0)
    texts = (words(inputs["input_ids"]).float() * own.unsqueeze(-1)).sum(1) / own.sum(1, keepdim=True).clamp(min=1)
    return [caption.float(), matching_loss(pictures[has_both] / images[has_both].unsqueeze(-1), texts[has_both])]


def _features(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Tokens of the batch's pictures and their mask, of which some or all may come from the cache."""
    stored = None
    if "vision_hidden_states" in inputs:
        stored = VisionFeatures(*(inputs.get(name) for name in FEATURES))  # type: ignore[arg-type]
    if "pixel_values" in inputs:
        seen = model.get_vision_features(inputs["pixel_values"], inputs.get("image_sizes"))
        stored = merge_features(seen, stored, inputs.get("cached_images"))
    assert stored is not None
    return stored.last_hidden_state, stored.attention_mask


def matching_loss(pictures: Tensor, texts: Tensor) -> Tensor:
    """Symmetric InfoNCE of `(n, d)` pictures and their texts, both centred in the batch; scalar."""
    pictures, texts = (F.normalize(part - part.mean(0), dim=-1) for part in (pictures, texts))
    logits = pictures @ texts.T / TEMPERATURE
    places = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2
