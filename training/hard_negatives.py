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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from transformers import AutoModel, AutoProcessor

from modeling_notellm2 import choose_precision
from training.batches.collators import ItemCollator
from training.batches.false_negatives import KnownPositives, image_hashes, text_hashes
from training.evaluation.embed import embed
from training.mining.hard_negatives import Exclusions, mine_negatives, write_pairs
from training.tables.commands.bounds import AtLeastOne, Bounds, NotNegative, check_bounds
from training.tables.commands.handler import DONE, OptionError, command, parse
from training.tables.commands.model_folder import loading
from training.tables.commands.options import device_option, dtype_option, encoding_option, split_option
from training.tables.commands.outputs import Output, claimed
from training.tables.items import load_items
from training.tables.pairs import match_pairs


@dataclass
class HardNegativesArguments:
    """What to mine, and how near a negative may be."""

    model: str = field(metadata={"help": "Folder or Hub id of a trained NoteLLM-2 model with its processor."})
    items: str = field(metadata={"help": "Item table."})
    pairs: str = field(metadata={"help": "Pair table to train on."})
    output: str = field(metadata={"help": "Parquet file for the pairs with their negatives."})
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    negatives: AtLeastOne = field(default=4, metadata={"help": "Negatives of each pair."})
    ceiling: Annotated[float, Bounds(-1, 1)] = field(
        default=0.95, metadata={"help": "Highest cosine similarity to the query, as a share of the target's."}
    )
    neighbours: AtLeastOne = field(default=100, metadata={"help": "Nearest items of a query that are considered."})
    batch_size: AtLeastOne = field(default=64, metadata={"help": "Items embedded at once."})
    num_workers: NotNegative = field(default=0, metadata={"help": "Processes that open images to hash them."})
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
    items, _ = load_items(arguments.items, arguments.split, check_images=False, encoding=arguments.encoding)
    matched = match_pairs(arguments.pairs, items, encoding=arguments.encoding)
    precision = choose_precision(arguments.dtype, arguments.device)
    print(f"Precision: {precision}")
    with loading(arguments.model):
        model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype=precision.dtype).to(
            arguments.device
        )
        processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    used = np.unique(matched.pairs)
    items, pairs = items.select(used), np.searchsorted(used, matched.pairs).astype(np.int32)
    embedded = embed(model, items, ItemCollator(processor), arguments.batch_size, "items").embeddings.numpy()
    exclusions = Exclusions(
        KnownPositives(pairs, len(items)), image_hashes(items, arguments.num_workers), text_hashes(items)
    )
    mined = mine_negatives(embedded, pairs, exclusions, arguments.negatives, arguments.ceiling, arguments.neighbours)
    count = write_pairs(matched, items, mined, arguments.negatives, Path(arguments.output))
    print(f"{len(pairs):,} pairs, {count / len(pairs):.2f} of {arguments.negatives} negatives each: {arguments.output}")
    print(f"Pairs left out: {len(matched.rejects):,} (training lists them in its rejects file)")


@command("training/hard_negatives.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(HardNegativesArguments, options=options)
    run(arguments)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
