"""Every LLM family of the installed transformers, tiny: its own default config shrunk by the names of its fields.

No family is named here. A field that a new family brings is shrunk by what its name says; what stays big is a family that
the matrix of tests reports as too big, not one that it passes over.
"""

import contextlib
import dataclasses
import importlib
import inspect
import re
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


VOCABULARY = 290
LAYERS = 4
WIDTH = 64
HEADS = 4
HEAD_WIDTH = WIDTH // HEADS
TOKEN_ID = r".*(token_(id|index)|_id|_index)"
FIRST_TOKEN_ID = 265
# What the name of a whole-numbered field says about it, the first pattern that fits.
SIZES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_per_layer_input|_base)?|.*_vocab", VOCABULARY),
    (r"(first_k_dense_replace|num_dense_layers|n_layers_per_attn_res_block|.*_(interval|period)|.*_every_n_layers)", 2),
    (r"(decoder_sparse_step|interleave_moe_layer_step|expert_layer_offset|attn_layer_offset|num_kv_shared_layers)", 1),
    (r"(num_|n_|.*_)?(hidden_)?(layers?|blocks|n_layer|depth)", LAYERS),
    (r".*(head_dim|head_width|d_kv|d_head|dim_head|headdim|kv_channels|head_size|_d_head|rotary_dim)", HEAD_WIDTH),
    (r"mamba_n(um)?_heads|n_mamba_heads", 2 * HEADS),
    (r".*(key_value|kv).*heads|kv_n_heads|num_query_groups", 2),
    (r".*heads?|n_groups|mamba_ngroups|mamba_n_groups", HEADS),
    (r"index_topk", 32),
    (r"(mamba_)?chunk_size", HEAD_WIDTH),
    (r".*(per_tok|per_token|top_?k|moe_k|num_experts_per.*)", 2),
    (r"topk_group|n_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r".*experts?(_num)?", HEADS),
    (r".*(lora|laurel|gate|norm|low)_?rank|.*dt_rank|time_step_rank|state_size|.*d_state", HEAD_WIDTH),
    (r"(per_layer_input|ple_embed_dim|.*per_layer_input)", HEAD_WIDTH),
    (
        r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|dim_ff|d_inner|d_ff|dff|feed_forward_size|moe_.*size)",
        2 * WIDTH,
    ),
    (
        r".*(hidden_size(_global)?|d_model|n_embd|emb_dim|embedding_dim|embed_dim|embedding_size|proj_dim|lru_width|d_ssm)",
        WIDTH,
    ),
]


# Fields that a config leaves empty though its model needs them.
NEEDED = ("head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
HYBRID = ["linear_attention", "hybrid"] * 3
# Families whose fields depend on each other in a way that no name tells.
DEPENDENT: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "mamba2": {"num_heads": 2 * HEADS, "head_dim": HEAD_WIDTH},
    "qwen4_exp_text": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_WIDTH,
        "indexer_budget": 64,
        "indexer_compress_ratio": 8,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "indexed_attention"],
        "ple_layer_ids": [1, 2],
        "eos_token_id": 2,
        "heads_per_ngram": 2,
        "split_ngram_parts": 8,
    },
    "zamba": {"layers_block_type": HYBRID, "num_hidden_layers": len(HYBRID)},
    "zamba2": {"layers_block_type": HYBRID, "num_hidden_layers": len(HYBRID)},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 32), "is_decoder": True},
}


def causal_families() -> list[str]:
    """Model types that transformers has a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal_families() -> list[str]:
    """Model types of checkpoints that read pictures and write text."""
    return sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_model(family: str) -> PreTrainedModel:
    """A family's language model with its head, or its model of pictures and text, random and in eval mode.

    Where the whole of a composite model can't be made so small, its text part alone.
    """
    config_class = CONFIG_MAPPING[family]
    auto = AutoModelForCausalLM if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    torch.manual_seed(0)
    try:
        model = auto.from_config(shrunk(config_class)).eval()
    except Exception:
        text = type(config_class().get_text_config())
        if text is config_class:
            raise
        auto = AutoModelForCausalLM if text in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
        model = auto.from_config(shrunk(text)).eval()
    strengthen(model)
    return model


def strengthen(model: PreTrainedModel) -> None:
    """Weights as large as trained ones, so that every part of a model shows in its output; zeros become small numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2 and parameter.std() < 0.1:
                fan_in = parameter.shape[-1]
                parameter.normal_(0, fan_in**-0.5)
            elif parameter.dim() == 1 and not parameter.any():
                parameter.normal_(0, 0.05)


def shrunk(config_class: type[PreTrainedConfig], **fixed: Any) -> PreTrainedConfig:
    """The class's default config with few layers, narrow states and a small vocabulary; `fixed` fields as given."""
    return config_class(**{**shrunk_fields(config_class()), **fixed})


def shrunk_fields(config: PreTrainedConfig) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    values = {name: _value(config, name) for name in defaults}
    values |= {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    layers = next((values[name] for name in ("num_hidden_layers", "num_layers") if values.get(name)), None)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = shrunk_fields(value) | ({"model_type": value.model_type} if value.model_type else {})
        elif name in NEEDED and value is None:
            fields[name] = _size(name)
        elif isinstance(value, (list, tuple)) and len(value) == layers:
            if defaults[name] is not None or isinstance(value[0], int):
                fields[name] = [_shrunk_value(name, part, len(fields)) for part in value[:LAYERS]]
        elif isinstance(value, int) and not isinstance(value, bool) and defaults[name] is not None:
            fields[name] = _shrunk_value(name, value, len(fields))
    if fields.get("num_key_value_heads") and values["num_key_value_heads"] == values.get("num_attention_heads"):
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if isinstance(values.get("rope_parameters"), dict) and _rotates_in_sections(type(config)):
        rope = values["rope_parameters"]
        pairs = int(HEAD_WIDTH * rope.get("partial_rotary_factor", 1)) // 2
        fields["rope_parameters"] = rope | {"mrope_section": [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]}
    return fields | DEPENDENT.get(config.model_type, {})


def _rotates_in_sections(config_class: type[PreTrainedConfig]) -> bool:
    """Whether the family's model deals the rotary dimensions out to time, height and width (M-RoPE)."""
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    with contextlib.suppress(ImportError):
        return "mrope_section" in inspect.getsource(importlib.import_module(name))
    return False


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field, though a config with other values for some layers refuses to name the common one."""
    values = vars(config)
    return values[name] if name in values else getattr(config, name, None)


def _shrunk_value(name: str, value: Any, number: int) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.fullmatch(TOKEN_ID, name):
        return value if value < FIRST_TOKEN_ID else FIRST_TOKEN_ID + number % 20
    size = _size(name)
    return value if size is None else min(value, size)


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
