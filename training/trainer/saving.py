"""Saves what a run has trained, as users load it: model or adapter, processor and code, whole or not at all."""

from contextlib import ExitStack
from pathlib import Path

from accelerate.utils import broadcast_object_list

from training.reporting.evaluation_plots import EVALUATION
from training.reporting.run_plots import RUN_PLOTS
from training.tables.commands.files import atomic_write, remove_files
from training.trainer.adapters import save_merged, unwrap_adapter
from training.trainer.arguments import READING
from training.trainer.trainer import NoteLLM2Trainer


OF_ONE_MODEL = ("metrics.json", "report.html", *EVALUATION, *RUN_PLOTS)
"""Files of a run's folder that say something false as soon as another model stands there."""


def save_model(trainer: NoteLLM2Trainer, folder: Path, merge: bool) -> None:
    """Write model or adapter, processor and code, in place of an older one with what was said of it.

    All processes call it.
    """
    first = trainer.is_world_process_zero()
    with ExitStack() as stack:
        place = broadcast_object_list([stack.enter_context(atomic_write(folder)) if first else None])[0]
        saved = place.with_name("adapter") if merge else place
        trainer.save_model(str(saved))  # gathers weights that are spread over processes; saves the processor too
        if merge and first:
            base = unwrap_adapter(trainer.model)
            reading = {name: getattr(base.config, name) for name in READING if hasattr(base.config, name)}
            save_merged(saved, place, base.dtype, **reading)
            trainer.processing_class.save_pretrained(place)
        if first:
            (place / "training_args.bin").unlink(missing_ok=True)  # a pickle with this machine's paths
            remove_files(folder.parent, OF_ONE_MODEL)  # first: a kill now leaves none that speaks of another model
