"""What a content model is measured against on a log: popularity and item-to-item collaborative filtering.

All are embeddings whose dot product is the score, so that `training.evaluation.retrieval` ranks them by the protocol of the
model. They are dense, of one dimension a user: for logs of up to some thousands of users and items.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.evaluation.embed import RECALL_AT
from training.evaluation.retrieval import rank_targets


def log_embeddings(interactions: Sequence[tuple[str, str]], item_ids: Sequence[str]) -> dict[str, Tensor]:
    """Embeddings of items by what is known from a log, the train side of a split.

    Args:
        interactions: (user id, item id); repeated ones count once, those of other items not at all.
        item_ids: n different ids; items without interactions are scored 0 by all but popularity, and lose every tie.

    Returns:
        Name to (n, d) float64:
        "popularity": d = 1; ranks by the number of users whatever the query.
        "co-occurrence": d = users; the dot product is the sum over common users of 1/N_u, NoteLLM's score without window
        and order.
        "item cosine": the same of unit length, the score of item-based filtering (Sarwar et al. 2001), users weighted.

    Raises:
        ValueError: when no interaction is with one of the items.
    """
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    known = {(user, row_of[item]) for user, item in interactions if item in row_of}
    if not known:
        raise ValueError(f"None of {len(interactions)} interactions is with one of the {len(item_ids)} items.")
    column_of = {user: column for column, user in enumerate(sorted({user for user, _ in known}))}
    consumed = torch.zeros(len(item_ids), len(column_of), dtype=torch.float64)
    rows, columns = zip(*((row, column_of[user]) for user, row in known), strict=True)
    consumed[list(rows), list(columns)] = 1
    weighted = consumed / consumed.sum(0).sqrt()
    return {
        "popularity": consumed.sum(1, keepdim=True) + 1,  # above 0, so that the query's own number changes no order
        "co-occurrence": weighted,
        "item cosine": F.normalize(weighted, dim=1),
    }


def measure_embeddings(
    embeddings: Mapping[str, Tensor], item_ids: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, float]]:
    """Recall of each by name, and of a random ranking with the numbers of queries and candidates.

    Args:
        embeddings: name to (n, d).
        item_ids: n different ids.
        pairs: (query id, target id), in the order in which the protocol walks them.

    Raises:
        ValueError: when no pair can be used; see `rank_targets`.
    """
    results = {name: rank_targets(vectors, item_ids, pairs) for name, vectors in embeddings.items()}
    first = next(iter(results.values()))
    random = {f"recall@{k}": first.expected_recall(k) for k in RECALL_AT}
    report: dict[str, dict[str, float]] = {
        "random": {**random, "queries": len(first.ranks), "candidates": first.pool_size}
    }
    return report | {name: {f"recall@{k}": result.recall(k) for k in RECALL_AT} for name, result in results.items()}
