"""Reading any vision encoder alike: a row of tokens for the Q-Former and one summary feature for late fusion.

Three shapes are understood: transformers with a class token (CLIP, ViT, DINOv2/v3), transformers without one that pool by
themselves (SigLIP, Swin), and convolutional nets whose output is a feature map (EfficientNet, ConvNeXt, MobileNetV2).
"""

import copy

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


# How transformers' vision models name the learned class token that they put before the patches.
CLASS_TOKEN_NAMES = frozenset({"cls_token", "class_token", "class_embedding", "cls_embedding"})
EXPECTED = (
    "A vision encoder must return `last_hidden_state` as tokens (batch, tokens, width) or as a feature map "
    "(batch, width, height, width of the map), and either put a class token first or return `pooler_output` "
    "(batch, width)."
)


def has_class_token(vision_model: nn.Module) -> bool:
    """Whether the encoder puts a learned class token before its patches."""
    return any(name.rsplit(".", 1)[-1] in CLASS_TOKEN_NAMES for name, _ in vision_model.named_parameters())


def vision_features(
    vision_model: PreTrainedModel, pixel_values: torch.Tensor, feature_layer: int = -1
) -> BaseModelOutputWithPooling:
    """Runs a vision encoder and brings what it returns into one form.

    Args:
        vision_model: any vision encoder of `AutoModel`.
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`).
        feature_layer: -1 for the encoder's last hidden state as returned (CLIP: before its post-layernorm), otherwise
            an index into its hidden states.

    Returns:
        `BaseModelOutputWithPooling` with `last_hidden_state` `(images, tokens, width)`, class token first where there is
        one, and the summary feature `pooler_output` `(images, width)`: the class token's state, else the encoder's own
        pooled output.

    Raises:
        ValueError: for an encoder of another shape.
    """
    with_states = {} if feature_layer == -1 else {"output_hidden_states": True}
    outputs = vision_model(pixel_values=pixel_values, return_dict=True, **with_states)
    tokens = getattr(outputs, "last_hidden_state", None)
    pooled = getattr(outputs, "pooler_output", None)
    if tokens is None or tokens.dim() not in (3, 4) or tokens.shape[0] != pixel_values.shape[0]:
        found = "no last_hidden_state" if tokens is None else f"last_hidden_state of shape {tuple(tokens.shape)}"
        raise ValueError(f"{type(vision_model).__name__} returned {found}. {EXPECTED}")
    if tokens.dim() == 4:
        if feature_layer != -1:
            raise ValueError("vision_feature_layer must be -1 for a convolutional encoder: its layers differ in width.")
        tokens = tokens.flatten(2).transpose(1, 2)
    elif feature_layer != -1:
        tokens = outputs.hidden_states[feature_layer]
    if has_class_token(vision_model):
        summary = tokens[:, 0]
    elif pooled is not None:
        summary = pooled.flatten(1)
    else:
        raise ValueError(f"{type(vision_model).__name__} has neither a class token nor a pooler_output. {EXPECTED}")
    if summary.shape[-1] != tokens.shape[-1]:
        raise ValueError(
            f"{type(vision_model).__name__}: summary feature of width {summary.shape[-1]} beside tokens of width "
            f"{tokens.shape[-1]}. {EXPECTED}"
        )
    return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=summary)


def vision_width(vision_config: PreTrainedConfig, feature_layer: int = -1) -> int:
    """Width of an encoder's tokens, found by a forward pass without memory or arithmetic (the meta device).

    Raises:
        ValueError: for an encoder whose output has another shape than expected.
    """
    size = getattr(vision_config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision_config, "num_channels", 3)
    with torch.device("meta"):
        encoder = AutoModel.from_config(copy.deepcopy(vision_config)).eval()
        pixels = torch.empty(1, channels, height, width, dtype=encoder.dtype)
        if encoder.main_input_name != "pixel_values":
            raise ValueError(f"{type(encoder).__name__} can't be read as a vision encoder. {EXPECTED}")
        features = vision_features(encoder, pixels, feature_layer)
    assert features.last_hidden_state is not None
    return features.last_hidden_state.shape[-1]
