"""transformers' Trainer with NoteLLM-2's pair loss, two learning rates and batches of distinct items."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from training.arguments import NoteLLM2TrainingArguments
from training.batches import DistinctItemsSampler, PairDataset
from training.data import PairTable


LOGGED_LOSSES = ("multimodal_loss", "visual_loss")


class NoteLLM2Trainer(Trainer):
    """Trains a NoteLLM-2 model on a `PairDataset`.

    Args:
        pairs: the dataset's pairs, which the sampler orders.
        arguments: those of `Trainer`; `data_collator` is a `PairCollator`.

    Raises:
        ValueError: when several GPUs would share one process, which would tear pairs apart.
    """

    # The loss is the mean over a batch's own pairs; Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False
    args: NoteLLM2TrainingArguments

    def __init__(self, *, pairs: PairTable, train_dataset: PairDataset, **arguments: Any):
        super().__init__(train_dataset=train_dataset, **arguments)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process. Start one process for each: "
                f"torchrun --nproc_per_node {self.args.n_gpu} training/run.py ..."
            )
        self.pairs = pairs
        self.sums: dict[str, list[Tensor]] = defaultdict(list)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Weighted mean of the multimodal and the visual loss (a scalar); both are kept for the next log."""
        outputs = model(**inputs, return_loss=True)
        if model.training:
            for name in LOGGED_LOSSES:
                if outputs[name] is not None:
                    self.sums[name].append(outputs[name].detach())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add both losses' means since the last log, and the logit scale."""
        if "loss" in logs:
            for name, values in self.sums.items():
                logs[name] = torch.stack(values).mean().item()
            self.sums.clear()
            logs["logit_scale"] = self.model.logit_scale.item()
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over `parameter_groups`."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(parameter_groups(model or self.model, self.args), **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: PairDataset | None = None) -> DistinctItemsSampler:
        return DistinctItemsSampler(self.pairs, self._train_batch_size, self.args.data_seed or self.args.seed)


def parameter_groups(model: nn.Module, arguments: NoteLLM2TrainingArguments) -> list[dict[str, Any]]:
    """Trainable parameters by part (pretrained backbones, new parts) and by decay (matrices, vectors and scalars).

    Frozen parameters, the vision encoder's among them, are in no group.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        pretrained = name.removeprefix("module.").startswith(("language_model.", "vision_model."))
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
