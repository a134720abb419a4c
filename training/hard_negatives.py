"""Hard negatives from a trained model: for each pair, items that the model puts near its query though nobody paired them.

    python training/hard_negatives.py --model DIR --items ITEMS --pairs PAIRS --output PAIRS.parquet

Writes the usable pairs with columns negative_1 .. negative_n, hardest first, null where too few were found; training reads
them when it is given this table. A neighbour as near as the target is likely an unmarked positive, so a ceiling on the
similarity, relative to the target's, keeps it out (as in NV-Retriever, arXiv 2407.15831). Candidates are the items of
the pair table alone: held-out ones never become negatives.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence

from training.mining.hard_negatives import HardNegativesArguments, run
from training.tables.commands.handler import DONE, command, parse


@command("training/hard_negatives.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(HardNegativesArguments, options=options)
    run(arguments)
    return DONE


__all__ = ["HardNegativesArguments", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
