"""Checkpoints of the research code other than the reference: its Qwen variant, pickled weights, and files that lie."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hub.backbones.research import convert, read_weights


ROOT = Path(__file__).parents[3]
FULL = Path(__file__).parents[2] / "reference" / "official" / "full"
QWEN = {
    "model_type": "qwen",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 5000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "seq_length": 256,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}


def qwen_weights() -> dict[str, torch.Tensor]:
    """Random weights under Qwen 1's names, norms and biases far from their usual start."""
    generator = torch.Generator().manual_seed(1)
    width, inner = QWEN["hidden_size"], QWEN["intermediate_size"] // 2
    shapes = {"wte.weight": (QWEN["vocab_size"], width), "ln_f.weight": (width,)}
    for layer in range(QWEN["num_hidden_layers"]):
        shapes |= {
            f"h.{layer}.ln_1.weight": (width,),
            f"h.{layer}.ln_2.weight": (width,),
            f"h.{layer}.attn.c_attn.weight": (3 * width, width),
            f"h.{layer}.attn.c_attn.bias": (3 * width,),
            f"h.{layer}.attn.c_proj.weight": (width, width),
            f"h.{layer}.mlp.w1.weight": (inner, width),
            f"h.{layer}.mlp.w2.weight": (inner, width),
            f"h.{layer}.mlp.c_proj.weight": (width, inner),
        }
    return {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def qwen_forward(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Last hidden states of a Qwen 1 model, written from its equations: `x` is `(n, length, width)`."""
    heads, length = QWEN["num_attention_heads"], x.shape[1]
    per_head = x.shape[2] // heads
    frequencies = QWEN["rotary_emb_base"] ** (-torch.arange(0, per_head, 2, dtype=torch.float64) / per_head)
    angles = (torch.arange(length, dtype=torch.float64)[:, None] * frequencies).float()
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(states, name):
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + QWEN["layer_norm_epsilon"]) * weights[name]

    def rotate(states):
        first, second = states.chunk(2, dim=-1)  # real and imaginary parts
        turned = torch.complex(first, second) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    for layer in range(QWEN["num_hidden_layers"]):
        own = f"h.{layer}."
        mixed = F.linear(
            norm(x, f"{own}ln_1.weight"), weights[f"{own}attn.c_attn.weight"], weights[f"{own}attn.c_attn.bias"]
        )
        q, k, v = (part.unflatten(-1, (heads, per_head)).transpose(1, 2) for part in mixed.split(x.shape[2], dim=-1))
        scores = rotate(q) @ rotate(k).transpose(2, 3) / math.sqrt(per_head)
        later = torch.ones(length, length).triu(1).bool()
        seen = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        x = x + F.linear(seen.transpose(1, 2).flatten(2), weights[f"{own}attn.c_proj.weight"])
        inner = norm(x, f"{own}ln_2.weight")
        up, gate = (F.linear(inner, weights[f"{own}mlp.{name}.weight"]) for name in ("w1", "w2"))
        x = x + F.linear(up * F.silu(gate), weights[f"{own}mlp.c_proj.weight"])
    return norm(x, "ln_f.weight")


def qwen_checkpoint() -> tuple[dict[str, torch.Tensor], dict]:
    """The reference's full variant with a Qwen 1 as its LLM: weights with an output layer and buffers, and config."""
    weights = {name: w for name, w in load_file(FULL / "weights.safetensors").items() if not name.startswith("model.")}
    weights |= {f"transformer.{name}": tensor for name, tensor in qwen_weights().items()}
    weights |= {"transformer.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": torch.ones(320, 64)}
    config = json.loads((FULL / "config.json").read_text())
    return weights, {**config, "class_name": "MQwen", "text_config": QWEN}


def test_qwen_computes_what_qwen_1_computes(tmp_path):
    weights, config = qwen_checkpoint()
    torch.save(weights, tmp_path / "pytorch_model.bin")  # as zero_to_fp32.py writes it
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "hub/convert_official.py", "--weights", tmp_path / "pytorch_model.bin"]
    command += ["--config", tmp_path / "config.json", "--output", tmp_path / "converted"]
    subprocess.run(command, check=True, cwd=ROOT)
    model = AutoModel.from_pretrained(tmp_path / "converted", trust_remote_code=True).eval()
    assert model.config.text_config.model_type == "qwen2"
    x = torch.randn(2, 40, QWEN["hidden_size"], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model.language_model(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(ours, qwen_forward(qwen_weights(), x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.get_input_embeddings().weight, qwen_weights()["wte.weight"])
    torch.testing.assert_close(model.reduction.weight, weights["linear.weight"])


@pytest.mark.parametrize(("key", "value"), [("kv_channels", 8), ("rotary_pct", 0.5), ("no_bias", False)])
def test_what_qwen2_has_not_is_refused(key, value):
    weights, config = qwen_checkpoint()
    with pytest.raises(ValueError, match=f"{key}={value}"):
        convert(weights, {**config, "text_config": {**QWEN, key: value}})


def test_missing_and_strange_weights_are_named():
    weights, config = qwen_checkpoint()
    weights["transformer.h.0.attn.c_attn.scale"] = weights.pop("transformer.h.1.mlp.w2.weight")
    with pytest.raises(ValueError) as error:
        convert(weights, config)
    assert "layers.1.mlp.gate_proj.weight" in str(error.value) and "h.0.attn.c_attn.scale" in str(error.value)


def test_weights_in_several_files(tmp_path):
    weights = load_file(FULL / "weights.safetensors")
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, own in parts.items():
        torch.save({name: weights[name] for name in own}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    places = {name: file for file, own in parts.items() for name in own}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    read = read_weights(index)
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in names)

    index.write_text(json.dumps({"weight_map": {**places, "more": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(ValueError, match="differ"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.bin"}}))
    with pytest.raises(ValueError, match="lie beside"):
        read_weights(index)


class Code:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, way):
    mark, path = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    content = {"linear.weight": torch.ones(2), "x": Code(mark)}
    if way == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    command = [sys.executable, "hub/convert_official.py", "--weights", path, "--config", FULL / "config.json"]
    result = subprocess.run([*command, "--output", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and not mark.exists() and not (tmp_path / "out").exists()
    assert "never run" in result.stderr and "Traceback" not in result.stderr


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match="no state dict"):
        read_weights(tmp_path / "nested.pt")
    (tmp_path / "cut.bin").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="damaged"):
        read_weights(tmp_path / "cut.bin")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "a.weights")
    with pytest.raises(ValueError, match="expected a .safetensors"):
        read_weights(tmp_path / "a.weights")
