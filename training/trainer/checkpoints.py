"""Checkpoints that are known to be whole: marked when all is written, with the hashes of their files.

`transformers` writes a checkpoint file by file; a run that is killed meanwhile, or a disk that runs full, leaves one that
looks ready. Only a checkpoint with its mark is gone on from, and one that was damaged since, by one bit, is passed over.
"""

import json
import re
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from training.tables.commands.files import write_json
from training.tables.commands.hashes import changes, file_xxh3


logger = logging.get_logger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")
RECORD = "files.json"


def mark_whole(checkpoint: Path) -> None:
    """Record the files of a written checkpoint by their hashes: from now on it is one to go on from."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != RECORD)
    write_json({str(path.relative_to(checkpoint)): file_xxh3(path) for path in files}, checkpoint / RECORD)


def output_folder(args: TrainingArguments) -> Path:
    """Where a run writes; `TrainingArguments` has a folder of its own where none was named."""
    assert args.output_dir is not None
    return Path(args.output_dir)


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint when all processes have written their part, and only then deletes older ones.

    Trainer itself would delete them before: a kill in between would leave nothing to go on from. So the limit on their
    number is held here. Trials of a search go on from nowhere and keep Trainer's way.
    """

    def __init__(self) -> None:
        self.limit: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Take the limit over; with all steps done before, there is nothing to train."""
        if not state.is_hyper_param_search:
            self.limit, args.save_total_limit = args.save_total_limit, None
        control.should_training_stop = state.global_step >= state.max_steps
        return control

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint that is about to be written again is not whole meanwhile."""
        if args.should_save and control.should_save:
            (output_folder(args) / f"checkpoint-{state.global_step}" / RECORD).unlink(missing_ok=True)

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the new checkpoint, then delete those beyond the limit."""
        PartialState().wait_for_everyone()
        if args.should_save and not state.is_hyper_param_search:
            folder = output_folder(args)
            mark_whole(folder / f"checkpoint-{state.global_step}")
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.limit,
                best_model_checkpoint=state.best_model_checkpoint,
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the limit back."""
        if not state.is_hyper_param_search:
            args.save_total_limit = self.limit


class LossSoFar(TrainerCallback, ExportableState):
    """The mean loss of a run's batches from its first step on, which a checkpoint keeps through restarts."""

    def __init__(self) -> None:
        self.sum: Tensor | float = 0.0
        self.batches = 0

    def add(self, loss: Tensor) -> None:
        """One batch's loss."""
        self.sum = self.sum + loss.detach().double()
        self.batches += 1

    @property
    def mean(self) -> float:
        """Mean over all batches so far; NaN before the first."""
        return float(self.sum) / self.batches if self.batches else float("nan")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"sum": float(self.sum), "batches": self.batches}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Go on where the checkpoint's run stood; start at zero without one."""
        states: Any = state.stateful_callbacks  # annotated as a list, but the Trainer's is a dict by class name
        sums = states.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        self.sum, self.batches = sums.get("sum", 0.0), sums.get("batches", 0)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. They are all read."""
    try:
        hashes = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no readable {RECORD} ({error})"
    return ", ".join(changes(hashes, checkpoint)) or None


def checkpoints_of(folder: Path) -> list[Path]:
    """A run's checkpoints, whole or not, the newest first."""
    numbered = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones after it are named in a warning. None if there is none."""
    for path in checkpoints_of(folder):
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
        newest = newest_checkpoint(folder)
        logger.warning("%s", f"Going on from {newest}." if newest else f"No checkpoint in {folder}: starting anew.")
        return newest
    fault = fault_of(Path(wanted))
    if fault is not None:
        raise ValueError(
            f"resume_from_checkpoint {wanted}: {fault}. Name another checkpoint, or `true` for the newest."
        )
    return Path(wanted)
