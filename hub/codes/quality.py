"""What codes keep of vectors: how many are used, who shares them, what they reconstruct, which neighbours they find."""

from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np

from hub.codes.codebooks import Codebooks


NEIGHBOURS = 10
POOL = 20_000
"""Items among which neighbours are looked for."""
QUERIES = 1_000


@dataclass(frozen=True)
class Level:
    """What the codes up to a level say.

    Attributes:
        used: share of this level's codes that some item has.
        evenness: e to the entropy of this level's codes, divided by their number; 1 when all are as frequent.
        alone: share of items that share their codes up to here with no other.
        error: mean squared distance from the vectors to those decoded, divided by the one to their mean.
        recall: share of the ten nearest items that the decoded vectors find too.
    """

    used: float
    evenness: float
    alone: float
    error: float
    recall: float


def measure(codebooks: Codebooks, codes: np.ndarray, pool: np.ndarray) -> dict[str, Any]:
    """Figures of each level, and what they are of.

    Args:
        codes: of all items, `(n, levels)`.
        pool: vectors for error and recall, `(at most POOL, d)` float32, drawn at random; the first ones are the queries.
    """
    near = _nearest(pool)
    pool_codes = codebooks.encode(pool)
    levels = []
    for level in range(1, codebooks.levels + 1):
        counts = np.bincount(codes[:, level - 1], minlength=codebooks.centroids.shape[1])
        shares = counts[counts > 0] / len(codes)
        sizes = np.unique(codes[:, :level], axis=0, return_counts=True)[1]
        decoded = codebooks.decode(pool_codes[:, :level])
        shared = [len(set(ours) & set(exact)) for ours, exact in zip(_nearest(decoded), near, strict=True)]
        levels.append(
            Level(
                used=float((counts > 0).mean()),
                evenness=float(np.exp(-(shares * np.log(shares)).sum()) / len(counts)),
                alone=float((sizes == 1).sum() / len(codes)),
                error=_error(pool, decoded),
                recall=float(np.mean(shared) / near.shape[1]) if near.shape[1] else 1.0,
            )
        )
    return {
        "levels": [asdict(level) for level in levels],
        "items_of_error_and_recall": len(pool),
        "queries_of_recall": len(near),
    }


def _error(vectors: np.ndarray, decoded: np.ndarray) -> float:
    spread = ((vectors - vectors.mean(0, dtype=np.float64)) ** 2).sum()
    return float(((vectors - decoded.astype(np.float64)) ** 2).sum() / spread) if spread else 0.0


def _nearest(vectors: np.ndarray) -> np.ndarray:
    """Rows of the ten nearest others of the first vectors, by inner product."""
    most = min(NEIGHBOURS, len(vectors) - 1)
    queries = vectors[:QUERIES]
    _, rows = faiss.knn(queries, vectors, most + 1, metric=faiss.METRIC_INNER_PRODUCT)
    others = [row[row != own][:most] for own, row in enumerate(rows)]
    return np.array(others).reshape(len(queries), most)
