"""The type of number that a model computes in, chosen by the machine: bfloat16 where that is fast, else float32.

A CPU without bfloat16 arithmetic takes bfloat16 too, but turns every number into float32 and back, many times slower than
float32 itself. So `auto` asks torch what the machine has, and what torch was told to use of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .dtypes_notellm2 import DTYPES


BFLOAT16_ARITHMETIC = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "ARM's BF16"}
"""Instructions that multiply bfloat16, by torch's name for them, best first."""

BELOW_AVX512 = ("DEFAULT", "NO AVX", "AVX2")
"""Levels of torch's own CPU code that leave those instructions of x86 alone (ATEN_CPU_CAPABILITY sets a lower one)."""


@dataclass(frozen=True)
class Precision:
    """A type of number and why it was chosen.

    Attributes:
        name: float32, bfloat16 or float16.
        reason: for people.
    """

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.name)

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_precision(dtype: str = "auto", device: str | torch.device = "cpu") -> Precision:
    """Choose the type that a model computes in.

    Args:
        dtype: of `DTYPES`; all but auto are taken as they are.
        device: where the model runs, as torch names it.

    Raises:
        ValueError: for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}.")
    if dtype != "auto":
        return Precision(dtype, "asked for")
    device = torch.device(device)
    fast, why = _cpu_answer() if device.type == "cpu" else _accelerator_answer(device)
    return Precision("bfloat16" if fast else "float32", f"auto: {why}")


def _cpu_answer() -> tuple[bool, str]:
    """Whether this CPU multiplies bfloat16 and torch lets it, and why (not)."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False, f"torch {torch.__version__} can't say whether this CPU has bfloat16 arithmetic"
    capabilities = torch.cpu.get_capabilities()
    instructions = [name for key, name in BFLOAT16_ARITHMETIC.items() if capabilities.get(key)]
    if not instructions:
        return False, "this CPU has no bfloat16 arithmetic"
    level = torch.backends.cpu.get_cpu_capability()
    if level in BELOW_AVX512 and not capabilities.get("bf16"):
        return False, f"this CPU has {instructions[0]}, but torch is limited to {level}"
    # oneDNN multiplies matrices for torch; DNNL_MAX_CPU_ISA limits it, which no public function tells.
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False, f"this CPU has {instructions[0]}, but torch's oneDNN is missing or limited to less"
    return True, f"this CPU has {instructions[0]}"


def _accelerator_answer(device: torch.device) -> tuple[bool, str]:
    """Whether a GPU or its like has bfloat16 arithmetic of its own, and why (not)."""
    module = torch.get_device_module(device)
    if not hasattr(module, "is_bf16_supported"):
        return False, f"torch can't say whether {device.type} has bfloat16 arithmetic"
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    with module.device(device):
        fast = module.is_bf16_supported(including_emulation=False)
    return fast, f"{name} has {'' if fast else 'no '}bfloat16 arithmetic"


def cast_part(model: nn.Module, dtype: torch.dtype) -> None:
    """As `Module.to(dtype)`, which would cut complex buffers (Llama 4's rotations) to their real parts."""
    rotations = {name: buffer for name, buffer in model.named_buffers() if buffer.is_complex()}
    nn.Module.to(model, dtype)
    for name, buffer in rotations.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)


def keep_precision_apart(model: PreTrainedModel, backbones: Sequence[str]) -> None:
    """Let a backbone's rules of what stays in float32 hold for the backbone alone.

    They are patterns that transformers looks for in all names: `gate.weight` would be found in `late_fusion` too.

    Args:
        backbones: names of the model's attributes that have such rules.
    """
    for rules in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        patterns = {name: getattr(getattr(model, name), rules, None) or () for name in backbones}
        setattr(model, rules, {f"{name}.+{pattern}" for name in backbones for pattern in patterns[name]})


__all__ = ["Precision", "cast_part", "choose_precision", "keep_precision_apart"]
