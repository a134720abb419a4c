"""Measure models on pairs: `python training/evaluate.py --model PATH --items ITEMS --pairs PAIRS --output DIR`.

Any Sentence Transformers model and any dual encoder (CLIP, SigLIP) is measured as NoteLLM-2 is. `--compare A B C` sets others
beside the model, or beside the first of them.

Writes DIR/evaluation.json, DIR/evaluation.md (the same as tables), DIR/plots/*.png and DIR/rejects.jsonl (rows that were
left out, with the reason). `training.evaluation.evidence` has its schema, and `evaluate_model` for Python callers.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence

from training.evaluation.evaluating import EvaluateArguments, run
from training.evaluation.measuring import MeasureOptions
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS, command, parse


@command("training/evaluate.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    arguments, measured = parse(EvaluateArguments, MeasureOptions, options=options)
    report = run(arguments, measured)
    return DONE_WITH_REJECTS if report["counts"]["rejected_rows"] else DONE


__all__ = ["EvaluateArguments", "MeasureOptions", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
