"""Measuring a model on unseen items: retrieval with both modalities, with the image alone and with the text alone.

Recall follows the published protocol (`training.retrieval`). Each modality is measured over the items that have it; the
visual embeddings of a model with mICL are measured too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from training.data import ItemTable
from training.retrieval import expected_precision, precision_at_k, rank_targets


RECALL_AT = (1, 10, 100)
NEIGHBOURS = 10
MODALITIES = {
    "both": ("title", "topics", "content", "image"),
    "image": ("image",),
    "text": ("title", "topics", "content"),
}

Item = dict[str, Any]
Pairs = Sequence[tuple[str, str]]


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


@torch.inference_mode()
def embed(
    model: Any,
    items: Sequence[Item],
    collate: Callable[[Sequence[Item]], dict[str, Tensor]],
    batch_size: int,
    name: str,
) -> Embedded:
    """Embed items batch by batch in eval mode, and leave the model in the mode it was in."""
    was_training = model.training
    model.eval()
    outputs = []
    for start in tqdm(range(0, len(items), batch_size), desc=f"Embedding {name}", unit="batch"):
        inputs = {key: value.to(model.device) for key, value in collate(items[start : start + batch_size]).items()}
        outputs.append(model(**inputs))
    model.train(was_training)
    visual = [output.visual_embeddings for output in outputs]
    return Embedded(
        torch.cat([output.embeddings.float().cpu() for output in outputs]),
        None if visual[0] is None else torch.cat([one.float().cpu() for one in visual]),
        torch.cat([output.has_image.cpu() for output in outputs]),
    )


def evaluate(
    model: Any,
    collate: Callable[[Sequence[Item]], dict[str, Tensor]],
    items: ItemTable,
    pairs: Pairs,
    labels: Sequence[Any] | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Recall, and precision where there are labels, of every modality that has a pair to measure.

    Args:
        pairs: (query id, target id).
        labels: one for each item, e.g. its category.

    Returns:
        A flat dict such as `{"both/recall@10": 0.4, "both/precision@10": 0.3, "visual/recall@10": ...}`.
    """
    metrics: dict[str, float] = {}
    loaded = list(items)
    for name, fields in MODALITIES.items():
        positions = [i for i, item in enumerate(loaded) if any(field in item for field in fields)]
        if not _has_pair(positions, items, pairs):
            continue
        reduced = [{key: loaded[i][key] for key in ("item_id", *fields) if key in loaded[i]} for i in positions]
        embedded = embed(model, reduced, collate, batch_size, name)
        metrics |= measure(name, embedded.embeddings, positions, items, pairs, labels)
        if name == "image" and embedded.visual_embeddings is not None:
            metrics |= measure("visual", embedded.visual_embeddings, positions, items, pairs, labels)
    return metrics


def measure(
    name: str,
    embeddings: Tensor,
    positions: Sequence[int],
    items: ItemTable,
    pairs: Pairs,
    labels: Sequence[Any] | None = None,
) -> dict[str, float]:
    """Metrics of the embeddings of the items at `positions`, each under `name/`."""
    result = rank_targets(embeddings, [items.item_ids[i] for i in positions], pairs)
    metrics = {f"{name}/recall@{k}": result.recall(k) for k in RECALL_AT}
    if labels is not None and len(positions) > NEIGHBOURS:
        chosen = [labels[i] for i in positions]
        metrics[f"{name}/precision@{NEIGHBOURS}"] = precision_at_k(embeddings, chosen, NEIGHBOURS)
    return metrics


def random_expectation(items: ItemTable, pairs: Pairs, labels: Sequence[Any] | None = None) -> dict[str, float]:
    """What a random ranking of all items reaches, with the number of queries and candidates beside it."""
    result = rank_targets(torch.zeros(len(items), 1), items.item_ids, pairs)
    metrics = {f"random/recall@{k}": result.expected_recall(k) for k in RECALL_AT}
    if labels is not None and len(items) > NEIGHBOURS:
        metrics[f"random/precision@{NEIGHBOURS}"] = expected_precision(labels)
    return metrics | {
        "queries": len(result.ranks),
        "candidates": result.pool_size,
        "pairs_of_other_items": result.unknown_pairs,
        "pairs_repeating_an_item": result.repeated_pairs,
    }


def _has_pair(positions: Sequence[int], items: ItemTable, pairs: Pairs) -> bool:
    ids = {items.item_ids[i] for i in positions}
    return any(query in ids and target in ids and query != target for query, target in pairs)
