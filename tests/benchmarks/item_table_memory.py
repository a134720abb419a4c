"""Memory and time of an item table: ours, mapped, against the same rows as Python objects.

    python -m tests.benchmarks.item_table_memory [--items 10000000] [--folder DIR]

Each side runs in a process of its own. `anonymous` is resident memory without mapped files, which the kernel takes back
when it needs to; `mapped` are those. The peak is of anonymous memory, sampled. All include the imports,
`growth` is without them.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import HfArgumentParser


BLOCK = 100_000


@dataclass
class Options:
    """Sizes of the benchmark."""

    items: int = field(default=100_000, metadata={"help": "Items; as many pairs are loaded besides."})
    folder: str | None = field(default=None, metadata={"help": "Where the table is made and kept; none: a new folder."})
    side: str | None = field(default=None, metadata={"help": "Measure one side in this process: ours or objects."})


def make_tables(folder: Path, items: int) -> None:
    """A Parquet table of text items and one of pairs, block by block."""
    generator = np.random.default_rng(0)
    with (
        pq.ParquetWriter(folder / "items.parquet", pa.schema({n: pa.string() for n in ("item_id", "title")})) as rows,
        pq.ParquetWriter(
            folder / "pairs.parquet", pa.schema({n: pa.string() for n in ("query_id", "target_id")})
        ) as pairs,
    ):
        for start in range(0, items, BLOCK):
            count = min(BLOCK, items - start)
            ids = _texts("item-", np.arange(start, start + count))
            rows.write_table(pa.table({"item_id": ids, "title": _texts("a title of some length, number ", ids)}))
            drawn = [_texts("item-", generator.integers(0, items, count)) for _ in range(2)]
            pairs.write_table(pa.table(dict(zip(("query_id", "target_id"), drawn, strict=True))))


def measure(side: str, folder: Path) -> dict[str, float]:
    """Seconds and megabytes of this process."""
    from training.tables.items import load_items
    from training.tables.pairs import load_pairs

    peak, before = 0.0, anonymous_mb()
    finished = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(0.02):
            peak = max(peak, anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    if side == "ours":
        items, _ = load_items(str(folder / "items.parquet"))
        loaded = time.monotonic()
        kept = (items, load_pairs(str(folder / "pairs.parquet"), items)[0])
    else:
        rows = pq.read_table(folder / "items.parquet").to_pylist()
        position_of = {row["item_id"]: position for position, row in enumerate(rows)}
        loaded = time.monotonic()
        pairs = pq.read_table(folder / "pairs.parquet").to_pylist()
        kept = (rows, [(position_of[pair["query_id"]], position_of[pair["target_id"]]) for pair in pairs])
    done = time.monotonic()
    finished.set()
    watcher.join()
    assert len(kept) == 2
    return {
        "items_s": loaded - started,
        "pairs_s": done - loaded,
        "anonymous_mb": anonymous_mb(),
        "growth_mb": anonymous_mb() - before,
        "peak_mb": peak,
        "mapped_mb": psutil.Process().memory_info().shared / 1e6,
    }


def anonymous_mb() -> float:
    """Resident memory of this process that no file backs."""
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 1e6


def compare(folder: Path, items: int) -> dict[str, dict[str, float]]:
    """Both sides, ours twice: the first time the table is copied into the cache."""
    if not (folder / "items.parquet").exists():
        make_tables(folder, items)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    found = {}
    for name, side in (("ours, first time", "ours"), ("ours, again", "ours"), ("objects", "objects")):
        command = [sys.executable, "-m", __spec__.name, "--side", side, "--folder", str(folder)]
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print one line for each side."""
    options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    if options.side:
        print(json.dumps(measure(options.side, Path(options.folder))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = compare(folder, options.items)
    print(f"{options.items:,} items and as many pairs")
    for name, figures in results.items():
        print(f"{name:18}", "  ".join(f"{key} {value:9.1f}" for key, value in figures.items()))
    ratio = results["objects"]["growth_mb"] / results["ours, again"]["growth_mb"]
    print(f"Python objects take {ratio:.1f} times the memory.")


def _texts(prefix: str, values: pa.Array | np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(values).cast(pa.string()), "")


if __name__ == "__main__":
    main()
