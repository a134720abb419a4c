"""`make bench`: one table of ratios, each measured side by side, and the same figures in runs/bench.json.

    python -m tests.benchmarks [--rounds 5] [--output runs/bench.json]

What takes hours or much memory is measured by scripts of its own in this folder, which `make bench` runs afterwards. What
paid and what didn't is in NOTES.md.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from tests.benchmarks import bare_parts, start_up
from tests.benchmarks.ratios import table, write


@dataclass
class Options:
    """How much is measured."""

    rounds: int = field(default=5, metadata={"help": "Rounds of each ratio, beside one that warms up."})
    output: str = field(default="runs/bench.json", metadata={"help": "JSON file of all figures."})


def main() -> None:
    """Measure on one thread, print, write."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]
    torch.set_num_threads(1)
    ratios = [*bare_parts.ratios(options.rounds), *start_up.ratios(options.rounds)]
    print(table(ratios))
    write(ratios, Path(options.output))


if __name__ == "__main__":
    main()
