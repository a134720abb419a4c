"""Stopping a training from outside: SIGTERM ends it after the step and a checkpoint, Ctrl-C at once; both say how to go on."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import seed_worker

from training.tables.commands.handler import Stopped
from training.trainer.checkpoints import RECORD, checkpoints_of, output_folder


SAME_SIGNAL = 5.0
"""Seconds within which a second SIGTERM is the first one again: torchrun passes on what its whole group was sent."""


def start_worker(worker_id: int, num_workers: int, rank: int) -> None:
    """Seed a data loader's worker, and have it end by SIGTERM only when its parent sends it.

    A scheduler sends the signal to all processes of a job, and the step under way still needs its batches. Systems that
    don't say who sent a signal (macOS) keep the usual way.
    """
    seed_worker(worker_id, num_workers, rank)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def stoppable(trainer: Trainer) -> Iterator[None]:
    """Train within the block.

    Where checkpoints are on, SIGTERM waits for the end of the step and for a checkpoint; one that comes more than
    `SAME_SIGNAL` seconds later doesn't wait.

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
        # The signal went to other processes too, and their end arrived before the step's.
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
        self.first = 0.0

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        if not self.asked:
            self.asked, self.first = True, time.monotonic()
        elif time.monotonic() - self.first > SAME_SIGNAL:
            raise Stopped(number)

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
