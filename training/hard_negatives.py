"""Hard negatives from a trained model: for each pair, items that the model puts near its query though nobody paired them.

    python training/hard_negatives.py --model DIR --items ITEMS --pairs PAIRS --output PAIRS.parquet

Writes the usable pairs with columns negative_1 .. negative_n, hardest first, null where too few were found; training reads
them when it is given this table. A neighbour as near as the target is likely an unmarked positive, so a ceiling on the
similarity, relative to the target's, keeps it out (as in NV-Retriever, arXiv 2407.15831). Candidates are the items of
the pair table alone: held-out ones never become negatives.
"""

import training.tables.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from modeling_notellm2 import DTYPES, choose_precision
from training.evaluation.embed import embed
from training.tables.bounds import AtLeastOne, Bounds, NotNegative, check_bounds
from training.tables.commands import DONE, OptionError, command, parse
from training.tables.files import atomic_write
from training.tables.items import ItemTable, MatchedPairs, load_items, match_pairs
from training.tables.model_folder import loading
from training.trainer.batches import ItemCollator
from training.trainer.false_negatives import KnownPositives, image_hashes, text_hashes


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
    split: str | None = field(
        default=None,
        metadata={"help": "Split of the items' data set or folder of files; none: all, one after another."},
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "Of CSV and JSON lines tables, e.g. gbk or latin-1; none: UTF-8, or as their mark says."},
    )
    negatives: AtLeastOne = field(default=4, metadata={"help": "Negatives of each pair."})
    ceiling: Annotated[float, Bounds(-1, 1)] = field(
        default=0.95, metadata={"help": "Highest cosine similarity to the query, as a share of the target's."}
    )
    neighbours: AtLeastOne = field(default=100, metadata={"help": "Nearest items of a query that are considered."})
    batch_size: AtLeastOne = field(default=64, metadata={"help": "Items embedded at once."})
    num_workers: NotNegative = field(default=0, metadata={"help": "Processes that open images to hash them."})
    device: str | None = field(default=None, metadata={"help": "Where the model runs; none: a GPU if there is one."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the weights; auto: bfloat16 where the machine has it.", "choices": list(DTYPES)},
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.neighbours < self.negatives:
            raise OptionError(f"--negatives is {self.negatives}; it must be at most --neighbours, {self.neighbours}.")


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
        scores, found = index.search(embeddings[queries], min(neighbours, len(candidates)))
        scores, near = scores[of_query], candidates[found][of_query]
        target = (embeddings[block[:, 0]] * embeddings[block[:, 1]]).sum(1, keepdims=True)
        usable = exclusions.allowed(block, near) & (found[of_query] >= 0)
        usable &= scores <= target - (1 - ceiling) * np.abs(target)
        chosen = np.full((len(block), negatives), -1, dtype=np.int32)
        rank = usable.cumsum(1) - 1
        rows, columns = np.nonzero(usable & (rank < negatives))
        chosen[rows, rank[rows, columns]] = near[rows, columns]
        yield chosen


def _build_index(vectors: np.ndarray) -> faiss.Index:
    """Inner products, exact for few vectors; for many, 4 sqrt(n) inverted lists of which 32 are looked at."""
    if len(vectors) <= EXACT:
        index = faiss.IndexFlatIP(vectors.shape[1])
    else:
        index = faiss.index_factory(
            vectors.shape[1], f"IVF{int(4 * len(vectors) ** 0.5)},Flat", faiss.METRIC_INNER_PRODUCT
        )
        index.train(vectors)
        index.nprobe = 32
    index.add(vectors)
    return index


def write_pairs(
    matched: MatchedPairs, items: ItemTable, mined: Iterator[np.ndarray], negatives: int, output: Path
) -> int:
    """The usable pairs' rows, all columns, with their negatives as ids, whole or not at all. Returns negatives found."""
    names = [f"negative_{number + 1}" for number in range(negatives)]
    kept = [name for name in matched.table.column_names if name not in names]
    writer, start, found = None, 0, 0
    with atomic_write(output) as place, ExitStack() as stack:
        for block in mined:
            table = matched.table.take(matched.rows[start : start + len(block)], kept)
            start += len(block)
            found += int((block >= 0).sum())
            for name, column in zip(names, block.T, strict=True):
                positions = pa.array(column, mask=column < 0)
                table = table.append_column(name, items.item_ids.column.take(positions).cast(pa.string()))
            writer = writer or stack.enter_context(pq.ParquetWriter(place, table.schema))
            writer.write_table(table)
    return found


def run(arguments: HardNegativesArguments) -> None:
    """The whole job; prints how many negatives were found."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    items, _ = load_items(arguments.items, arguments.split, check_images=False, encoding=arguments.encoding)
    matched = match_pairs(arguments.pairs, items, encoding=arguments.encoding)
    precision = choose_precision(arguments.dtype, device)
    print(f"Precision: {precision}")
    with loading(arguments.model):
        model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype=precision.dtype).to(device)
        processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    used = np.unique(matched.pairs)
    items, pairs = items.select(used), np.searchsorted(used, matched.pairs).astype(np.int32)
    embedded = embed(model, items, ItemCollator(processor), arguments.batch_size, "items").embeddings.numpy()
    exclusions = Exclusions(
        KnownPositives(pairs, len(items)), image_hashes(items, arguments.num_workers), text_hashes(items)
    )
    mined = mine_negatives(embedded, pairs, exclusions, arguments.negatives, arguments.ceiling, arguments.neighbours)
    found = write_pairs(matched, items, mined, arguments.negatives, Path(arguments.output))
    print(f"{len(pairs):,} pairs, {found / len(pairs):.2f} of {arguments.negatives} negatives each: {arguments.output}")
    print(f"Pairs left out: {len(matched.rejects):,} (training lists them in its rejects file)")


@command("training/hard_negatives.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(HardNegativesArguments, options=options)
    run(arguments)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
