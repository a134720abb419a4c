"""The pair loss at scale: negatives of all processes, known positives left out, a similarity matrix never whole in memory.

The loss is that of `modeling_notellm2.contrastive_pair_loss`; with one process, no exclusions and no prefixes the two
agree. Here the log-sum-exp over a row is taken tile by tile, and the tiles are computed again for the gradients, as
Inf-CL does (arXiv 2410.17243). The joined batch's columns come by a gather with gradients, so that several processes
train as one process on all their items would.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils import ModelOutput

from training.trainer.distributed import (
    gather,
    gather_with_gradient,
    own_rows,
    row_counts,
    sum_over_processes,
    world_size,
)


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
        _check_inside(excluded, len(rows), len(columns))
        entries.append(excluded)
    # The target is added at the end, so here it is left out like the rest: what remains are the row's negatives.
    masked = torch.cat([r for r, _ in entries]), torch.cat([c for _, c in entries])
    masks = _TileMasks.of(masked, len(rows), len(columns), tile)
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


@dataclass
class PairLossOutput(ModelOutput):
    """Losses of the joined batch of all processes, the same values on each.

    Args:
        loss (`torch.FloatTensor`): scalar float32 to call `backward` on, see [`PairLoss`].
        multimodal_loss (`torch.FloatTensor`): scalar, detached; mean over all rows (and prefixes).
        visual_loss (`torch.FloatTensor`, *optional*): scalar, detached; mean over the rows of complete pairs.
        in_batch_recall (`torch.FloatTensor`): scalar, share of the rows whose partner is nearer than every negative, by
            the multimodal embedding at full width.
    """

    loss: Tensor
    multimodal_loss: Tensor | None = None
    visual_loss: Tensor | None = None
    in_batch_recall: Tensor | None = None


@dataclass(frozen=True)
class PairLoss:
    """The training loss: both members of every pair as queries, all other items of all processes as negatives.

    The value is the joined batch's. The gradients are this process's part times the number of processes, so that
    averaging parameter gradients over processes (DDP, FSDP and DeepSpeed do) gives those of one process on the joined
    batch.

    Args:
        multimodal_weight, visual_weight: of the two losses; their sum divides the total (paper, section 3.3).
        matryoshka_dims: widths of prefixes that must do as embeddings too, each normalised again; the loss is the mean
            over them and the full width (Matryoshka representation learning, arXiv 2205.13147).
        false_negatives: from the joined batch's item indices `(M,)` to the entries of its `(M, M)` matrix that must not count
            as negatives, e.g. known positives or copies of an item. `None`: all items but the row's own are negatives.
        tile, false_negative_margin: see `tiled_contrastive_loss`; each prefix and the visual loss by its own similarities.
    """

    multimodal_weight: float = 9.0
    visual_weight: float = 1.0
    matryoshka_dims: Sequence[int] = ()
    false_negatives: Callable[[Tensor], Entries] | None = None
    tile: int = TILE
    false_negative_margin: float | None = None

    def __call__(
        self,
        embeddings: Tensor,
        visual_embeddings: Tensor | None,
        has_image: Tensor,
        item_index: Tensor | None,
        num_pairs: int,
        logit_scale: Tensor,
    ) -> PairLossOutput:
        """
        Args:
            embeddings: `(n, d)` L2-normalised: first members of this process's pairs, second members in the same order,
                then any number of hard negatives, which are columns only.
            visual_embeddings: `(n, d)` or `None`; rows without an image are not read.
            has_image: `(n,)` bool.
            item_index: `(n,)` int64, for `false_negatives`; not read without it.
            num_pairs: this process's pairs.
            logit_scale: one element.

        Raises:
            ValueError: for fewer items than members, a prefix that is no part of the embedding, `false_negatives` without an
                item index, or entries outside the matrix.
        """
        batch = self._join(embeddings, has_image, item_index, num_pairs)
        parts = [embeddings] if visual_embeddings is None else [embeddings, visual_embeddings]
        joined = gather_with_gradient(torch.stack(parts, 1).float(), batch.counts)

        multimodal, hits = self._loss(joined[:, 0], batch.entries, logit_scale)
        sums, counts, weights = [multimodal], [batch.is_row.sum()], [self.multimodal_weight]
        if visual_embeddings is not None:
            shown = batch.has_visual
            sums.append(self._loss(joined[shown, 1], batch.entries.among(shown), logit_scale)[0])
            counts.append((batch.is_row & shown).sum())
            weights.append(self.visual_weight)
        shares = [sum_ / count.clamp(min=1) for sum_, count in zip(sums, counts, strict=True)]
        total = sum((weight * share for weight, share in zip(weights, shares, strict=True)), multimodal.new_zeros(()))
        total = total / sum(weights)

        values = sum_over_processes(torch.stack([*shares, total, hits.sum() / counts[0].clamp(min=1)]))
        return PairLossOutput(
            # The joined value, with the gradient of this process's part.
            loss=values[-2] + world_size() * (total - total.detach()),
            multimodal_loss=values[0],
            visual_loss=values[1] if visual_embeddings is not None else None,
            in_batch_recall=values[-1],
        )

    def _join(self, embeddings: Tensor, has_image: Tensor, item_index: Tensor | None, num_pairs: int) -> "_JoinedBatch":
        """What all processes must know of each other's items before the embeddings are compared."""
        n, device = len(embeddings), embeddings.device
        rows = 2 * num_pairs
        if not 0 <= rows <= n:
            raise ValueError(f"{num_pairs} pairs have {rows} members, but the batch has {n} items.")
        if self.false_negatives is not None and item_index is None:
            raise ValueError(
                "PairLoss with false_negatives needs item_index, the position of each item in the item table."
            )
        # Both members need an image for the visual loss; a hard negative stands alone.
        has_visual = has_image.to(device, torch.bool).clone()
        has_visual[:rows] = (has_visual[:num_pairs] & has_visual[num_pairs:rows]).repeat(2)
        is_row = torch.arange(n, device=device) < rows
        counts = row_counts(n, device)
        is_row, has_visual = gather(torch.stack([is_row, has_visual], 1), counts).unbind(1)

        here = own_rows(counts)
        own = torch.arange(here.start, here.start + rows, device=device)
        excluded = None
        if self.false_negatives is not None and item_index is not None:
            row, column = self.false_negatives(gather(item_index.to(device), counts))
            _check_inside((row, column), sum(counts), sum(counts))
            mine = (row >= here.start) & (row < here.start + rows)
            excluded = row[mine] - here.start, column[mine]
        return _JoinedBatch(counts, is_row, has_visual, _RowEntries(own, own.roll(num_pairs), excluded))

    def _loss(self, joined: Tensor, entries: "_RowEntries", logit_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over this process's rows, mean over full width and prefixes; `(m,)` hits at full width."""
        width = joined.shape[1]
        wrong = [dim for dim in self.matryoshka_dims if not 0 < dim < width]
        if wrong:
            raise ValueError(f"matryoshka_dims must be above 0 and below the embedding's {width}; got {wrong}.")
        sums, hits = [], []
        for columns in [joined, *(F.normalize(joined[:, :dim], dim=1) for dim in self.matryoshka_dims)]:
            losses, hit = tiled_contrastive_loss(
                columns.index_select(0, entries.own),
                columns,
                entries.target,
                entries.own,
                logit_scale,
                entries.excluded,
                self.tile,
                self.false_negative_margin,
            )
            sums.append(losses.sum())
            hits.append(hit)
        return torch.stack(sums).mean(), hits[0]


@dataclass(frozen=True)
class _RowEntries:
    """This process's rows: `own` and `target` columns `(m,)` each, and `excluded` entries by row number and column."""

    own: Tensor
    target: Tensor
    excluded: Entries | None

    def among(self, remaining: Tensor) -> "_RowEntries":
        """The same with only the kept `(M,)` columns, numbered anew, and without the rows that are not among them."""
        column = remaining.cumsum(0) - 1
        staying = remaining[self.own]
        row = staying.cumsum(0) - 1
        excluded = None
        if self.excluded is not None:
            rows, columns = self.excluded
            both = staying[rows] & remaining[columns]
            excluded = row[rows[both]], column[columns[both]]
        return _RowEntries(column[self.own[staying]], column[self.target[staying]], excluded)


@dataclass(frozen=True)
class _JoinedBatch:
    """Items of all processes in rank order: items of each process, `(M,)` which are rows, which have a visual part."""

    counts: list[int]
    is_row: Tensor
    has_visual: Tensor
    entries: _RowEntries


def _check_inside(entries: Entries, high: int, wide: int) -> None:
    """Entries outside would fall into no tile, or into a wrong one."""
    for name, places, end in zip(("row", "column"), entries, (high, wide), strict=True):
        outside = (places < 0) | (places >= end)
        if outside.any():
            raise ValueError(f"An excluded entry has {name} {places[outside][0].item()}; there are {end} {name}s.")
