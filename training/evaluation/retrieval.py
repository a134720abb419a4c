"""How high an item's known partners stand among all candidates: exact ranks, counted and never sorted.

Two protocols. The published one of NoteLLM-2 gives each query one target and takes the queries out of the pool
(`rank_targets`); the multi-positive one gives each query all its known targets among all other items
(`rank_all_targets`).

Ties count against the model: a candidate within `TIE` of the target stands before it, so a model that gives every item
the same embedding gets the last rank, not a lucky one. On a catalogue with repeated texts, counting only the strictly
better candidates showed R@1 0.39 where counting ties showed 0.03.

Ranks are exact in float64 at nearly the speed of float32: a tile of scores is computed in float32, whose rounding has a
bound; only rows where a candidate lies within that bound of the target are computed again, in float64. Tiles fit the
processor's cache, and memory beyond the embeddings is that of some tiles.
"""

from collections.abc import Collection, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


TIE = 1e-10
"""Two dot products of unit vectors closer than this are the same score: far above float64's rounding in a sum of
thousands of terms, far below any difference that float32 embeddings can mean."""

TILE = 1024
"""Candidates of a tile. With `ROWS` queries a tile of float32 scores is 1 MB: two of them stay in a core's cache."""
ROWS = 256
BLOCK = 8192
"""Most queries for which the pool is read once."""
SCORES = 2**24
"""Float64 scores held at once where whole rows are needed (128 MB)."""


@dataclass(frozen=True)
class RetrievalResult:
    """Ranks of the targets by the published protocol, and what the walk over the pairs kept.

    Attributes:
        ranks: (number of queries,) int64, 1 is best.
        pool_size: number of candidates.
        unknown_pairs: pairs skipped because a member has no embedding.
        repeated_pairs: pairs skipped because a member stood in an earlier kept pair, or because both are one item.
        queries, targets: (number of queries,) int64 rows of the embeddings.
    """

    ranks: Tensor
    pool_size: int
    unknown_pairs: int
    repeated_pairs: int
    queries: Tensor
    targets: Tensor

    def recall(self, k: int) -> float:
        """Share of the queries whose target is among the first `k` candidates."""
        return (self.ranks <= k).sum().item() / len(self.ranks)

    def expected_recall(self, k: int) -> float:
        """`recall(k)` of a ranking drawn at random."""
        return min(k, self.pool_size) / self.pool_size


@dataclass(frozen=True)
class MultiPositiveResult:
    """Ranks of all known targets of each query among all items but the query.

    Attributes:
        ranks: (m,) int64, 1 is best; the targets of one query have different ranks. Where a target ties with other
            candidates, these stand before it.
        query_of: (m,) int64 number of the rank's query, 0 .. n - 1, ascending.
        queries: (n,) int64 rows of the embeddings, in the order of the pairs.
        targets: (m,) int64 rows of the embeddings.
        pool_size: candidates of each query.
        unknown_pairs: pairs skipped because a member has no embedding.
        repeated_pairs: pairs skipped because they stood earlier, or because both members are one item.
    """

    ranks: Tensor
    query_of: Tensor
    queries: Tensor
    targets: Tensor
    pool_size: int
    unknown_pairs: int
    repeated_pairs: int


def rank_targets(
    embeddings: Tensor, item_ids: Sequence[Hashable], pairs: Iterable[Sequence[Any]], tile: int = TILE
) -> RetrievalResult:
    """Rank each kept pair's second member among all items that are no query, by dot product with the first member.

    Args:
        embeddings: (n, d) floating point, row i belonging to `item_ids[i]`.
        item_ids: n different ids, or positions in the item table.
        pairs: query and target, ids or positions as `item_ids`, in the order in which they are walked.
        tile: candidates handled at once.

    Raises:
        ValueError: when ids and rows differ in number or an id occurs twice, when an embedding is not finite, or when
            no pair can be used.
    """
    row_of = _rows_by_id(embeddings, item_ids)
    usable: list[tuple[int, int]] = []
    seen: set[Hashable] = set()
    unknown = repeated = 0
    for query_id, target_id in pairs:
        if query_id not in row_of or target_id not in row_of:
            unknown += 1
        elif query_id in seen or target_id in seen or query_id == target_id:
            repeated += 1
        else:
            seen.update((query_id, target_id))
            usable.append((row_of[query_id], row_of[target_id]))
    _require_pairs(usable, unknown, repeated)

    queries, targets = torch.tensor(usable, device=embeddings.device).unbind(1)
    in_pool = torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
    in_pool[queries] = False
    pool = embeddings[in_pool]
    ranks = _count_not_below(embeddings, queries, targets, pool, tile)
    return RetrievalResult(ranks.cpu(), len(pool), unknown, repeated, queries.cpu(), targets.cpu())


def rank_all_targets(
    embeddings: Tensor, item_ids: Sequence[Hashable], pairs: Iterable[Sequence[Any]], tile: int = TILE
) -> MultiPositiveResult:
    """Rank all second members that each first member has in the pairs, among all items but the first member.

    Args, Raises: as `rank_targets`; the order of the pairs doesn't matter.
    """
    row_of = _rows_by_id(embeddings, item_ids)
    usable: dict[tuple[int, int], None] = {}
    unknown = repeated = 0
    for query_id, target_id in pairs:
        query, target = row_of.get(query_id), row_of.get(target_id)
        if query is None or target is None:
            unknown += 1
        elif query == target or (query, target) in usable:
            repeated += 1
        else:
            usable[query, target] = None
    _require_pairs(usable, unknown, repeated)

    number_of: dict[int, int] = {}
    query_of = torch.tensor([number_of.setdefault(query, len(number_of)) for query, _ in usable])
    queries, targets = torch.tensor(list(usable), device=embeddings.device).unbind(1)
    scores = _scores(embeddings, queries, targets)
    by_score = scores.argsort(descending=True, stable=True).cpu()
    order = by_score[query_of[by_score].argsort(stable=True)]  # by query, nearest target first
    query_of, order = query_of[order], order.to(embeddings.device)
    queries, targets, scores = queries[order], targets[order], scores[order]

    ranks = _count_not_below(embeddings, queries, targets, embeddings, tile)
    ranks -= (_scores(embeddings, queries, queries) >= scores - TIE).long()  # the query is no candidate
    ranks -= _later_ties(query_of.to(scores.device), scores)  # of tied targets, the first is before the others
    rows = torch.tensor(list(number_of))
    return MultiPositiveResult(ranks.cpu(), query_of, rows, targets.cpu(), len(embeddings) - 1, unknown, repeated)


def recall_at_k(
    embeddings: Tensor, item_ids: Sequence[str], pairs: Sequence[tuple[str, str]], ks: Sequence[int] = (1, 10, 100)
) -> dict[int, float]:
    """Recall at each of `ks` by the published protocol; see `rank_targets`."""
    result = rank_targets(embeddings, item_ids, pairs)
    return {k: result.recall(k) for k in ks}


def precision_at_k(embeddings: Tensor, labels: Sequence[object], k: int) -> float:
    """`precisions_at_k` averaged over the labelled items."""
    return precisions_at_k(embeddings, labels, k).mean().item()


def precisions_at_k(embeddings: Tensor, labels: Sequence[object], k: int) -> Tensor:
    """Share of each labelled item's `k` nearest other items (by dot product) that carry its label.

    An item without a label (see `has_label`) asks nothing and answers nobody, yet takes its place among the nearest.
    Where a tie crosses the k-th place, the candidates with another label are taken first.

    Args:
        embeddings: (n, d) floating point.
        labels: n hashable labels.

    Returns:
        (m,) float64, one for each labelled item, in their order.

    Raises:
        ValueError: when labels and rows differ in number, when fewer than `k` other items or no label exist, or when an
            embedding is not finite.
    """
    if len(labels) != len(embeddings):
        raise ValueError(f"{len(embeddings)} embeddings need as many labels; got {len(labels)}.")
    if not 0 < k < len(embeddings):
        raise ValueError(f"precision@{k} needs more than {k} items and a positive k; got {len(embeddings)} items.")
    _require_finite(embeddings)

    classes = _classes(labels).to(embeddings.device)
    vectors = embeddings.double()
    hits = []
    for rows in (classes >= 0).nonzero().flatten().split(max(1, SCORES // len(vectors))):
        scores = vectors[rows] @ vectors.T
        scores[torch.arange(len(rows)), rows] = -torch.inf
        kth = scores.topk(k, dim=1).values[:, -1:]
        same = classes[rows, None] == classes
        above = scores > kth + TIE
        tied_others = ((scores >= kth - TIE) & ~above & ~same).sum(1)
        free_places = k - above.sum(1)
        hits.append((above & same).sum(1) + (free_places - tied_others).clamp(min=0))
    return torch.cat(hits).cpu().double() / k


def has_label(label: object) -> bool:
    """Whether an item's label says anything: None, NaN and blank text don't."""
    return not (label is None or label != label or (isinstance(label, str) and not label.strip()))


def _classes(labels: Sequence[object]) -> Tensor:
    """(n,) int64 number of each label, -1 for a missing one.

    Raises:
        ValueError: when all are missing.
    """
    number_of: dict[object, int] = {}
    classes = [number_of.setdefault(label, len(number_of)) if has_label(label) else -1 for label in labels]
    if not number_of:
        raise ValueError(f"None of {len(labels)} items has a label.")
    return torch.tensor(classes)


def nearest(embeddings: Tensor, queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` nearest candidates of some queries, a query itself left out, nearest first.

    Args:
        embeddings: (n, d) floating point.
        queries: (q,) int64 rows.
        candidates: (m,) int64 rows, more than `k`.

    Returns:
        (q, k) float64 scores and (q, k) int64 rows.
    """
    best = torch.empty(len(queries), 0, dtype=torch.float64)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    vectors = embeddings[queries].double()
    for some in candidates.split(max(1, SCORES // max(1, len(queries)))):
        scores = vectors @ embeddings[some].double().T
        scores[queries[:, None] == some] = -torch.inf
        best, rows = torch.cat([best, scores], 1), torch.cat([rows, some.expand(len(queries), -1)], 1)
        best, places = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, places)
    return best, rows


def expected_precision(labels: Sequence[object]) -> float:
    """`precision_at_k` of a ranking drawn at random, for any k: the share of other items that carry an item's label.

    Raises:
        ValueError: when no item has a label.
    """
    classes = _classes(labels)
    counts = classes[classes >= 0].bincount()
    return (counts * (counts - 1)).sum().item() / (counts.sum().item() * (len(labels) - 1))


def _count_not_below(embeddings: Tensor, queries: Tensor, targets: Tensor, pool: Tensor, tile: int) -> Tensor:
    """1-based ranks: candidates (the target among them) whose score is not below the target's, for rows of embeddings.

    A thread for each of torch's, with a block of queries each: threads that share every small operation would spend
    their time waiting for each other.
    """
    largest = max(part.double().norm(dim=1).max().item() for part in pool.split(BLOCK))
    threads = torch.get_num_threads()
    block = min(BLOCK, -(-len(queries) // threads))

    def count(rows: tuple[Tensor, Tensor]) -> Tensor:
        query, target = rows
        return _count_block(embeddings[query], _scores(embeddings, query, target) - TIE, pool, largest, tile)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            return torch.cat(list(executor.map(count, zip(queries.split(block), targets.split(block), strict=True))))
    finally:
        torch.set_num_threads(threads)  # threads to come start with the number that was set last


def _count_block(queries: Tensor, threshold: Tensor, pool: Tensor, largest: float, tile: int) -> Tensor:
    """How many candidates reach each query's threshold (float64); `largest` is the longest candidate's length."""
    exact = queries.double()
    low, high = _certain(exact, threshold, largest)
    # TF32 or bfloat16 multiplications, where somebody has allowed them, don't keep float32's bound.
    fast_type = torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
    fast, low, high = queries.to(fast_type), low.to(fast_type), high.to(fast_type)
    ranks = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    above, not_below = torch.empty(2, len(queries), dtype=fast_type, device=queries.device)
    memory = torch.empty(2, min(ROWS, len(queries)) * min(tile, len(pool)), dtype=fast_type, device=queries.device)
    parts = [slice(start, min(start + ROWS, len(queries))) for start in range(0, len(queries), ROWS)]
    for candidates in pool.split(tile):
        columns = candidates.to(fast_type).T
        for rows in parts:
            shape = (rows.stop - rows.start, len(candidates))
            scores, flags = (part[: shape[0] * shape[1]].view(shape) for part in memory)
            torch.mm(fast[rows], columns, out=scores)
            torch.sum(torch.gt(scores, high[rows], out=flags), 1, out=above[rows])
            torch.sum(torch.ge(scores, low[rows], out=flags), 1, out=not_below[rows])
        ranks += above.long()
        unsure = (above != not_below).nonzero().flatten()
        if len(unsure):
            again = exact[unsure] @ candidates.double().T >= threshold[unsure, None]
            ranks[unsure] += again.sum(1) - above[unsure].long()
    return ranks


def _certain(queries: Tensor, threshold: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """(n, 1) float32: a float32 score below the first is below the threshold, one above the second is above it.

    A sum of d float32 products is off by at most d u |q| |c| (u = 2^-24), in whatever order it is taken; four u more
    cover the rounding of the vectors themselves, and one step of float32 that of the two bounds.
    """
    rounding = (queries.shape[1] + 4) * 2.0**-24
    margin = rounding / (1 - rounding) * queries.norm(dim=1) * largest
    infinity = torch.tensor(torch.inf, device=queries.device)
    low = torch.nextafter((threshold - margin).float(), -infinity)
    high = torch.nextafter((threshold + margin).float(), infinity)
    return low[:, None], high[:, None]


def _scores(embeddings: Tensor, some: Tensor, others: Tensor) -> Tensor:
    """(n,) float64 dot products of rows with rows, a block at a time."""
    return torch.cat(
        [
            (embeddings[a].double() * embeddings[b].double()).sum(1)
            for a, b in zip(some.split(BLOCK), others.split(BLOCK), strict=True)
        ]
    )


def _later_ties(groups: Tensor, scores: Tensor) -> Tensor:
    """How many scores after each one, in its group, tie with it; groups are contiguous, scores descending in each."""
    ties = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    for step in range(1, len(scores)):
        tied = (groups[step:] == groups[:-step]) & (scores[step:] >= scores[:-step] - TIE)
        if not tied.any():
            break
        ties[:-step] += tied
    return ties


def _rows_by_id(embeddings: Tensor, item_ids: Sequence[Hashable]) -> dict[Hashable, int]:
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    if not len(row_of) == len(item_ids) == len(embeddings):
        raise ValueError(
            f"{len(embeddings)} embeddings need as many different ids; got {len(item_ids)}, {len(row_of)} different."
        )
    _require_finite(embeddings)
    return row_of


def _require_pairs(usable: Collection[object], unknown: int, repeated: int) -> None:
    if not usable:
        raise ValueError(
            f"No pair can be evaluated: of {unknown + repeated} pairs {unknown} name an item that has no embedding and "
            f"{repeated} an item of an earlier pair or one item twice. Does the pair table belong to the item table?"
        )


def _require_finite(embeddings: Tensor) -> None:
    bad = (~embeddings.isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(embeddings)} embeddings are not finite; the first is row {bad[0].item()}."
        )
