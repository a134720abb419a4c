"""What an update of a catalogue costs beside encoding its new and changed items alone, in CPU seconds.

    python -m tests.benchmarks.bench_update [--items 50000] [--changed 0.01]

`update` is hub/encode.py --update where that share has another title; `alone` is hub/encode.py on a table of nothing but
those. `an unchanged item` is what each of the others costs, beside an item that is encoded.
"""

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import HfArgumentParser

from hub.catalogue.encoding import EncodeArguments, encode
from tests.benchmarks.bench_encode import make_model
from tests.support.catalogue import make_items


@dataclass
class Options:
    """Sizes of the benchmark."""

    items: int = field(default=50_000, metadata={"help": "Items of the catalogue, four of five with a picture."})
    changed: float = field(default=0.01, metadata={"help": "Share of them with another title."})


def seconds_of(job: EncodeArguments) -> float:
    """CPU seconds of a job in this process."""
    start = time.process_time()
    encode(job)
    return time.process_time() - start


def main() -> None:
    """Prints the ratio."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", width=64, layers=2)
        some = make_items(1000)
        items = [some[number % 1000] | {"item_id": f"n{number}"} for number in range(options.items)]
        pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
        job = EncodeArguments(
            str(folder / "model"),
            str(folder / "items.parquet"),
            str(folder / "vectors"),
            dtype="float32",
            num_workers=0,
        )
        first = seconds_of(job)
        step = round(1 / options.changed)
        for item in items[::step]:
            item["title"] = "another title"
        pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
        pq.write_table(pa.Table.from_pylist(items[::step]), folder / "changed.parquet")
        alone = seconds_of(replace(job, items=str(folder / "changed.parquet"), output=str(folder / "alone")))
        update = seconds_of(replace(job, update=True))
    of_others = (update - alone) / (options.items - len(items[::step]))
    print(f"{'all items':24}{first:9.1f} s")
    print(f"{'changed ones alone':24}{alone:9.1f} s")
    print(f"{'update':24}{update:9.1f} s{update / alone:8.2f} x alone{update / first:8.3f} x all")
    print(f"{'an unchanged item':24}{1e6 * of_others:9.0f} us{of_others * options.items / first:8.4f} x encoded")


if __name__ == "__main__":
    main()
