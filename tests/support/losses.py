"""Vectors, and the whole similarity matrix to hold losses against."""

import torch
import torch.nn.functional as F


def vectors(rows: int, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=1).requires_grad_()


def scale(value: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def partners(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = torch.arange(rows)
    return own.roll(rows // 2), own


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def masked_oracle(rows, columns, target, own, logit_scale, excluded) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole matrix, cross-entropy, and whether nothing that counts is as near as the target."""
    out = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    out[excluded] = True
    out[torch.arange(len(rows)), own] = True
    out[torch.arange(len(rows)), target] = False
    similarity = (rows @ columns.T * logit_scale.exp()).masked_fill(out, -torch.inf)
    others = similarity.scatter(1, target.unsqueeze(1), -torch.inf)
    hits = similarity.gather(1, target.unsqueeze(1)).squeeze(1) > others.amax(1)
    return F.cross_entropy(similarity, target, reduction="none"), hits
