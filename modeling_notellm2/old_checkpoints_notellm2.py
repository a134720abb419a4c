"""Checkpoints of earlier versions: their logit scale is a scalar, which what spreads weights (FSDP2) can't cut."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter


SCALE = "logit_scale"


def unsqueeze_scale(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """For `load_state_dict`: the logit scale of older checkpoints is a scalar."""
    name = f"{prefix}{SCALE}"
    if name in state_dict:
        state_dict[name] = torch.atleast_1d(state_dict[name])


class _UnsqueezeScale(ConversionOps):
    """For `from_pretrained`: as `unsqueeze_scale`. What is saved stays as it is."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, Any]:
        """The tensor under its target's name; that of the model itself with one dimension, a backbone's unchanged."""
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return {target_patterns[0]: torch.atleast_1d(tensor) if full_layer_name == SCALE else tensor}

    @property
    def reverse_op(self) -> ConversionOps:
        return _UnsqueezeScale()


def read_old_scales(model_class: type[PreTrainedModel]) -> None:
    """Let `from_pretrained` of a class read the checkpoints whose logit scale is a scalar."""
    converter = WeightConverter(SCALE, SCALE, [_UnsqueezeScale()])
    register_checkpoint_conversion_mapping(model_class.__name__, [converter], overwrite=True)
