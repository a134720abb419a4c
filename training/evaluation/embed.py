"""Items as a model sees them with both modalities, with the image alone and with the text alone, and metrics of each.

Recall follows the published protocol (`training.evaluation.retrieval`). Each modality is measured over the items that have
it; the visual embeddings of a model with mICL are measured too.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from modeling_notellm2.prompts_notellm2 import FieldLimits
from training.batches.collators import ItemCollator
from training.evaluation.retrieval import expected_precision, has_label, precision_at_k, rank_targets
from training.tables.items import ItemTable
from training.trainer.distributed import gather, world_size


RECALL_AT = (1, 10, 100)
NEIGHBOURS = 10
MODALITIES = {
    "both": ("title", "topics", "content", "image"),
    "image": ("image",),
    "text": ("title", "topics", "content"),
}

Item = dict[str, Any]
Pairs = np.ndarray
"""(p, 2) integer: positions of query and target in the item table."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of items: float32 on the CPU, unit length.

    Attributes:
        embeddings: (n, d).
        visual_embeddings: (n, d), or None without mICL.
        has_image: (n,) bool.
    """

    embeddings: Tensor
    visual_embeddings: Tensor | None
    has_image: Tensor

    def readable(self, items: ItemTable, positions: np.ndarray) -> np.ndarray:
        """(n,) bool: which of the embedded items, those at `positions`, count. One that names pictures of which none could be
        read doesn't: training and encoding leave it out, and here it would be known by its text alone."""
        has_picture = items.fields_present().get("image")
        if has_picture is None:
            return np.ones(len(positions), dtype=bool)
        return ~has_picture[positions] | self.has_image.numpy()

    def at(self, rows: np.ndarray) -> "Embedded":
        """The embeddings of some of the items."""
        visual = None if self.visual_embeddings is None else self.visual_embeddings[rows]
        return Embedded(self.embeddings[rows], visual, self.has_image[rows])


class Embedder(Protocol):
    """A model of any kind, as an evaluation sees it.

    Attributes:
        name: folder or id.
        kind: of model, for people.
        reads: how it reads an item, for people.
        modalities: those of `MODALITIES` that it can embed.
        limits: how much of each text field it is given.
        parameters: how many it has.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def reads(self) -> str: ...

    @property
    def modalities(self) -> tuple[str, ...]: ...

    @property
    def limits(self) -> FieldLimits: ...

    @property
    def parameters(self) -> int: ...

    def embed(self, items: Sequence[Item], modality: str) -> Embedded:
        """Embed items that have no other fields than those of a modality.

        Raises:
            ValueError: when there are no items.
        """
        ...


@torch.no_grad()
def embed(
    model: Any,
    items: Sequence[Item],
    collate: Callable[[Sequence[Item]], dict[str, Tensor]],
    batch_size: int,
    name: str,
    num_workers: int = 0,
) -> Embedded:
    """Embed items batch by batch in eval mode, and leave the model in the mode it was in.

    Several processes embed a share each, in as many batches; every one of them gets all embeddings, in the items' order.

    Raises:
        ValueError: when there are no items.
    """
    if not len(items):
        raise ValueError(f"There are no {name} to embed.")
    was_training = model.training
    model.eval()
    outputs = []
    share = _Share(items)
    loader = DataLoader(share, batch_size, collate_fn=collate, num_workers=num_workers)
    for batch in tqdm(loader, desc=f"Embedding {name}", unit="batch", disable=share.rank > 0):
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        output = model(**inputs)
        outputs.append((output.embeddings, output.visual_embeddings, output.has_image))
    model.train(was_training)
    embeddings, visual, has_image = zip(*outputs, strict=True)

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return gather(torch.cat(list(parts)))[: len(items)].cpu()

    return Embedded(
        joined(embeddings).float(), None if visual[0] is None else joined(visual).float(), joined(has_image)
    )


class _Share(Dataset):
    """This process's part of some items: contiguous, so that parts in the order of processes are all items in order.

    All parts are equally long, so that processes with weights in shards run in step: behind the last item the first ones
    come again.
    """

    def __init__(self, items: Sequence[Item]):
        self.items = items
        self.rank = dist.get_rank() if world_size() > 1 else 0
        self.count = -(-len(items) // world_size())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Item:
        return self.items[(self.rank * self.count + position) % len(self.items)]


class NoteLLM2Embedder:
    """NoteLLM-2 as an [`Embedder`].

    Args:
        model: the model, or one with LoRA around it; it is left in the mode it was in.
        collate: items to its inputs.
        batch_size: items embedded at once.
        num_workers: processes that open images.
        name: folder or id.
    """

    kind = "NoteLLM-2"
    reads = "picture and text in one prompt"
    modalities = tuple(MODALITIES)

    def __init__(self, model: Any, collate: ItemCollator, batch_size: int = 32, num_workers: int = 0, name: str = ""):
        self.model, self.collate, self.name = model, collate, name
        self.batch_size, self.num_workers = batch_size, num_workers

    @property
    def limits(self) -> FieldLimits:
        return self.collate.processor.limits

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def embed(self, items: Sequence[Item], modality: str) -> Embedded:
        return embed(self.model, items, self.collate, self.batch_size, modality, self.num_workers)


class _Without(Sequence[Item]):
    """Items at some positions, with only some of their fields."""

    def __init__(self, items: Sequence[Item], positions: np.ndarray, fields: Sequence[str]):
        self.items, self.positions, self.fields = items, positions.tolist(), ("item_id", *fields)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: Any) -> Any:
        item = self.items[self.positions[position]]
        return {key: item[key] for key in self.fields if key in item}


@dataclass(frozen=True)
class View:
    """The embeddings of the items that have a modality: "both", "image", "text", or "visual" (see `embed`).

    Attributes:
        positions: (n) of these items in their table.
        embeddings: (n, d) float32, unit length, on the CPU.
        seconds: that opening the items and embedding them took.
    """

    name: str
    positions: list[int]
    embeddings: Tensor
    seconds: float


def views(
    embedder: Embedder, items: ItemTable, pairs: Pairs, modalities: Sequence[str] = tuple(MODALITIES)
) -> Iterator[View]:
    """Embed the items once for each of some modalities that the model has and that has a pair to measure, one by one."""
    present = items.fields_present()
    for name in modalities:
        fields = MODALITIES[name]
        positions = np.flatnonzero(np.any([present[field] for field in fields if field in present], axis=0))
        if name not in embedder.modalities or not has_pair(positions, pairs):
            continue
        start = time.perf_counter()
        embedded = embedder.embed(_Without(items, positions, fields), name)
        seconds = time.perf_counter() - start
        if "image" in fields:
            readable = embedded.readable(items, positions)
            positions, embedded = positions[readable], embedded.at(readable)
        yield View(name, positions.tolist(), embedded.embeddings, seconds)
        if name == "image" and embedded.visual_embeddings is not None:
            yield View("visual", positions.tolist(), embedded.visual_embeddings, seconds)


def evaluate(
    model: Any,
    collate: ItemCollator,
    items: ItemTable,
    pairs: Pairs,
    labels: Sequence[Any] | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> dict[str, float]:
    """Recall, and precision where there are labels, of every modality that has a pair to measure.

    Args:
        pairs: (p, 2) integer positions in `items`: query and target.
        labels: one for each item, e.g. its category.
        num_workers: processes that open images.

    Returns:
        A flat dict such as `{"both/recall@10": 0.4, "both/precision@10": 0.3, "visual/recall@10": ...}`.
    """
    embedder = NoteLLM2Embedder(model, collate, batch_size, num_workers)
    return measure_views(views(embedder, items, pairs), pairs, labels)


def measure_views(embedded: Iterable[View], pairs: Pairs, labels: Sequence[Any] | None = None) -> dict[str, float]:
    """What `evaluate` returns, of items that `views` has embedded."""
    metrics: dict[str, float] = {}
    for view in embedded:
        metrics |= measure(view.name, view.embeddings, view.positions, pairs, labels)
    return metrics


def evaluate_in_training(
    model: Any,
    collate: Callable[[Sequence[Item]], dict[str, Tensor]],
    items: ItemTable,
    pairs: Pairs,
    labels: Sequence[Any] | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> dict[str, float]:
    """Metrics with both modalities from one pass over the items: `{"recall@10": 0.4, "visual_recall@10": 0.2, ...}`.

    The visual embeddings are measured over the items that have an image.
    """
    embedded = embed(model, items, collate, batch_size, "evaluation items", num_workers)
    readable = np.flatnonzero(embedded.readable(items, np.arange(len(items))))
    metrics = measure("both", embedded.embeddings[readable], readable.tolist(), pairs, labels)
    flat = {name.removeprefix("both/"): value for name, value in metrics.items()}
    shown = embedded.has_image.nonzero().flatten().tolist()
    if embedded.visual_embeddings is not None and has_pair(shown, pairs):
        metrics = measure("visual", embedded.visual_embeddings[shown], shown, pairs, labels)
        flat |= {name.replace("/", "_"): value for name, value in metrics.items()}
    return flat


def measure(
    name: str,
    embeddings: Tensor,
    positions: Sequence[int],
    pairs: Pairs,
    labels: Sequence[Any] | None = None,
) -> dict[str, float]:
    """Metrics of the embeddings of the items at `positions`, each under `name/`."""
    result = rank_targets(embeddings, positions, pairs.tolist())
    metrics = {f"{name}/recall@{k}": result.recall(k) for k in RECALL_AT}
    chosen = [labels[i] for i in positions] if labels is not None else []
    if len(chosen) > NEIGHBOURS and any(map(has_label, chosen)):
        metrics[f"{name}/precision@{NEIGHBOURS}"] = precision_at_k(embeddings, chosen, NEIGHBOURS)
    return metrics


def random_expectation(items: ItemTable, pairs: Pairs, labels: Sequence[Any] | None = None) -> dict[str, float]:
    """What a random ranking of all items reaches, with the number of queries and candidates beside it."""
    result = rank_targets(torch.zeros(len(items), 1), range(len(items)), pairs.tolist())
    metrics = {f"random/recall@{k}": result.expected_recall(k) for k in RECALL_AT}
    if labels is not None and len(items) > NEIGHBOURS and any(map(has_label, labels)):
        metrics[f"random/precision@{NEIGHBOURS}"] = expected_precision(labels)
    return metrics | {
        "queries": len(result.ranks),
        "candidates": result.pool_size,
        "pairs_of_other_items": result.unknown_pairs,
        "pairs_repeating_an_item": result.repeated_pairs,
    }


def has_pair(positions: Sequence[int] | np.ndarray, pairs: Pairs) -> bool:
    """Whether some pair has two different items of those at `positions`."""
    return bool((np.isin(pairs, positions).all(1) & (pairs[:, 0] != pairs[:, 1])).any())
