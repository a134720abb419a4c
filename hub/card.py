"""Writes a model's card, README.md in its folder: what it is, what it reaches, how to use it, where it stops.

    python hub/card.py --model DIR [--metrics metrics.json] [--repo ORG/NAME] [--license apache-2.0] [--languages en]

Every figure and every sentence about quality comes from the metrics.json that `training/run.py` wrote; without it the card
says that nothing was measured. sentence-transformers writes a README.md of its own when it saves a model that it trained:
that one, as one written by hand, is kept unless --replace is given.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hub.cards.writing import CARD, write_card
from training.tables.commands.handler import DONE, command, parse
from training.tables.commands.outputs import Output, check_inputs, locked


@dataclass
class CardArguments:
    """Which model's card, and what only its owner knows."""

    model: str = field(metadata={"help": "Folder of the model or adapter; gets README.md."})
    metrics: str | None = field(
        default=None, metadata={"help": "metrics.json of its training, or evaluation.json of training/evaluate.py."}
    )
    repo: str | None = field(default=None, metadata={"help": "ORG/NAME that the snippets load."})
    license: str | None = field(default=None, metadata={"help": "As the Hub names it, e.g. apache-2.0."})
    languages: list[str] | None = field(default=None, metadata={"help": "Codes of the texts' languages, e.g. en zh."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Hub ids of the data sets trained on."})
    base_models: list[str] | None = field(
        default=None, metadata={"help": "Hub ids of both backbones; none: those that the model's config names."}
    )
    plots: list[str] | None = field(default=None, metadata={"help": "PNG files to show; copied into DIR/assets."})
    mteb: list[str] = field(
        default_factory=list, metadata={"help": "scores.json of hub/mteb_task.py, or result files of mteb."}
    )
    replace: bool = field(default=False, metadata={"help": "Replace a README.md that this command didn't write."})


@command("hub/card.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(CardArguments, options=options)
    card = Output("--model", Path(arguments.model), (CARD,))
    check_inputs([card], (arguments.metrics, *(arguments.plots or ()), *arguments.mteb))
    with locked(card.lock, card.path):
        path = write_card(
            arguments.model,
            arguments.metrics,
            arguments.repo,
            license=arguments.license,
            languages=arguments.languages,
            datasets=arguments.datasets,
            base_models=arguments.base_models,
            plots=arguments.plots or (),
            mteb=arguments.mteb,
            replace=arguments.replace,
        )
    print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} lines")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
