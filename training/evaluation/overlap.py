"""Pairs that are measured on though a model was trained on them: such figures show what was memorised."""

import numpy as np
from transformers.utils import logging


logger = logging.get_logger(__name__)


def trained_share(pairs: np.ndarray, train_pairs: np.ndarray) -> float:
    """Share of some pairs that are train pairs, in either direction; says so where there is any.

    Args:
        pairs, train_pairs: (n, 2) and (m, 2) integer positions in one item table; a pair with -1 is none.
    """
    shared = np.isin(_keys(pairs), _keys(train_pairs[(train_pairs >= 0).all(1)]))
    if not shared.any():
        return 0.0
    logger.warning(
        f"{shared.mean():.1%} of the pairs to measure on ({shared.sum():,} of {len(pairs):,}) are train pairs: what is "
        "measured on them is memory. Take pairs that training does not see."
    )
    return float(shared.mean())


def _keys(pairs: np.ndarray) -> np.ndarray:
    """(n,) int64: one number for a pair and its reverse."""
    low, high = np.sort(pairs.astype(np.int64), axis=1).T
    return low << 32 | high


__all__ = ["trained_share"]
