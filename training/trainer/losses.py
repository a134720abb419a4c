"""The pair loss at scale: negatives of all processes, known positives left out, a similarity matrix never whole in memory.

The loss is that of `modeling_notellm2.contrastive_pair_loss`; with one process, no exclusions and no prefixes the two
agree. Here it is computed in tiles (`tiles.py`). The joined batch's columns come by a gather with gradients, so that several
processes train as one process on all their items would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from training.trainer.distributed import (
    gather,
    gather_with_gradient,
    own_rows,
    row_counts,
    sum_over_processes,
    world_size,
)
from training.trainer.tiles import TILE, Entries, all_entries, check_inside, tiled_contrastive_loss


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
        positives: from the same indices to entries that are positives beside a row's partner, each against the row's negatives
            alone. Unlike supervised contrastive learning (arXiv 2004.11362, equation 2) no other positive is in a denominator,
            as SINCERE has it (arXiv 2309.14277). A row's loss is the mean over its positives. `None`: the partner is the one.
        tile, false_negative_margin: see `tiled_contrastive_loss`; each prefix and the visual loss by its own similarities.
    """

    multimodal_weight: float = 9.0
    visual_weight: float = 1.0
    matryoshka_dims: Sequence[int] = ()
    false_negatives: Callable[[Tensor], Entries] | None = None
    positives: Callable[[Tensor], Entries] | None = None
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
        pair_weight: Tensor | None = None,
    ) -> PairLossOutput:
        """
        Args:
            embeddings: `(n, d)` L2-normalised: first members of this process's pairs, second members in the same order,
                then any number of hard negatives, which are columns only.
            visual_embeddings: `(n, d)` or `None`; rows without an image are not read.
            has_image: `(n,)` bool.
            item_index: `(n,)` int64, for `false_negatives` and `positives`; not read without them.
            num_pairs: this process's pairs.
            logit_scale: one element.
            pair_weight: `(num_pairs,)` floating, not negative: each loss is the weighted mean over its rows, both members of a
                pair by the pair's weight. `None`: the mean.

        Raises:
            ValueError: for fewer items than members, a prefix that is no part of the embedding, `false_negatives` or
                `positives` without an item index, or entries outside the matrix.
        """
        batch = self._join(embeddings, has_image, item_index, num_pairs, pair_weight)
        parts = [embeddings] if visual_embeddings is None else [embeddings, visual_embeddings]
        joined = gather_with_gradient(torch.stack(parts, 1).float(), batch.counts)

        multimodal, hits = self._loss(joined[:, 0], batch.entries, logit_scale)
        sums, counts, weights = [multimodal], [batch.weight.sum()], [self.multimodal_weight]
        if visual_embeddings is not None:
            shown = batch.has_visual
            sums.append(self._loss(joined[shown, 1], batch.entries.among(shown), logit_scale)[0])
            counts.append(batch.weight[shown].sum())
            weights.append(self.visual_weight)
        # Where nothing counts, the sum is 0 and stays so.
        shares = [sum_ / torch.where(count > 0, count, 1) for sum_, count in zip(sums, counts, strict=True)]
        total = sum((weight * share for weight, share in zip(weights, shares, strict=True)), multimodal.new_zeros(()))
        total = total / sum(weights)

        values = sum_over_processes(torch.stack([*shares, total, hits.sum() / batch.is_row.sum().clamp(min=1)]))
        return PairLossOutput(
            # The joined value, with the gradient of this process's part.
            loss=values[-2] + world_size() * (total - total.detach()),
            multimodal_loss=values[0],
            visual_loss=values[1] if visual_embeddings is not None else None,
            in_batch_recall=values[-1],
        )

    def _join(
        self,
        embeddings: Tensor,
        has_image: Tensor,
        item_index: Tensor | None,
        num_pairs: int,
        pair_weight: Tensor | None,
    ) -> "_JoinedBatch":
        """What all processes must know of each other's items before the embeddings are compared."""
        n, device = len(embeddings), embeddings.device
        rows = 2 * num_pairs
        if not 0 <= rows <= n:
            raise ValueError(f"{num_pairs} pairs have {rows} members, but the batch has {n} items.")
        if item_index is None and (self.false_negatives is not None or self.positives is not None):
            raise ValueError(
                "PairLoss with false_negatives or positives needs item_index, the position of each item in the item table."
            )
        # Both members need an image for the visual loss; a hard negative stands alone.
        has_visual = has_image.to(device, torch.bool).clone()
        has_visual[:rows] = (has_visual[:num_pairs] & has_visual[num_pairs:rows]).repeat(2)
        is_row = torch.arange(n, device=device) < rows
        weight = is_row.float()
        if pair_weight is not None:
            weight[:rows] = pair_weight.to(weight).repeat(2)
        counts = row_counts(n, device)
        of_items = gather(torch.stack([is_row.float(), has_visual.float(), weight], 1), counts)
        is_row, has_visual, joined_weight = of_items[:, 0].bool(), of_items[:, 1].bool(), of_items[:, 2]

        here = own_rows(counts)
        own = torch.arange(here.start, here.start + rows, device=device)
        joined_index = None if item_index is None else gather(item_index.to(device), counts)
        excluded, positives = (
            None
            if entries is None or joined_index is None
            else _of_rows(entries(joined_index), slice(here.start, here.start + rows), sum(counts))
            for entries in (self.false_negatives, self.positives)
        )
        mine = _RowEntries.of(own, own.roll(num_pairs), weight[:rows], excluded, positives)
        return _JoinedBatch(counts, is_row, has_visual, joined_weight, mine)

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
            sums.append((losses * entries.weight).sum())
            hits.append(hit[: entries.with_partner])
        return torch.stack(sums).mean(), hits[0]


@dataclass(frozen=True)
class _RowEntries:
    """This process's rows, each with its partner, and behind them the same rows again with each further positive.

    Attributes:
        own, target: `(m,)` int64 columns: the row itself, and its positive.
        row: `(m,)` int64 numbers of rows: the same for all positives of one.
        row_weight: `(rows,)` by these numbers, which a row's positives share.
        excluded: entries that are no negatives, by number among `own` and column.
        with_partner: how many of the `m` have their partner as target; they come first.
    """

    own: Tensor
    target: Tensor
    row: Tensor
    row_weight: Tensor
    excluded: Entries | None
    with_partner: int

    @classmethod
    def of(
        cls, own: Tensor, target: Tensor, weight: Tensor, excluded: Entries | None, positives: Entries | None
    ) -> "_RowEntries":
        """From rows with their partners and weights, `(m,)` each, and entries by row and column."""
        rows = torch.arange(len(own), device=own.device)
        if positives is None:
            return cls(own, target, rows, weight, excluded, len(own))
        row, column = torch.unique(torch.stack(positives), dim=1)
        further = (column != target[row]) & (column != own[row])
        row, column = row[further], column[further]
        # No positive of a row is a negative beside another.
        masked = all_entries([(row, column)] if excluded is None else [excluded, (row, column)])
        again = torch.arange(len(own), len(own) + len(row), device=own.device)
        entries = all_entries([masked, _repeated(masked, row, len(own)), (again, target[row])])
        anchors = torch.cat([rows, row])
        return cls(own[anchors], torch.cat([target, column]), anchors, weight, entries, len(own))

    @property
    def weight(self) -> Tensor:
        """`(m,)` of the losses."""
        return (self.row_weight / torch.bincount(self.row, minlength=len(self.row_weight)).clamp(min=1))[self.row]

    def among(self, remaining: Tensor) -> "_RowEntries":
        """The same with only the kept `(M,)` columns, numbered anew, and without the rows that are not among them."""
        column = remaining.cumsum(0) - 1
        staying = remaining[self.own] & remaining[self.target]
        number = staying.cumsum(0) - 1
        excluded = None
        if self.excluded is not None:
            numbers, columns = self.excluded
            both = staying[numbers] & remaining[columns]
            excluded = number[numbers[both]], column[columns[both]]
        return _RowEntries(
            column[self.own[staying]],
            column[self.target[staying]],
            self.row[staying],
            self.row_weight,
            excluded,
            int(staying[: self.with_partner].sum()),
        )


def _repeated(entries: Entries, again: Tensor, rows: int) -> Entries:
    """The entries of the rows `again`, `(k,)`, for rows that are numbered behind the first `rows`."""
    order = entries[0].argsort(stable=True)
    counts = torch.bincount(entries[0], minlength=rows)
    starts = counts.cumsum(0) - counts
    wanted = counts[again]
    number = torch.arange(len(again), device=again.device).repeat_interleave(wanted)
    within = torch.arange(len(number), device=again.device) - (wanted.cumsum(0) - wanted)[number]
    return rows + number, entries[1][order[starts[again][number] + within]]


def _of_rows(entries: Entries, rows: slice, size: int) -> Entries:
    """Those entries of a matrix of `size` rows and columns that are of some rows, which are numbered from 0."""
    row, column = entries
    check_inside(entries, size, size)
    mine = (row >= rows.start) & (row < rows.stop)
    return row[mine] - rows.start, column[mine]


@dataclass(frozen=True)
class _JoinedBatch:
    """Items of all processes in rank order: items of each process, `(M,)` which are rows, which have a visual part, weights."""

    counts: list[int]
    is_row: Tensor
    has_visual: Tensor
    weight: Tensor
    entries: _RowEntries
