"""transformers' Trainer with NoteLLM-2's pair loss: joined batches, GradCache, retrieval metrics, whole checkpoints."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from training.trainer.adapters import base_of, save_adapter
from training.trainer.arguments import NoteLLM2TrainingArguments
from training.trainer.batches import PairDataset
from training.trainer.checkpoints import STAGING, publish_checkpoint
from training.trainer.distributed import touch_unused, world_size
from training.trainer.grad_cache import GradCache
from training.trainer.losses import Entries, PairLoss, PairLossOutput
from training.trainer.monitor import TrainingMonitor
from training.trainer.sampling import DistinctItemsSampler
from training.trainer.vision_cache import complete_vision_features


class NoteLLM2Trainer(Trainer):
    """Trains a NoteLLM-2 model, or one with LoRA around it, on a `PairDataset`.

    Args:
        train_dataset: pairs with their items; the sampler orders them.
        negatives: finds the entries of a joined batch that are no negatives (`training.trainer.false_negatives.FalseNegatives`).
        lengths: (items,) length of each item, for `train_sampling_strategy: group_by_length`.
        measure: embeds and measures the evaluation items with the model it is given; a flat dict of metrics.
        arguments: those of `Trainer`; `data_collator` is a `PairCollator`. With `model_init` in place of `model`,
            `hyperparameter_search` trains a fresh model for each trial and reads `evaluate`'s metrics.

    Raises:
        ValueError: when several GPUs would share one process, which would tear pairs apart, and for `chunk_size` with
            an engine that GradCache can't drive.
    """

    # The loss is the mean over a batch's own pairs; Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False
    args: NoteLLM2TrainingArguments

    def __init__(
        self,
        *,
        train_dataset: PairDataset,
        negatives: Callable[[Tensor], Entries] | None = None,
        lengths: np.ndarray | None = None,
        measure: Callable[[nn.Module], dict[str, float]] | None = None,
        **arguments: Any,
    ):
        self.monitor = TrainingMonitor()  # first: a `model_init` is called while Trainer's own __init__ runs
        super().__init__(train_dataset=train_dataset, **arguments)
        self._check_engine()
        base = base_of(self.model)
        self.lengths, self.measure = lengths, measure
        self.monitor.watch(base)
        self.pair_loss = PairLoss(
            multimodal_weight=base.config.multimodal_loss_weight,
            visual_weight=base.config.visual_loss_weight,
            matryoshka_dims=self.args.matryoshka_dims,
            negatives=self.monitor.counting(negatives) if negatives is not None else None,
        )
        self.staging: str | None = None

    def _check_engine(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process. Start one process for each: "
                f"torchrun --nproc_per_node {self.args.n_gpu} training/run.py ..."
            )
        if self.args.chunk_size and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError("chunk_size works on one process or with DDP; with DeepSpeed and FSDP leave it at 0.")

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model, as for each trial of a search; the log is about it from now on."""
        model = super().call_model_init(trial)
        self.monitor.watch(base_of(model))
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Weighted mean of the multimodal and the visual loss over the joined batch of all processes (a scalar)."""
        item_index, num_pairs = inputs.pop("item_index"), int(inputs.pop("num_pairs"))
        outputs = model(**self._with_vision_features(inputs))
        losses = self.pair_loss(
            outputs.embeddings,
            outputs.visual_embeddings,
            outputs.has_image,
            item_index,
            num_pairs,
            base_of(self.model).logit_scale,
        )
        self._take_down(losses, item_index)
        loss = losses.loss + touch_unused(base_of(self.model), outputs.has_image)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One batch forward and backward: all items at once, or in chunks of `chunk_size` (GradCache)."""
        if not self.args.chunk_size:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        item_index, num_pairs = inputs.pop("item_index"), int(inputs.pop("num_pairs"))
        base = base_of(self.model)
        cache = GradCache(
            self.args.chunk_size,
            backward=self.accelerator.backward,
            no_sync=partial(self.accelerator.no_sync, model),
            autocast=self.accelerator.autocast,
        )
        steps = self.current_gradient_accumulation_steps
        with self.compute_loss_context_manager():
            inputs = self._with_vision_features(inputs) if "cached_images" in inputs else inputs
            loss = partial(self.pair_loss, item_index=item_index, num_pairs=num_pairs)
            losses = cache.step(model, base, inputs, loss, divisor=steps)
        self._take_down(losses, item_index)
        return losses.loss / steps

    def _with_vision_features(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`complete_vision_features` in the run's precision: the model's forward has its own, the encoder beside it hasn't."""
        with self.accelerator.autocast():
            return complete_vision_features(base_of(self.model), inputs)

    def _take_down(self, losses: PairLossOutput, item_index: Tensor) -> None:
        """Keep the figures for the log; a loss that is no number ends the run here, with the items that gave it."""
        if not torch.isfinite(losses.loss):
            items = self.train_dataset.items
            ids = [items.item_ids[position] for position in item_index.tolist()]
            raise FloatingPointError(
                f"The loss is {losses.loss.item()} at step {self.state.global_step + 1}. Items of this process's batch: "
                f"{', '.join(map(str, ids))}. Look at their images and texts, lower the learning rate, or train in "
                "bfloat16 instead of float16."
            )
        self.monitor.add(losses, len(item_index) * world_size())

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """As Trainer's, with the time taken that it waits for data."""
        with self.monitor.waiting():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the monitor's figures to a line about training."""
        if "loss" in logs:
            logs |= self.monitor.take()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Retrieval metrics of the evaluation items, each as `eval_...`: `eval_recall@100` and the like.

        Raises:
            ValueError: when the trainer was made without `measure`.
        """
        if self.measure is None:
            raise ValueError("There is nothing to evaluate on: name a pair table as eval_pairs.")
        found = self.measure(self.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def leave_autocast(self) -> None:
        """Gives the model its own forward back, in which accelerate wraps mixed precision: what is measured after training
        is the model that is saved, in the type of its weights. Sharded models (FSDP, DeepSpeed) keep theirs."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over `parameter_groups`."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(parameter_groups(model or self.model, self.args), **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: PairDataset | None = None) -> DistinctItemsSampler:
        """Batches of all processes together hold no item twice: accelerate deals them out in turn."""
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return DistinctItemsSampler(
            self.train_dataset.pairs,
            self._train_batch_size * self.args.world_size,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            self.lengths if grouped else None,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):
            save_adapter(self.model, Path(output_dir or self.args.output_dir), state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return self.staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written in a folder aside, then renamed, so that a checkpoint is whole or not there."""
        folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged = folder / STAGING
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.staging = str(staged)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._publish(staged / name, folder / name)
            shutil.rmtree(staged, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _publish(self, staged: Path, final: Path) -> None:
        best = final.with_name(f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and (best == final or best.exists()):
            self.state.best_model_checkpoint = str(best)
        self.state.save_to_json(str(staged / "trainer_state.json"))
        publish_checkpoint(staged, final)
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )


def parameter_groups(model: nn.Module, arguments: NoteLLM2TrainingArguments) -> list[dict[str, Any]]:
    """Trainable parameters by part (pretrained backbones, new parts) and by decay (matrices, vectors and scalars).

    Frozen parameters, the vision encoder's among them, are in no group.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        pretrained = not {"language_model", "vision_model"}.isdisjoint(name.split("."))
        decays = parameter.dim() >= 2
        group = groups.setdefault(
            (pretrained, decays),
            {
                "params": [],
                "lr": arguments.learning_rate if pretrained else arguments.connector_learning_rate,
                "weight_decay": arguments.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
