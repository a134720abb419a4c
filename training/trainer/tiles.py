"""InfoNCE over a similarity matrix that is never whole in memory.

The log-sum-exp over a row is taken tile by tile, and the tiles are computed again for the gradients, as Inf-CL does
(arXiv 2410.17243). Entries that are no negatives are left out, by place or by their similarity.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


TILE = 4096
"""Rows and columns of a tile: 64 MB in float32; smaller ones are slower."""

Entries = tuple[Tensor, Tensor]
"""Entries of a matrix, as two int64 tensors of the same length: their rows and their columns."""


def tiled_contrastive_loss(
    rows: Tensor,
    columns: Tensor,
    target: Tensor,
    own: Tensor,
    logit_scale: Tensor,
    excluded: Entries | None = None,
    tile: int = TILE,
    false_negative_margin: float | None = None,
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each row (NoteLLM-2 paper, equation 2): `-log softmax(exp(logit_scale) * rows @ columns.T)` at its target.

    Args:
        rows: `(m, d)`, floating; L2-normalised for cosine similarities. Computed in float32 (float64 stays).
        columns: `(M, d)`, likewise.
        target: `(m,)` int64, the column of each row's partner.
        own: `(m,)` int64, the column that is the row itself, which is left out of its softmax.
        logit_scale: one element, logarithm of the factor on the similarities.
        excluded: further entries to leave out, in any order and any number of times. A row's target always stays.
        tile: rows and columns handled at once; memory beyond inputs and gradients is one tile.
        false_negative_margin: columns whose similarity is above the target's by more than this are left out too (GISTEmbed,
            arXiv 2402.16829, with the model as its own guide; Qwen3-Embedding, arXiv 2506.05176, equation 2, with 0.1). What is
            left out is found anew in every call and has no gradient. `None`: nothing.

    Returns:
        losses: `(m,)` float32 (float64), with gradients for `rows`, `columns` and `logit_scale`, once differentiable.
        hits: `(m,)` bool, whether the target's similarity is above that of every other column that is not `excluded`;
            those left out by the margin are misses.

    Raises:
        ValueError: for an excluded entry outside the matrix.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    entries = [(torch.arange(len(rows), device=rows.device), place) for place in (own, target)]
    if excluded is not None:
        check_inside(excluded, len(rows), len(columns))
        entries.append(excluded)
    # The target is added at the end, so here it is left out like the rest: what remains are the row's negatives.
    masks = _TileMasks.of(all_entries(entries), len(rows), len(columns), tile)
    margin = torch.inf if false_negative_margin is None else false_negative_margin
    return _TiledContrastiveLoss.apply(rows.to(dtype), columns.to(dtype), logit_scale.to(dtype), target, masks, margin)


@dataclass(frozen=True)
class _TileMasks:
    """Masked entries sorted by tile: those of tile `k` (row by row of tiles) are `bounds[k]` to `bounds[k + 1]`."""

    rows: Tensor
    columns: Tensor
    bounds: list[int]
    size: int

    @classmethod
    def of(cls, masked: Entries, m: int, n: int, size: int) -> "_TileMasks":
        wide, high = -(-n // size), -(-m // size)
        tile = masked[0] // size * wide + masked[1] // size
        counts = torch.bincount(tile, minlength=wide * high)
        order = tile.argsort()
        bounds = [0, *counts.cumsum(0).tolist()]
        return cls(masked[0][order] % size, masked[1][order] % size, bounds, size)

    def logits(self, rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """`rows @ columns.T` tile by tile, -inf at the masked entries: the two ranges and a buffer that may be spoilt."""
        buffer = rows.new_empty(min(self.size, len(rows)) * min(self.size, len(columns)))
        number = 0
        for top in range(0, len(rows), self.size):
            for left in range(0, len(columns), self.size):
                r, c = slice(top, top + self.size), slice(left, left + self.size)
                high, wide = len(rows[r]), len(columns[c])
                logits = torch.mm(rows[r], columns[c].T, out=buffer[: high * wide].view(high, wide))
                mine = slice(self.bounds[number], self.bounds[number + 1])
                logits[self.rows[mine], self.columns[mine]] = -torch.inf
                number += 1
                yield r, c, logits


class _TiledContrastiveLoss(torch.autograd.Function):
    """With negatives' log-sum-exp `n` and target's logit `t` a row's loss is `softplus(n - t)`, a hit `t > max`."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, columns: Tensor, logit_scale: Tensor, target: Tensor, masks: _TileMasks, margin: float
    ):
        with torch.autocast(rows.device.type, enabled=False):
            scaled = rows * logit_scale.exp()
            negatives = rows.new_full((len(rows),), -torch.inf)
            best = negatives.clone()
            at_target = torch.linalg.vecdot(scaled, columns[target])
            ceiling = at_target + margin * logit_scale.exp()
            for r, _, logits in masks.logits(scaled, columns):
                highest = logits.amax(1)
                torch.maximum(best[r], highest, out=best[r])
                if margin < torch.inf:
                    highest = _leave_out_above(ceiling[r], logits).amax(1)
                shift = highest.clamp(min=torch.finfo(rows.dtype).min)  # finite where all of a row is masked
                part = logits.sub_(shift.unsqueeze(1)).exp_().sum(1).log_() + shift
                negatives[r] = torch.logaddexp(negatives[r], part)
            losses, hits = F.softplus(negatives - at_target), at_target > best
        ctx.save_for_backward(rows, columns, logit_scale, target, at_target + losses, losses, ceiling)
        ctx.margin = margin
        ctx.masks = masks
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _):
        rows, columns, logit_scale, target, normaliser, losses, ceiling = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            scale = logit_scale.exp()
            scaled = rows * scale
            grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(columns)
            for r, c, logits in ctx.masks.logits(scaled, columns):
                if ctx.margin < torch.inf:
                    _leave_out_above(ceiling[r], logits)
                pull = logits.sub_(normaliser[r].unsqueeze(1)).exp_().mul_(gradient[r].unsqueeze(1))
                grad_rows[r].addmm_(pull, columns[c])
                grad_columns[c].addmm_(pull.T, scaled[r])
            # The target's probability minus one, exact also where it is nearly one.
            pull = (gradient * torch.expm1(-losses)).unsqueeze(1)
            grad_rows.addcmul_(pull, columns[target]).mul_(scale)
            grad_columns.index_add_(0, target, pull * scaled)
            # A logit's derivative by the logarithm of its factor is the logit; summed, that is rows times gradients.
            grad_scale = (rows * grad_rows).sum().view_as(logit_scale)
        return grad_rows, grad_columns, grad_scale, None, None, None


def _leave_out_above(ceiling: Tensor, logits: Tensor) -> Tensor:
    """Write -inf where a row of `logits` is above its `ceiling`, in place."""
    return logits.masked_fill_(logits > ceiling.unsqueeze(1), -torch.inf)


def all_entries(parts: Sequence[Entries]) -> Entries:
    """Several entries as one."""
    return torch.cat([rows for rows, _ in parts]), torch.cat([columns for _, columns in parts])


def check_inside(entries: Entries, high: int, wide: int) -> None:
    """Entries outside would fall into no tile, or into a wrong one."""
    for name, places, end in zip(("row", "column"), entries, (high, wide), strict=True):
        outside = (places < 0) | (places >= end)
        if outside.any():
            raise ValueError(f"An excluded entry has {name} {places[outside][0].item()}; there are {end} {name}s.")
