"""Which families are right as both halves of a model (`connector: native`): one checkpoint of pictures and text.

    python -m tests.support.native_checks --output hub/backbones/FAMILIES.md

writes the file's section of them. The trial that joining makes decides: a picture's states from features are the family's own
from pixels.
"""

import argparse
from pathlib import Path

from transformers.utils import logging

from modeling_notellm2.native_notellm2 import load_native_model, native_settings
from tests.support.families import multimodal_families, tiny_model
from tests.support.family_checks import Finding
from tests.support.native_models import IN_FULL, tiny_checkpoint
from tests.support.vision_checks import one_line


BEGIN, END = "<!-- native: begin -->", "<!-- native: end -->"
INSTEAD = 'Use connector="qformer"'


def examine(family: str) -> Finding:
    """Makes a tiny checkpoint of the family and joins it with itself."""
    try:
        checkpoint = tiny_checkpoint(family) if family in IN_FULL else tiny_model(family)
    except Exception as error:
        return Finding("untried", f"transformers makes no tiny model: {one_line(error)}")
    try:
        settings = native_settings(load_native_model(checkpoint), check=True)
    except ValueError as error:
        return Finding("refused" if INSTEAD in str(error) else "wrong", one_line(error))
    if settings["image_token_id"] != checkpoint.config.image_token_id:
        return Finding("wrong", "another image token than the checkpoint's own")
    return Finding("right", "prompts, batches, gradients and saving tested too" if family in IN_FULL else "")


def table() -> str:
    """The section of FAMILIES.md, between its marks."""
    rows = ["| family | status | note |", "|---|---|---|"]
    for family in multimodal_families():
        finding = examine(family)
        print(family, finding.status, finding.note, flush=True)
        note = finding.note[:200].replace("|", "\\|")
        rows.append(f"| {family} | {finding.status} | {note} |")
    heading = (
        "## One checkpoint as both halves (`connector: native`)\n\nTried on tiny random models of transformers' models of "
        "pictures and text (some are refused only because a tiny one has odd sizes: joining tries yours). What is refused joins "
        "through a Q-Former, if the tables above say so."
    )
    return "\n".join([BEGIN, heading, "", *rows, END])


def rows_of(text: str) -> dict[str, str]:
    """Family and status of each row of the section."""
    section = text.partition(BEGIN)[2].partition(END)[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells[1:]}


def main() -> None:
    """Replaces the section in the file, or adds it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    path = parser.parse_args().output
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    path.write_text(start.rstrip() + "\n\n" + table() + "\n" + rest.partition(END)[2].lstrip(), encoding="utf-8")


if __name__ == "__main__":
    main()
