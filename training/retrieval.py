"""Offline retrieval metrics: how high an item's known partner stands among all candidates.

Recall follows the published protocol of NoteLLM-2. Ranks are counted tile by tile, not sorted, so a pool of millions
needs no matrix of its size. Scores are computed in float64, and a candidate within `TIE` of the target counts as
standing before it: a model that gives every item the same embedding gets the last rank, not a lucky one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


TIE = 1e-10
"""Two dot products of unit vectors closer than this are the same score: far above float64's rounding in a sum of
thousands of terms, far below any difference that float32 embeddings can mean."""

TILE = 4096


@dataclass(frozen=True)
class RetrievalResult:
    """Ranks of the targets, and what the walk over the pairs kept.

    Attributes:
        ranks: (number of queries,) int64, 1 is best.
        pool_size: number of candidates.
        unknown_pairs: pairs skipped because a member has no embedding.
        repeated_pairs: pairs skipped because a member stood in an earlier kept pair, or because both are one item.
    """

    ranks: Tensor
    pool_size: int
    unknown_pairs: int
    repeated_pairs: int

    def recall(self, k: int) -> float:
        """Share of the queries whose target is among the first `k` candidates."""
        return (self.ranks <= k).sum().item() / len(self.ranks)

    def expected_recall(self, k: int) -> float:
        """`recall(k)` of a ranking drawn at random."""
        return min(k, self.pool_size) / self.pool_size


def rank_targets(
    embeddings: Tensor, item_ids: Sequence[str], pairs: Sequence[tuple[str, str]], tile: int = TILE
) -> RetrievalResult:
    """Rank each kept pair's second member among all items that are no query, by dot product with the first member.

    Args:
        embeddings: (n, d) floating point, row i belonging to `item_ids[i]`.
        item_ids: n different ids.
        pairs: (query id, target id), in the order in which they are walked.
        tile: queries and candidates handled at once.

    Raises:
        ValueError: when ids and rows differ in number or an id occurs twice, when an embedding is not finite, or when
            no pair can be used.
    """
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    if not len(row_of) == len(item_ids) == len(embeddings):
        raise ValueError(
            f"{len(embeddings)} embeddings need as many different ids; got {len(item_ids)}, {len(row_of)} different."
        )
    _require_finite(embeddings)

    kept: list[tuple[int, int]] = []
    seen: set[str] = set()
    unknown = repeated = 0
    for query_id, target_id in pairs:
        if query_id not in row_of or target_id not in row_of:
            unknown += 1
        elif query_id in seen or target_id in seen or query_id == target_id:
            repeated += 1
        else:
            seen.update((query_id, target_id))
            kept.append((row_of[query_id], row_of[target_id]))
    if not kept:
        raise ValueError(
            f"No pair can be evaluated: of {len(pairs)} pairs {unknown} name an item that has no embedding and "
            f"{repeated} an item of an earlier pair or one item twice. Does the pair table belong to the item table?"
        )

    queries, targets = torch.tensor(kept, device=embeddings.device).unbind(1)
    in_pool = torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
    in_pool[queries] = False
    pool = embeddings[in_pool]
    ranks = [
        _count_not_below(embeddings[q].double(), embeddings[t].double(), pool, tile)
        for q, t in zip(queries.split(tile), targets.split(tile), strict=True)
    ]
    return RetrievalResult(torch.cat(ranks).cpu(), len(pool), unknown, repeated)


def recall_at_k(
    embeddings: Tensor, item_ids: Sequence[str], pairs: Sequence[tuple[str, str]], ks: Sequence[int] = (1, 10, 100)
) -> dict[int, float]:
    """Recall at each of `ks` by the published protocol; see `rank_targets`."""
    result = rank_targets(embeddings, item_ids, pairs)
    return {k: result.recall(k) for k in ks}


def precision_at_k(embeddings: Tensor, labels: Sequence[object], k: int, tile: int = TILE) -> float:
    """Share of each item's `k` nearest other items (by dot product) that carry its label, averaged over the items.

    Where a tie crosses the k-th place, the candidates with another label are taken first.

    Args:
        embeddings: (n, d) floating point.
        labels: n hashable labels.

    Raises:
        ValueError: when labels and rows differ in number, when fewer than `k` other items exist, or when an embedding
            is not finite.
    """
    if len(labels) != len(embeddings):
        raise ValueError(f"{len(embeddings)} embeddings need as many labels; got {len(labels)}.")
    if not 0 < k < len(embeddings):
        raise ValueError(f"precision@{k} needs more than {k} items and a positive k; got {len(embeddings)} items.")
    _require_finite(embeddings)

    number_of = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    classes = torch.tensor([number_of[label] for label in labels], device=embeddings.device)
    vectors = embeddings.double()
    hits = 0
    for rows in torch.arange(len(vectors), device=vectors.device).split(max(1, tile // 4)):
        scores = vectors[rows] @ vectors.T
        scores[torch.arange(len(rows)), rows] = -torch.inf
        kth = scores.topk(k, dim=1).values[:, -1:]
        same = classes[rows, None] == classes
        above = scores > kth + TIE
        tied_others = ((scores >= kth - TIE) & ~above & ~same).sum(1)
        free_places = k - above.sum(1)
        hits += int((above & same).sum() + (free_places - tied_others).clamp(min=0).sum())
    return hits / (k * len(vectors))


def expected_precision(labels: Sequence[object]) -> float:
    """`precision_at_k` of a ranking drawn at random, for any k: the share of ordered pairs that carry one label."""
    counts: dict[object, int] = {}
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
    return sum(count * (count - 1) for count in counts.values()) / (len(labels) * (len(labels) - 1))


def _count_not_below(queries: Tensor, targets: Tensor, pool: Tensor, tile: int) -> Tensor:
    """1-based ranks: candidates (the target among them) whose score is not below the target's."""
    threshold = (queries * targets).sum(1, keepdim=True) - TIE
    ranks = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for candidates in pool.split(tile):
        ranks += (queries @ candidates.double().T >= threshold).sum(1)
    return ranks


def _require_finite(embeddings: Tensor) -> None:
    bad = (~embeddings.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(embeddings)} embeddings are not finite; the first is row {bad[0].item()}."
        )
