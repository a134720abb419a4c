"""`auto` is bfloat16 where the machine multiplies it, and float32 everywhere else: torch's answers for each kind of machine."""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from modeling_notellm2 import choose_precision


ZEN3 = {"avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}
SKYLAKE = ZEN3 | {"avx512_f": True}
ZEN4 = SKYLAKE | {"avx512_bf16": True}
SAPPHIRE_RAPIDS = ZEN4 | {"amx_bf16": True}
GRAVITON2 = {"neon": True, "bf16": False}
GRAVITON3 = {"neon": True, "bf16": True}


@pytest.mark.parametrize(
    ("capabilities", "level", "onednn", "expected"),
    [
        # oneDNN takes bfloat16 on any AVX512, multiplying it as float32.
        pytest.param(ZEN3, "AVX2", False, "float32 (auto: this CPU has no bfloat16 arithmetic)", id="AVX2"),
        pytest.param(SKYLAKE, "AVX512", True, "float32 (auto: this CPU has no bfloat16 arithmetic)", id="AVX512"),
        pytest.param(ZEN4, "AVX512", True, "bfloat16 (auto: this CPU has AVX512-BF16)", id="AVX512-BF16"),
        pytest.param(SAPPHIRE_RAPIDS, "AVX512", True, "bfloat16 (auto: this CPU has AMX)", id="AMX"),
        pytest.param(
            ZEN4, "AVX2", True, "float32 (auto: this CPU has AVX512-BF16, but torch is limited to AVX2)", id="limited"
        ),
        pytest.param(
            ZEN4,
            "AVX512",
            False,
            "float32 (auto: this CPU has AVX512-BF16, but torch's oneDNN is missing or limited to less)",
            id="oneDNN limited",
        ),
        pytest.param(GRAVITON2, "DEFAULT", False, "float32 (auto: this CPU has no bfloat16 arithmetic)", id="ARM"),
        pytest.param(GRAVITON3, "DEFAULT", True, "bfloat16 (auto: this CPU has ARM's BF16)", id="ARM BF16"),
        pytest.param(
            GRAVITON3,
            "DEFAULT",
            None,
            "float32 (auto: this CPU has ARM's BF16, but torch's oneDNN is missing or limited to less)",
            id="no oneDNN",
        ),
    ],
)
def test_the_choice_on_each_kind_of_cpu(monkeypatch, capabilities, level, onednn, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn is not None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    chosen = choose_precision("auto", "cpu")
    assert str(chosen) == expected
    assert chosen.dtype == getattr(torch, expected.split()[0])


def test_a_torch_that_cannot_say_gets_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_precision().name == "float32"
    assert "can't say" in choose_precision().reason


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("NVIDIA H100", True, "bfloat16 (auto: NVIDIA H100 has bfloat16 arithmetic)"),
        ("Tesla T4", False, "float32 (auto: Tesla T4 has no bfloat16 arithmetic)"),
    ],
)
def test_a_gpu_must_have_it_and_not_only_emulate_it(monkeypatch, name, own, expected):
    module = SimpleNamespace(
        is_bf16_supported=lambda including_emulation=True: own or including_emulation,
        get_device_name=lambda device: name,
        device=lambda device: nullcontext(),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert str(choose_precision("auto", "cuda:0")) == expected


def test_a_device_that_cannot_say_gets_float32(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert str(choose_precision("auto", "mps")) == "float32 (auto: torch can't say whether mps has bfloat16 arithmetic)"


def test_what_is_asked_for_is_taken():
    assert str(choose_precision("float16")) == "float16 (asked for)"
    with pytest.raises(ValueError, match="dtype is 'bf16'; expected auto, float32, bfloat16, float16"):
        choose_precision("bf16")


@pytest.mark.skipif("avx2" not in torch.cpu.get_capabilities(), reason="only x86 has these limits")
@pytest.mark.parametrize("limit", [{"ATEN_CPU_CAPABILITY": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}])
def test_a_process_limited_to_avx2_computes_in_float32(limit):
    """Nothing faked: whatever this CPU has, torch doesn't use it there, and bfloat16 would be many times slower."""
    code = "from modeling_notellm2 import choose_precision; print(choose_precision())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **limit}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    limited = "limited to" if torch.cpu.get_capabilities()["avx512_bf16"] else "no bfloat16 arithmetic"
    assert done.stdout.startswith("float32 (auto: ")
    assert limited in done.stdout
