"""Checkpoints that are whole or not there: written aside and renamed, with a list of their files to hold them against.

`transformers` writes a checkpoint file by file; a run that is killed meanwhile, or a disk that runs full, would leave one
that looks ready. Here a checkpoint gets its name when all of it is written, and one that was damaged since is passed over.
"""

import json
import os
import re
import shutil
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")
RECORD = "files.json"
STAGING = ".unfinished"


def publish_checkpoint(staged: Path, final: Path) -> None:
    """Record the files of a written checkpoint and give it its name, in place of an older one."""
    sizes = {str(path.relative_to(staged)): path.stat().st_size for path in sorted(staged.rglob("*")) if path.is_file()}
    (staged / RECORD).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(staged, final)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        sizes = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no readable {RECORD} ({error})"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones after it are named in a warning. None if there is none."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        fault = fault_of(path)
        if fault is None:
            return path
        logger.warning("%s is damaged (%s): the checkpoint before it is used.", path, fault)
    return None


def checkpoint_to_resume(wanted: str | None, folder: Path) -> Path | None:
    """Where a run goes on.

    Args:
        wanted: None: nowhere, from the start; "true" or "last": the newest whole checkpoint in `folder`, from the start
            if there is none, so that one command both starts a run and restarts it; otherwise a checkpoint's folder.

    Raises:
        ValueError: when the named checkpoint is missing or damaged.
    """
    if wanted is None or wanted.lower() in ("false", "none"):
        return None
    if wanted.lower() in ("true", "last"):
        found = newest_checkpoint(folder)
        logger.warning("%s", f"Going on from {found}." if found else f"No checkpoint in {folder}: starting anew.")
        return found
    fault = fault_of(Path(wanted))
    if fault is not None:
        raise ValueError(
            f"resume_from_checkpoint {wanted}: {fault}. Name another checkpoint, or `true` for the newest."
        )
    return Path(wanted)
