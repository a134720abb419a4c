"""Near items that are no partners: which of a query's neighbours may be its negatives, and a pair table with them.

A neighbour as near as the target is likely an unmarked positive, so a ceiling on the similarity, relative to the target's,
keeps it out (as in NV-Retriever, arXiv 2407.15831). `run` is what `training/hard_negatives.py` does.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from modeling_notellm2 import choose_precision
from training.batches.collators import ItemCollator
from training.batches.false_negatives import KnownPositives, image_hashes, text_hashes
from training.evaluation.embed import embed
from training.tables.commands.bounds import AtLeastOne, Bounds, Processes, check_bounds
from training.tables.commands.files import atomic_write
from training.tables.commands.handler import OptionError
from training.tables.commands.model_folder import loading
from training.tables.commands.options import (
    allow_remote_option,
    device_option,
    dtype_option,
    encoding_option,
    split_option,
)
from training.tables.commands.outputs import Output, claimed, marked
from training.tables.items import ItemTable, load_items
from training.tables.pairs import MatchedPairs, match_pairs
from training.tables.rejects import TableError


BLOCK = 4096
"""Pairs handled at once."""
EXACT = 100_000
"""So many candidates are searched in full; more through inverted lists."""


@dataclass
class HardNegativesArguments:
    """What to mine, and how near a negative may be."""

    model: str = field(metadata={"help": "Folder or Hub id of a trained NoteLLM-2 model with its processor."})
    items: str = field(metadata={"help": "Item table."})
    pairs: str = field(metadata={"help": "Pair table to train on."})
    output: str = field(metadata={"help": "Parquet file for the pairs with their negatives."})
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    allow_remote: str | None = allow_remote_option()
    negatives: AtLeastOne = field(default=4, metadata={"help": "Negatives of each pair."})
    ceiling: Annotated[float, Bounds(-1, 1)] = field(
        default=0.95, metadata={"help": "Highest cosine similarity to the query, as a share of the target's."}
    )
    neighbours: AtLeastOne = field(default=100, metadata={"help": "Nearest items of a query that are considered."})
    batch_size: AtLeastOne = field(default=64, metadata={"help": "Items embedded at once."})
    num_workers: Processes = field(default=0, metadata={"help": "Processes that open images to hash them."})
    device: str = device_option()
    dtype: str = dtype_option()

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.neighbours < self.negatives:
            raise OptionError(f"--negatives is {self.negatives}; it must be at most --neighbours, {self.neighbours}.")


def run(arguments: HardNegativesArguments) -> None:
    """The whole job; prints how many negatives were found."""
    inputs = (arguments.model, arguments.items, arguments.pairs)
    with claimed([Output("--output", Path(arguments.output))], inputs):
        mine(arguments)


def mine(arguments: HardNegativesArguments) -> None:
    """What `run` does, with the output's place held."""
    items, _ = load_items(
        arguments.items, arguments.split, False, encoding=arguments.encoding, allow_remote=arguments.allow_remote
    )
    matched = match_pairs(arguments.pairs, items, encoding=arguments.encoding)
    precision = choose_precision(arguments.dtype, arguments.device)
    print(f"Precision: {precision}")
    with loading(arguments.model):
        model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype=precision.dtype)
        model.to(arguments.device)
        processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    used = np.unique(matched.pairs)
    items, pairs = items.select(used), np.searchsorted(used, matched.pairs).astype(np.int32)
    embedded = embed(model, items, ItemCollator(processor), arguments.batch_size, "items")
    readable = np.all(embedded.readable(items, np.arange(len(items)))[pairs], axis=1)
    if not readable.any():
        raise TableError(f"{arguments.items}: of no pair could a picture of both items be read.")
    matched, pairs = matched.at(readable), pairs[readable]
    exclusions = Exclusions(
        KnownPositives(pairs, len(items)), image_hashes(items, arguments.num_workers), text_hashes(items)
    )
    mined = mine_negatives(
        embedded.embeddings.numpy(), pairs, exclusions, arguments.negatives, arguments.ceiling, arguments.neighbours
    )
    count = write_pairs(matched, items, mined, arguments.negatives, Path(arguments.output))
    print(f"{len(pairs):,} pairs, {count / len(pairs):.2f} of {arguments.negatives} negatives each: {arguments.output}")
    left_out = len(matched.rejects) + int((~readable).sum())
    print(f"Pairs left out: {left_out:,} (training lists them in its rejects file)")


@dataclass(frozen=True)
class Exclusions:
    """What is no negative of a pair: known positives of its query, and items that look or read as one of the two."""

    positives: KnownPositives
    image_hashes: np.ndarray
    text_hashes: np.ndarray

    def allowed(self, pairs: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Which of the candidates (m, k) of the pairs (m, 2) may be negatives: bool (m, k)."""
        allowed = ~self.positives.contains(pairs[:, :1], candidates)
        for member in (pairs[:, :1], pairs[:, 1:]):
            allowed &= candidates != member
            for hashes in (self.image_hashes, self.text_hashes):
                allowed &= (hashes[candidates] != hashes[member]) | (hashes[member] < 0)
        return allowed


def mine_negatives(
    embeddings: np.ndarray,
    pairs: np.ndarray,
    exclusions: Exclusions,
    negatives: int,
    ceiling: float = 0.95,
    neighbours: int = 100,
) -> Iterator[np.ndarray]:
    """Negatives of each pair, in blocks of the pairs' order.

    Args:
        embeddings: (items, d) float32 of unit length.
        pairs: (m, 2) integer positions of query and target.
        negatives: columns wanted.
        ceiling: highest similarity to the query as a share of the target's. Below zero, the same distance under it.
        neighbours: nearest candidates that are considered.

    Yields:
        (block, negatives) int32 positions, nearest to the query first, -1 where there are too few.
    """
    candidates = np.unique(pairs)
    index = _build_index(embeddings[candidates])
    for start in tqdm(range(0, len(pairs), BLOCK), desc="Mining negatives", unit="block"):
        block = pairs[start : start + BLOCK]
        queries, of_query = np.unique(block[:, 0], return_inverse=True)
        scores, nearest = index.search(embeddings[queries], min(neighbours, len(candidates)))
        scores, near = scores[of_query], candidates[nearest][of_query]
        target = (embeddings[block[:, 0]] * embeddings[block[:, 1]]).sum(1, keepdims=True)
        usable = exclusions.allowed(block, near) & (nearest[of_query] >= 0)
        usable &= scores <= target - (1 - ceiling) * np.abs(target)
        chosen = np.full((len(block), negatives), -1, dtype=np.int32)
        rank = usable.cumsum(1) - 1
        rows, columns = np.nonzero(usable & (rank < negatives))
        chosen[rows, rank[rows, columns]] = near[rows, columns]
        yield chosen


def _build_index(vectors: np.ndarray) -> faiss.Index:
    """Inner products, exact for few vectors; for many, 4 sqrt(n) inverted lists of which 32 are looked at."""
    index: faiss.Index
    if len(vectors) <= EXACT:
        index = faiss.IndexFlatIP(vectors.shape[1])
    else:
        index = faiss.index_factory(
            vectors.shape[1], f"IVF{int(4 * len(vectors) ** 0.5)},Flat", faiss.METRIC_INNER_PRODUCT
        )
        index.train(vectors)
        faiss.extract_index_ivf(index).nprobe = 32
    index.add(vectors)
    return index


def write_pairs(
    matched: MatchedPairs, items: ItemTable, mined: Iterator[np.ndarray], negatives: int, output: Path
) -> int:
    """Write the usable pairs' rows, all columns, with their negatives as ids; returns the number of negatives."""
    names = [f"negative_{number + 1}" for number in range(negatives)]
    columns = [name for name in matched.table.column_names if name not in names]
    writer, start, count = None, 0, 0
    with atomic_write(output) as place, ExitStack() as stack:
        for block in mined:
            table = matched.table.take(matched.rows[start : start + len(block)], columns)
            start += len(block)
            count += int((block >= 0).sum())
            for name, column in zip(names, block.T, strict=True):
                positions = pa.array(column, mask=column < 0)
                table = table.append_column(name, items.item_ids.column.take(positions).cast(pa.string()))
            writer = writer or stack.enter_context(pq.ParquetWriter(place, marked(table.schema)))
            writer.write_table(table)
    return count
