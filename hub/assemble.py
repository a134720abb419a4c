"""Joins a pretrained LLM and a pretrained vision encoder into an untrained NoteLLM-2 folder.

    python hub/assemble.py --text LLM --vision ENCODER --output DIR

LLM and ENCODER are ids or folders for transformers' Auto classes, or the names of the packaged backbones, which are the
defaults: smollm2-135m and efficientnet-lite0. DIR gets model, processor, their code, and assembly.json with the options.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence

from hub.backbones.assembling import AssembleArguments, describe, write
from training.tables.commands.handler import DONE, command, parse


@command("hub/assemble.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(AssembleArguments, options=options)
    model = write(arguments)
    print(
        f"{describe(model)}\n{arguments.output}: model, processor and code; load it with AutoModel and AutoProcessor."
    )
    return DONE


if __name__ == "__main__":
    sys.exit(main())
