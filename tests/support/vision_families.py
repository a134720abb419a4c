"""Every vision encoder of the installed transformers, tiny and random, found in its own mappings.

A new version's families come by themselves: default configs are shrunk by their fields' names. What doesn't shrink so has a
line in `FIELDS`.
"""

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from modeling_notellm2.towers_notellm2 import TOWER_CONFIGS, build_vision_encoder
from modeling_notellm2.vision_probe_notellm2 import check_inputs


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "n_embd": 32,
    "out_hidden_size": 32,
    "intermediate_size": 64,
    "mlp_dim": 64,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "depth": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_layer": 2,
    "n_head": 4,
    "num_key_value_heads": 4,
    "encoder_attention_heads": 4,
    "head_dim": 8,
    "attention_head_dim": 8,
    "image_size": 64,
    "patch_size": 16,
    "vocab_size": 64,
    "projection_dim": 16,
    "num_detection_tokens": 4,
}
WIDTHS = {"hidden_sizes", "embed_dims", "neck_hidden_sizes", "layer_channels", "encoder_hidden_sizes"}
DEPTHS = {"depths", "layers"}
HEADS = {"num_heads", "num_attention_heads"}

LARGEST = 20_000_000
"""Parameters of the largest encoder that is called tiny."""

# Fields of families that the names above don't make small or consistent.
FIELDS: dict[str, dict[str, Any]] = {
    "align_vision_model": {"width_coefficient": 0.5, "depth_coefficient": 0.2, "hidden_dim": 640},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.2, "hidden_dim": 640},
    "apertus1p5_vision_tokenizer": {"base_channels": 32, "codebook_size": 64, "num_res_blocks": 1},
    "bit": {"num_groups": 4, "embedding_size": 16},
    "bridgetower_vision_model": {"hidden_size": 64, "num_attention_heads": 1},
    "donut-swin": {"num_heads": [2, 2, 2, 2], "window_size": 2, "patch_size": 4},
    "maskformer-swin": {"num_heads": [2, 2, 2, 2], "window_size": 2, "patch_size": 4},
    "deepseek_ocr2_sam_vision_model": {"output_channels": 16, "downsample_channels": [16, 32]},
    "unlimited_ocr_sam_vision_model": {"output_channels": 16, "downsample_channels": [16, 32]},
    "depth_pro": {"patch_size": 64},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 2], "adapter_in_dim": 32},
    "inkling_vision": {"patch_size": 8, "num_hidden_layers": 6, "text_hidden_size": 32},
    "sam2_vision_model": {"backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 16},
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "blocks_per_stage": [1, 1, 1, 1],
    },
    "textnet": {"hidden_sizes": [64, 16, 32, 32, 64]},
    "florence_vision": {"embed_dim": [16, 16, 32, 32], "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2]},
    "pvt_v2": {"num_attention_heads": [1, 2, 4, 8]},
    "yolos": {"image_size": [32, 32], "patch_size": 8},
    "hiera": {"image_size": [224, 224], "patch_size": [7, 7]},
    "glpn": {"num_attention_heads": [1, 2, 4, 8]},
    "pvt": {"num_attention_heads": [1, 2, 4, 8]},
    "llama4_vision_model": {
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
        "intermediate_size": 128,
    },
    "mllama_vision_model": {
        "num_global_layers": 1,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
    "swin": {"num_heads": [2, 2, 2, 2], "window_size": 2, "patch_size": 4},
    "swin2sr": {"num_heads": [2, 2, 2, 2], "depths": [1, 1, 1, 1], "window_size": 4, "patch_size": 1},
    "swinv2": {"num_heads": [2, 2, 2, 2], "window_size": 2, "patch_size": 4},
    "mobilevitv2": {"patch_size": 2},
    "mobilevit": {"patch_size": 2},
    "molmo2_vision": {
        "image_default_input_size": [64, 64],
        "image_patch_size": 16,
        "image_num_pos": 16,
        "image_num_patches": 16,
    },
}


def encoder_types() -> list[str]:
    """Model types of encoders that `AutoModel` reads pictures with."""
    others = {*MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *MODEL_FOR_BACKBONE_MAPPING_NAMES} & {*MODEL_MAPPING_NAMES}
    names = ({*MODEL_FOR_IMAGE_MAPPING_NAMES} | others) & {*CONFIG_MAPPING_NAMES}
    return sorted(name for name in names if not {*TOWER_CONFIGS} & {*(CONFIG_MAPPING[name].sub_configs or {})})


def tower_types() -> list[str]:
    """Model types of the towers of composite models, of which there is one or that they start with."""
    towers = set()
    for name in CONFIG_MAPPING_NAMES:
        config_class = CONFIG_MAPPING[name]
        for part, tower in (getattr(config_class, "sub_configs", None) or {}).items():
            if part not in TOWER_CONFIGS:
                continue
            if tower is AutoConfig:
                try:
                    tower = getattr(config_class(), part)
                except Exception:  # a config without defaults
                    continue
            towers.add(getattr(tower, "model_type", ""))
    return sorted((towers & {*CONFIG_MAPPING_NAMES}) - {*encoder_types()})


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of a family, shrunk."""
    return _shrunk(CONFIG_MAPPING[model_type]())


def _shrunk(default: PreTrainedConfig) -> PreTrainedConfig:
    """The config with the configs inside it shrunk as well."""
    changes: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = _shrunk(value)
        elif isinstance(value, (list, tuple)):
            like = type(value)
            if name in WIDTHS:
                changes[name] = like(16 * 2**stage for stage in range(len(value)))
            elif name in DEPTHS:
                changes[name] = like([1] * len(value))
            elif name == "image_size" or (name == "patch_size" and len(value) == 2):
                changes[name] = like([SMALL[name]] * len(value))
        elif name in SMALL and isinstance(value, int) and (name != "patch_size" or value > 8):
            changes[name] = SMALL[name]
    return type(default)(**{**changes, **FIELDS.get(default.model_type, {})})


@torch.no_grad()
def tiny_encoder(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """An encoder whose random weights are large enough that pictures matter.

    Raises:
        MemoryError: for one that is not tiny.
        ValueError, ImportError: as `build_vision_encoder`.
    """
    with torch.device("meta"):
        unreal = build_vision_encoder(copy.deepcopy(config))
    check_inputs(unreal)  # what joining would refuse needs no weights
    size = sum(weight.numel() for weight in unreal.parameters())
    if size > LARGEST:
        raise MemoryError(f"no tiny config: {size:,} parameters")
    torch.manual_seed(seed)
    encoder = build_vision_encoder(config)
    for name, weight in encoder.named_parameters():
        if weight.dim() > 1 and weight.numel():
            torch.nn.init.normal_(weight, std=min(0.3, (2 / weight[0].numel()) ** 0.5))
        elif "norm" not in name and weight.dim() == 1:
            torch.nn.init.normal_(weight, std=0.1)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if norms:  # statistics of random pictures, or nothing of a picture reaches the end
        for norm in norms:
            norm.momentum = None
            norm.train()
        encoder(torch.randn(16, 3, 64, 64))
    return encoder.eval()
