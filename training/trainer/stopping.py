"""Stopping a training from outside: SIGTERM ends it after the step and a checkpoint, Ctrl-C at once; both say how to go on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.tables.commands.handler import Stopped
from training.trainer.checkpoints import RECORD, checkpoints_of, output_folder


@contextmanager
def stoppable(trainer: Trainer) -> Iterator[None]:
    """Train within the block.

    Where checkpoints are on, SIGTERM waits for the end of the step and for a checkpoint; a second SIGTERM doesn't wait.

    Raises:
        Stopped: after a signal, with how to go on.
    """
    ending = _Ending()
    with_checkpoints = trainer.args.save_strategy != "no"
    waits = with_checkpoints and threading.current_thread() is threading.main_thread()
    if waits:
        before = signal.signal(signal.SIGTERM, ending.ask)
        trainer.add_callback(ending)
    try:
        yield
    except KeyboardInterrupt as stop:
        number = stop.signal_number if isinstance(stop, Stopped) else signal.SIGINT
        raise Stopped(number, how_to_go_on(output_folder(trainer.args), with_checkpoints)) from stop
    except Exception as error:
        if not ending.asked:
            raise
        # The signal went to the data loader's workers too, and their end arrived before the step's.
        raise Stopped(signal.SIGTERM, how_to_go_on(output_folder(trainer.args), with_checkpoints)) from error
    finally:
        if waits:
            signal.signal(signal.SIGTERM, before)
            trainer.remove_callback(ending)
    if ending.asked:
        raise Stopped(signal.SIGTERM, how_to_go_on(output_folder(trainer.args), with_checkpoints))


def how_to_go_on(output: Path, with_checkpoints: bool) -> str:
    """Say from where the same command goes on."""
    checkpoint = next((path for path in checkpoints_of(output) if (path / RECORD).is_file()), None)
    if with_checkpoints and checkpoint is not None:
        return f"Start it again with --resume_from_checkpoint true: it goes on from {checkpoint}."
    return (
        "There is no checkpoint: it starts from the beginning again. --save_strategy steps --save_steps N writes some."
    )


class _Ending(TrainerCallback):
    """Ends training after a step and a checkpoint once SIGTERM has come, to whichever of the processes."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        if self.asked:
            raise Stopped(number)
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        """Save and stop, all processes after the same step."""
        if args.world_size > 1:
            asked = torch.tensor(float(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked.item())
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control
