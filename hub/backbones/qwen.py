"""Qwen 1 (the research code's Qwen variant: `transformer.h.N.attn.c_attn` ...) as a Qwen2 model of transformers.

Both are the same function up to the trained length: rotary positions of halves, RMSNorm, biases on query, key and value
alone, SwiGLU. Qwen 1 keeps query, key and value in one matrix, calls the gate `w2` and the other half `w1`, and its config's
`intermediate_size` counts both halves. Beyond `seq_length` tokens Qwen 1 stretches its rotary base (dynamic NTK) and scales
queries by the logarithm of the length; Qwen2 does neither, so the two agree up to that length only. Published items
have at most 140 text tokens and 16 visual ones.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch


TRANSFORMER = "transformer."
"""Head of the names of Qwen 1's weights in a research checkpoint."""

RENAMES = {
    r"wte\.weight": "embed_tokens.weight",
    r"ln_f\.weight": "norm.weight",
    r"h\.(\d+)\.ln_1\.weight": r"layers.\1.input_layernorm.weight",
    r"h\.(\d+)\.ln_2\.weight": r"layers.\1.post_attention_layernorm.weight",
    r"h\.(\d+)\.attn\.c_proj\.weight": r"layers.\1.self_attn.o_proj.weight",
    r"h\.(\d+)\.mlp\.w1\.weight": r"layers.\1.mlp.up_proj.weight",
    r"h\.(\d+)\.mlp\.w2\.weight": r"layers.\1.mlp.gate_proj.weight",
    r"h\.(\d+)\.mlp\.c_proj\.weight": r"layers.\1.mlp.down_proj.weight",
}
FUSED = re.compile(r"h\.(\d+)\.attn\.c_attn\.(weight|bias)")
# Qwen-VL's and Qwen's buffers, computed from the config.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.masked_bias|attn\.logn_tensor|attn\.bias)$")


def qwen2_config(qwen: Mapping[str, Any]) -> dict[str, Any]:
    """A Qwen2 config of the same function as a Qwen 1 config.

    Raises:
        ValueError: for a setting that Qwen2 doesn't have, naming it.
    """
    hidden, heads = qwen["hidden_size"], qwen["num_attention_heads"]
    expected = {"kv_channels": hidden // heads, "rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True}
    for key, value in expected.items():
        if qwen.get(key, value) != value:
            raise ValueError(f"text_config {key}={qwen[key]!r} is not supported; expected {value!r}.")
    return {
        "model_type": "qwen2",
        "vocab_size": qwen["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": qwen["intermediate_size"] // 2,
        "num_hidden_layers": qwen["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": qwen.get("layer_norm_epsilon", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(qwen.get("rotary_emb_base", 10000))},
        "max_position_embeddings": qwen.get("seq_length", 2048),
        "tie_word_embeddings": False,
    }


def qwen2_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names of the research code's Llama variant (`model.layers.N.self_attn.q_proj` ...).

    Args:
        weights: of the whole research model; those that are not the LLM's keep their names. `c_attn` is
            `(3 * width, width)`, query above key above value.
    """
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        inner = name.removeprefix(TRANSFORMER)
        fused = FUSED.fullmatch(inner)
        if not name.startswith(TRANSFORMER):
            converted[name] = tensor
        elif fused:
            layer, kind = fused.groups()
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] = rows.contiguous()
        elif not BUFFERS.search(inner):
            converted[f"model.{_rename(inner)}"] = tensor
    return converted


def _rename(name: str) -> str:
    """Qwen2's name of a weight; a name that is none of Qwen 1's stays, and is then reported as left over."""
    for pattern, replacement in RENAMES.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name
