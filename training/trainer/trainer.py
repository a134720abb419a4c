"""transformers' Trainer with NoteLLM-2's pair loss: joined batches, GradCache, retrieval metrics, whole checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from training.batches.collators import PairCollator, PairDataset
from training.batches.sampling import DistinctItemsSampler
from training.trainer.adapters import save_adapter, save_gathered, unwrap_adapter
from training.trainer.arguments import NoteLLM2TrainingArguments
from training.trainer.checkpoints import LossSoFar, WholeCheckpoints
from training.trainer.distributed import (
    EngineBackward,
    gathered_once,
    gathered_state,
    layer_classes,
    shard_on_cpu,
    world_size,
)
from training.trainer.grad_cache import GradCache
from training.trainer.losses import PairLoss, PairLossOutput
from training.trainer.monitor import TrainingMonitor
from training.trainer.stopping import start_worker
from training.trainer.tiles import Entries


BACKBONES = {"language_model", "vision_model"}
RATES_OF_PARTS = {
    "qformer": "qformer_learning_rate",
    "query_tokens": "qformer_learning_rate",
    "projector": "qformer_learning_rate",
    "late_fusion": "late_fusion_learning_rate",
    "reduction": "reduction_learning_rate",
    "logit_scale": "logit_scale_learning_rate",
}
"""Parts of the model that may have a learning rate of their own, and the option that sets it."""


class NoteLLM2Trainer(Trainer):
    """Trains a NoteLLM-2 model, or one with LoRA around it, on a `PairDataset`.

    Args:
        train_dataset: pairs with their items; the sampler orders them.
        false_negatives: finds the entries of a joined batch that are no negatives
            (`training.batches.false_negatives.FalseNegatives`).
        positives: finds those that are positives beside a row's partner; None: none.
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
    model: NoteLLM2Model | PeftModel
    train_dataset: PairDataset
    data_collator: PairCollator
    processing_class: NoteLLM2Processor

    def __init__(
        self,
        *,
        train_dataset: PairDataset,
        false_negatives: Callable[[Tensor], Entries] | None = None,
        positives: Callable[[Tensor], Entries] | None = None,
        lengths: np.ndarray | None = None,
        measure: Callable[[nn.Module], dict[str, float]] | None = None,
        **arguments: Any,
    ):
        self.monitor = TrainingMonitor()  # first: a `model_init` is called while Trainer's own __init__ runs
        super().__init__(train_dataset=train_dataset, **arguments)
        base = unwrap_adapter(self.model)
        self._check_engine(base.config.freeze_vision)
        if self.is_fsdp_enabled:
            self._plan_shards(base)
        self.loss_so_far = LossSoFar()
        self.add_callback(self.loss_so_far)
        self.add_callback(WholeCheckpoints())
        self.lengths, self.measure = lengths, measure
        self.monitor.watch(base)
        self.pair_loss = PairLoss(
            multimodal_weight=base.config.multimodal_loss_weight,
            visual_weight=base.config.visual_loss_weight,
            matryoshka_dims=self.args.matryoshka_dims,
            false_negative_margin=self.args.false_negative_margin,
            false_negatives=self.monitor.counting(false_negatives) if false_negatives is not None else None,
            positives=positives,
        )

    def _check_engine(self, frozen_vision: bool) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process. Start one process for each: "
                f"torchrun --nproc_per_node {self.args.n_gpu} training/run.py ..."
            )
        if self.is_fsdp_enabled and isinstance(self.model, PeftModel) and self.in_shards:
            raise ValueError(
                "LoRA with FSDP needs state_dict_type: FULL_STATE_DICT in fsdp_config: an adapter's checkpoint in shards "
                "would leave out what is trained beside it."
            )
        features = getattr(getattr(self.data_collator, "collate_items", None), "features", None)
        if self.args.shard_frozen_vision and frozen_vision and features is not None:
            raise ValueError(
                "cache_vision_features and shard_frozen_vision exclude each other: a process whose pictures are all stored "
                "would not take part when the others gather the encoder's weights."
            )

    def _plan_shards(self, base: NoteLLM2Model) -> None:
        """Which modules FSDP gathers one by one, unless the config names them, and which stay whole."""
        plugin = self.accelerator.state.fsdp_plugin
        vision = base.vision_parts
        parts: list[nn.Module] = [base.get_decoder()]
        parts += [part for part in base.children() if part is not base.language_model and part not in vision]
        if base.config.freeze_vision and not self.args.shard_frozen_vision:
            plugin.ignored_modules = vision
        else:
            parts += vision
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = layer_classes(*parts)

    @property
    def in_shards(self) -> bool:
        """Whether checkpoints are written in FSDP's shards."""
        return self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; FSDP works on CPUs too."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.device.type == "cpu":
            shard_on_cpu(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
            self.is_fsdp_enabled = True

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model, as for each trial of a search; the log is about it from now on."""
        model = super().call_model_init(trial)
        self.monitor.watch(unwrap_adapter(model))
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Weighted mean of the multimodal and the visual loss over the joined batch of all processes (a scalar)."""
        pairs = take_pairs(inputs)
        with self.forward_context():
            outputs = model(**inputs)
        losses = self.pair_loss(
            outputs.embeddings,
            outputs.visual_embeddings,
            outputs.has_image,
            logit_scale=outputs.logit_scale,
            **pairs,
        )
        self.record_losses(losses, pairs["item_index"], outputs.logit_scale)
        return (losses.loss, outputs) if return_outputs else losses.loss

    def forward_context(self) -> Any:
        """Mixed precision around forward passes where accelerate doesn't put it inside: FSDP casts weights alone."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One batch forward and backward: all items at once, or in chunks of `chunk_size` (GradCache)."""
        if not self.args.chunk_size:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        pairs = take_pairs(inputs)
        base = unwrap_adapter(self.model)
        cache = GradCache(self.args.chunk_size, *self._backward(model), autocast=self.forward_context)
        steps = self.current_gradient_accumulation_steps
        scales: list[Tensor] = []

        def loss(**embedded: Any) -> PairLossOutput:
            scales.append(embedded["logit_scale"])
            return self.pair_loss(**embedded, **pairs)

        with self.compute_loss_context_manager(), self._gathered(model):
            losses = cache.step(model, base, inputs, loss, divisor=steps)
        self.record_losses(losses, pairs["item_index"], scales[-1])
        return losses.loss / steps

    def _backward(self, model: nn.Module) -> tuple[Callable[[Tensor], None], Callable[[], AbstractContextManager]]:
        """The backward pass of a chunk, and the context of all chunks of a batch but the last."""
        last_batch = self.accelerator.sync_gradients
        if self.is_deepspeed_enabled:
            engine = EngineBackward(self.accelerator.deepspeed_engine_wrapped, last_batch)
            return engine, engine.no_step
        # In a batch that is only added to others, no chunk is exchanged: Trainer's own `no_sync` is around it.
        return self.accelerator.backward, partial(self.accelerator.no_sync, model) if last_batch else nullcontext

    def _gathered(self, model: nn.Module) -> Any:
        """All chunks with weights that are gathered once."""
        if not self.is_fsdp_enabled or self.args.gather_for_each_chunk:
            return nullcontext()
        return gathered_once(model, self.accelerator.state.fsdp_plugin.reshard_after_forward)

    def record_losses(self, losses: PairLossOutput, item_index: Tensor, logit_scale: Tensor) -> None:
        """Keep the figures for the log; a loss that is not a number ends the run here, with the items that gave it."""
        if not torch.isfinite(losses.loss):
            items = self.train_dataset.items
            ids = [items.item_ids[position] for position in item_index.tolist()]
            raise FloatingPointError(
                f"The loss is {losses.loss.item()} at step {self.state.global_step + 1}. Items of this process's batch: "
                f"{', '.join(map(str, ids))}. Look at their images and texts, lower the learning rate, or train in "
                "bfloat16 instead of float16."
            )
        self.monitor.add(losses, len(item_index) * world_size(), logit_scale)
        self.loss_so_far.add(losses.loss)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """As Trainer's, with the time taken that it waits for data. None where a restart finds all steps done."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        with self.monitor.waiting():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the monitor's figures to a line about training; the last line's loss is the whole run's, restarts and all."""
        if "loss" in logs:
            logs |= self.monitor.take()
        if "train_loss" in logs:
            logs["train_loss"] = self.loss_so_far.mean
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
        measured = self.measure(self.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
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
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(
                self.args,
                self.model,  # type: ignore[arg-type]  # Trainer itself hands adapters over
            )
            self.optimizer = optimizer_class(parameter_groups(model or self.model, self.args), **options)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Batches of all processes together hold no item twice: the sampler makes them, accelerate deals them out in turn."""
        args = self.args
        grouped = args.train_sampling_strategy == "group_by_length"
        sampler = DistinctItemsSampler(
            self.train_dataset.pairs,
            args.per_device_train_batch_size * args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
            self.lengths if grouped else None,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_size=args.per_device_train_batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(start_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        return self.accelerator.prepare(loader)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model or adapter, processor and code. All processes call it: weights in shards are gathered first.

        A checkpoint in shards has no model beside them.
        """
        if _internal_call and self.in_shards:
            return
        if not (isinstance(self.model, PeftModel) or self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.is_fsdp_enabled:
            state = gathered_state(self.model, keep=self.args.should_save)
        else:
            state = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            save_adapter(self.model, folder, state)
        elif self.is_deepspeed_enabled:
            # Loading under ZeRO-3 notes every renaming of old checkpoints as done, and saving would undo them all.
            self.model.save_pretrained(folder, state_dict=state, save_original_format=False)
        else:
            save_gathered(self.model, folder, state)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")


def take_pairs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Take out of a batch what is the loss's and not the model's: which items, how many pairs, what each pair weighs."""
    return {
        "item_index": inputs.pop("item_index"),
        "num_pairs": int(inputs.pop("num_pairs")),
        "pair_weight": inputs.pop("pair_weight", None),
    }


def parameter_groups(model: nn.Module, arguments: NoteLLM2TrainingArguments) -> list[dict[str, Any]]:
    """Trainable parameters by part (pretrained backbones, new parts), learning rate, and decay (matrices, the rest).

    Frozen parameters, the vision encoder's among them, are in no group.
    """
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        pretrained = not BACKBONES.isdisjoint(name.split("."))
        rate = learning_rate_of(name, arguments)
        decays = parameter.dim() >= 2
        group = groups.setdefault(
            (pretrained, rate, decays),
            {
                "params": [],
                "lr": rate,
                "weight_decay": arguments.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate_of(name: str, arguments: NoteLLM2TrainingArguments) -> float:
    """The learning rate of a parameter: its part's own where that is set, else that of backbones or of new parts."""
    modules = name.split(".")
    if not BACKBONES.isdisjoint(modules):
        return arguments.learning_rate
    own = [getattr(arguments, option) for part, option in RATES_OF_PARTS.items() if part in modules]
    rate = next(filter(lambda rate: rate is not None, own), arguments.connector_learning_rate)
    assert rate is not None  # the arguments set it to learning_rate where it is left out
    return rate
