"""Warms up a new connector on a catalogue alone, without pairs.

    python training/align.py --model DIR --items ITEMS --output DIR

LLM and vision encoder stay as they are; Q-Former, query tokens and projector learn to say in the LLM's language what a picture
shows, from the items' own texts. The output is a model like the input; training/run.py goes on from it.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence

from training.tables.commands.handler import DONE, command, parse
from training.trainer.aligning import AlignArguments, run


@command("training/align.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(AlignArguments, options=options)
    run(arguments)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
