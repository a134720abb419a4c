"""Semantic ids: gives each item of an encoded catalogue a few codes, for recommenders that generate items.

    python hub/semantic_ids.py --embeddings DIR --output CODES [--levels 3] [--codes 256]
    python hub/semantic_ids.py --embeddings NEW --earlier CODES --output NEW_CODES       (no training; known items keep theirs)

CODES gets codes.parquet (`item_id`, `codes`: one of each level, and a last digit that tells items of the same codes apart),
codebooks.safetensors and semantic_ids.json with the figures that are printed. The codebooks are residual k-means; the same
vectors and seed give the same codes, in whatever order the items stand.

    Codebooks.load("CODES/codebooks.safetensors").encode(vectors)

Exit code: 0 done; 1 failed; 2 wrong options.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from hub.codes.codebooks import Codebooks
from hub.codes.making import SemanticIdsArguments, make_ids
from hub.codes.table import SemanticIds
from training.tables.commands.handler import DONE, command, parse, plain_console


def report(record: dict[str, Any]) -> Table:
    """The figures of each level, for people."""
    table = Table(title=f"Codes of {record['items']:,} items", title_justify="left")
    for heading in ("level", "codes used", "evenness", "items alone", "error", "recall@10"):
        table.add_column(heading, justify="right")
    for number, level in enumerate(record["quality"]["levels"], 1):
        table.add_row(str(number), *(f"{level[name]:.3f}" for name in ("used", "evenness", "alone", "error", "recall")))
    return table


@command("hub/semantic_ids.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(SemanticIdsArguments, options=options)
    record = make_ids(arguments)
    plain_console().print(report(record))
    print(f"{arguments.output}: {record['items']:,} items, last digits up to {record['last_digits'] - 1}")
    return DONE


__all__ = ["Codebooks", "SemanticIds", "SemanticIdsArguments", "main", "make_ids"]

if __name__ == "__main__":
    sys.exit(main())
