"""Connector warm-up from a catalogue alone: the visual tokens learn the LLM's language before any pair is seen.

A connector that starts at random says nothing to the LLM, and pairs are few. Two losses on items with a picture and a text
teach it, with LLM and vision encoder frozen (after BLIP-2, arXiv 2301.12597, but in the item's own prompt):

- captioning: the LLM writes the item's own text, which stands behind the picture in its prompt, token by token;
- matching: the mean of a picture's visual tokens finds, among the batch's items, its own text, as the mean of the word
  embeddings that the LLM has for it. Both are centred in the batch.

`run` is what `training/align.py` does, `first_phase` what `training/run.py --align_steps` does before the first pair.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor, get_cosine_schedule_with_warmup, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import seed_worker

from modeling_notellm2 import choose_precision
from modeling_notellm2.vision_features_notellm2 import features_of
from training.batches.collators import ItemCollator, cache_vision_features
from training.batches.data import RunData
from training.batches.false_negatives import TEXT_FIELDS
from training.batches.vision_cache import VisionCache
from training.evaluation.saliency import TEXT, token_kinds
from training.tables.commands.bounds import AtLeastOne, Bounds, NotNegative, Processes, Seed, check_bounds
from training.tables.commands.files import atomic_write, write_json
from training.tables.commands.model_folder import loading
from training.tables.commands.options import allow_remote_option, device_option, encoding_option, split_option
from training.tables.commands.outputs import GENERATOR, Output, claimed
from training.tables.images import Item
from training.tables.items import ItemTable, load_items
from training.tables.rejects import TableError
from training.trainer.adapters import training_only, unwrap_adapter
from training.trainer.arguments import ModelArguments, NoteLLM2TrainingArguments
from training.trainer.distributed import world_size


TEMPERATURE = 0.07
WARM_UP = 0.1
CLIP = 1.0
"""Largest norm of the gradients."""
LOG_STEPS = 10
RECORD = "alignment.json"
IN_A_RUN = ("steps", "batch_size", "learning_rate", "caption_weight", "matching_weight")
"""Options that training/run.py has too, behind `align_`."""


@dataclass
class AlignArguments:
    """What to warm up, on which items, how long."""

    model: str = field(metadata={"help": "Folder or Hub id of a NoteLLM-2 model with its processor."})
    items: str = field(metadata={"help": "Item table; items with a picture and a text are read."})
    output: str = field(metadata={"help": "Folder for the warmed-up model."})
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    allow_remote: str | None = allow_remote_option()
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
        items, rejects = load_items(
            arguments.items, arguments.split, encoding=arguments.encoding, allow_remote=arguments.allow_remote
        )
        split = arguments.item_split
        shown = WithBoth(items, np.arange(len(items)) if split is None else items.where("split", split))
        check_items(shown, arguments)
        root = Path(arguments.vision_cache_dir) if arguments.vision_cache_dir else None
        features = None
        if model.config.freeze_vision:
            features = cache_vision_features(model, processor, items, root, dtype=precision.dtype)
        log = align(model, processor, shown, ItemCollator(processor, features, model.dtype), arguments, precision.dtype)
        with atomic_write(output) as place:
            model.save_pretrained(place)
            processor.save_pretrained(place)
            write_json(record_of(arguments, shown, log), place / RECORD)
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
            "--caption_weight 0 (of training/run.py: --align_caption_weight 0) for matching alone."
        )


def first_phase(
    model: Any,
    processor: Any,
    data: RunData,
    features: VisionCache | None,
    options: ModelArguments,
    arguments: NoteLLM2TrainingArguments,
) -> dict[str, Any]:
    """Warm up the connector of a run's model, LoRA around it or not, on the items of its train pairs; in place.

    Every process computes the same, and then takes the first one's result.

    Returns:
        As in alignment.json, which is written into the run's folder.

    Raises:
        ValueError: with ZeRO-3, which has the weights in shards already, and as `check_connector`.
        TableError: where fewer items than a batch takes have a picture and a text.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "align_steps can't train a connector whose weights ZeRO-3 has in shards: run training/align.py."
        )
    chosen = {name: getattr(options, f"align_{name}") for name in IN_A_RUN}
    chosen |= {"num_workers": arguments.dataloader_num_workers, "seed": arguments.seed}
    settings = AlignArguments(options.model, "", arguments.output_dir, **chosen)
    base = unwrap_adapter(model)
    check_connector(base, settings)
    shown = WithBoth(data.items, np.unique(data.train.pairs))
    check_items(shown, settings)
    collate = ItemCollator(processor, features, base.dtype, Path(arguments.output_dir) / "rejects.jsonl")
    log = align(base, processor, shown, collate, settings, arguments.precision.dtype)
    if world_size() > 1:
        for parameter in connector_of(base):
            dist.broadcast(parameter.data, 0)
    record = record_of(settings, shown, log)
    if arguments.process_index == 0:
        write_json(record, Path(arguments.output_dir) / RECORD)
    return record


def alignment_of(folder: Path) -> dict[str, Any]:
    """What alignment.json of a run's folder says; empty without one."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record_of(arguments: AlignArguments, items: "WithBoth", log: list[dict[str, float]]) -> dict[str, Any]:
    """What alignment.json says: settings, number of items, losses."""
    return {**GENERATOR, "settings": asdict(arguments), "items": len(items), "log": log}


def check_items(items: "WithBoth", arguments: AlignArguments) -> None:
    """Refuses fewer items than a batch takes.

    Raises:
        TableError: with both numbers.
    """
    if len(items) < arguments.batch_size:
        raise TableError(
            f"{len(items)} items have a picture and a text; a batch of the connector's warm-up takes {arguments.batch_size}. "
            "Lower --batch_size (of training/run.py: --align_batch_size), or skip the warm-up."
        )


class WithBoth(Dataset):
    """Those of some items that have a picture and a text.

    Args:
        items: a table.
        chosen: `(n,)` positions in it.
    """

    def __init__(self, items: ItemTable, chosen: np.ndarray):
        self.items = items
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
    """Train the connector in place; what else takes gradients does so again afterwards.

    Args:
        dtype: of the computation (autocast).

    Returns:
        The means of both losses over every tenth of the steps or so: `step`, `caption_loss`, `matching_loss`.
    """
    # Alike in all, they would stay alike: matching sees their mean alone.
    if model.query_tokens is not None and not model.query_tokens.any():
        torch.nn.init.normal_(model.query_tokens, std=model.config.initializer_range)
    with training_only(model.train(), connector_of(model)):
        log = _train(model, processor, items, collate, arguments, dtype)
    model.eval()
    return log


def _train(
    model: Any,
    processor: Any,
    items: WithBoth,
    collate: ItemCollator,
    arguments: AlignArguments,
    dtype: torch.dtype,
) -> list[dict[str, float]]:
    connector = connector_of(model)
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
    return log


def connector_of(model: Any) -> list[torch.nn.Parameter]:
    """The parameters of Q-Former, where there is one, and projector."""
    qformer = [] if model.qformer is None else [model.query_tokens, *model.qformer.parameters()]
    return [*qformer, *model.projector.parameters()]


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
        features = features_of(model.get_vision_features, **inputs)
        assert features is not None
        hidden, mask = features.last_hidden_state, features.attention_mask
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


def matching_loss(pictures: Tensor, texts: Tensor) -> Tensor:
    """Symmetric InfoNCE of `(n, d)` pictures and their texts, both centred in the batch; scalar."""
    pictures, texts = (F.normalize(part - part.mean(0), dim=-1) for part in (pictures, texts))
    logits = pictures @ texts.T / TEMPERATURE
    places = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2
