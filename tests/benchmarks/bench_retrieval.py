"""Counting ranks beside the full argsort of every row, at the paper's test size.

    python -m tests.benchmarks.bench_retrieval [--pool 530000] [--queries 21000] [--baseline_queries 64]

530,000 items of 64 dimensions, 21,000 queries. The baseline, "full argsort of every row", scores a query against the
whole pool and sorts: numpy's argsort (vectorised where the processor allows it) with a thread for each core, or torch's,
whichever is faster here. It runs on a sample of the queries between two runs of the counting and after them, the better
of each is taken, and the baseline's is scaled to all queries: in full it would take many minutes. Both give the same
ranks on the sample, or the benchmark fails.

The limit of the counting is the scores themselves: 2 x 530,000 x 21,000 x 64 = 1.4 TFLOP of float32 multiplications;
`of_multiplication` says how much longer the counting takes than these alone, done in the same tiles.
"""

import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import HfArgumentParser

from training.evaluation.retrieval import ROWS, TILE, rank_targets


@dataclass
class Options:
    """Sizes of the benchmark."""

    pool: int = field(default=530_000, metadata={"help": "Candidates."})
    queries: int = field(default=21_000, metadata={"help": "Queries, each with one target in the pool."})
    dimensions: int = field(default=64, metadata={"help": "Width of the embeddings."})
    baseline_queries: int = field(default=64, metadata={"help": "Queries of each run of the baseline."})
    threads: int = field(default=2, metadata={"help": "Cores, for both."})


def make_embeddings(options: Options) -> Tensor:
    """Queries, then the pool; each query's target, at the pool's start, lies near it as in a trained model."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(options.queries + options.pool, options.dimensions, generator=generator)
    queries, targets = drawn[: options.queries], drawn[options.queries : 2 * options.queries]
    targets.mul_(0.8).add_(queries, alpha=0.5)
    return torch.nn.functional.normalize(drawn, dim=1)


def ranks_by_numpy(queries: Tensor, pool: Tensor, threads: int) -> np.ndarray:
    """Rank of candidate i for query i: each row sorted in full, a thread for each core."""
    vectors, candidates = queries.numpy(), pool.numpy()

    def rank(row: int) -> int:
        order = np.argsort(-(candidates @ vectors[row]))
        return int(np.flatnonzero(order == row)[0]) + 1

    with ThreadPoolExecutor(threads) as executor:
        return np.array(list(executor.map(rank, range(len(vectors)))))


def ranks_by_torch(queries: Tensor, pool: Tensor, threads: int) -> np.ndarray:
    """As `ranks_by_numpy`, rows in batches of the threads."""
    ranks = []
    for start in range(0, len(queries), threads):
        rows = torch.arange(start, min(start + threads, len(queries)))
        order = (queries[rows] @ pool.T).argsort(dim=1, descending=True)
        ranks.append((order == rows[:, None]).int().argmax(1) + 1)
    return torch.cat(ranks).numpy()


def multiply(queries: Tensor, pool: Tensor, threads: int) -> None:
    """The scores in the counting's tiles and threads, and nothing else."""

    def block(some: Tensor) -> None:
        memory = torch.empty(ROWS * TILE)
        for candidates in pool.split(TILE):
            for rows in some.split(ROWS):
                shape = (len(rows), len(candidates))
                torch.mm(rows, candidates.T, out=memory[: shape[0] * shape[1]].view(shape))

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        list(executor.map(block, queries.split(-(-len(queries) // threads))))
    torch.set_num_threads(threads)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_gigabytes() -> float:
    """Most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Print the ratio, and what it is made of."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    torch.set_num_threads(options.threads)
    embeddings = make_embeddings(options)
    ids = [str(row) for row in range(len(embeddings))]
    pairs = [(ids[row], ids[options.queries + row]) for row in range(options.queries)]
    queries, pool = embeddings[: options.queries], embeddings[options.queries :]
    before = peak_gigabytes()

    start = time.perf_counter()
    result = rank_targets(embeddings, ids, pairs)
    counted, peak = time.perf_counter() - start, peak_gigabytes()

    sample = queries[: options.baseline_queries]
    baselines = {"numpy": ranks_by_numpy, "torch": ranks_by_torch}
    rates = {}
    for name, rank in baselines.items():
        if not np.array_equal(rank(sample, pool, options.threads), result.ranks[: len(sample)].numpy()):
            raise AssertionError(f"{name}'s argsort and the counting give different ranks.")
        rates[name] = seconds(lambda rank=rank: rank(sample, pool, options.threads)) / len(sample)
    counted = min(counted, seconds(lambda: rank_targets(embeddings, ids, pairs)))
    for name, rank in baselines.items():
        rates[name] = min(rates[name], seconds(lambda rank=rank: rank(sample, pool, options.threads)) / len(sample))
    fastest = min(rates, key=rates.__getitem__)
    multiplication = seconds(lambda: multiply(queries, pool, options.threads))

    print(
        f"{options.queries:,} queries x {options.pool:,} candidates x {options.dimensions}, {options.threads} threads"
    )
    for name, rate in rates.items():
        total = rate * options.queries
        print(
            f"argsort of every row, {name}: {total:.0f} s (scaled from {len(sample)} queries), {total / counted:.1f} x"
        )
    print(f"counting: {counted:.1f} s, exact ranks; of_multiplication {counted / multiplication:.2f}")
    print(f"ratio to the faster argsort ({fastest}): {rates[fastest] * options.queries / counted:.1f}")
    print(f"peak memory {peak:.2f} GB, of which {before:.2f} GB before counting (embeddings, ids, libraries)")


if __name__ == "__main__":
    main()
