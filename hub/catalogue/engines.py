"""How the blocks of a catalogue are encoded: by this process with its workers, or by the machines of a Ray cluster."""

import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from hub.catalogue.encoder import EncodedBlock, ItemEncoder, PreparedBlock, Rows
from hub.catalogue.shards import Plan


def encode_here(
    encoder: ItemEncoder, rows: Rows, plan: Plan, blocks: list[int], num_workers: int
) -> Iterator[EncodedBlock]:
    """The model in this process, the next blocks prepared in worker processes meanwhile."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else each worker warns that it was forked
    _ = encoder.processor  # before the workers start, which then share it
    loader = DataLoader(
        _Blocks(encoder, rows, plan, blocks),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        # Children of this very process: they end when it is killed, which a fork server's would not.
        multiprocessing_context="fork" if num_workers else None,
    )
    return map(encoder.embed, loader)


class _Blocks(Dataset[PreparedBlock]):
    """Prepared blocks, as a loader's workers ask for them."""

    def __init__(self, encoder: ItemEncoder, rows: Rows, plan: Plan, blocks: list[int]):
        self.encoder, self.rows, self.plan, self.blocks = encoder, rows, plan, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> PreparedBlock:
        block = self.blocks[index]
        return self.rows.prepare(self.encoder, block, self.plan.block_range(block))


def _as_it_is(block: Any) -> Any:
    return block
