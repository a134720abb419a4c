"""Trying a vision encoder before it is used: whether it takes pictures, and how wide the tokens are that it returns."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .towers_notellm2 import build_vision_encoder
from .vision_notellm2 import EXPECTED, IDLE_INPUTS, KNOWN_INPUTS, PIXELS, READERS, first_of, vision_features


def vision_width(
    vision_config: PreTrainedConfig, feature_layer: int = -1, encoder: PreTrainedModel | None = None
) -> int:
    """Width of an encoder's tokens, as its output has it.

    Found by a forward pass without memory or arithmetic (the meta device). Encoders of patches count them as they run,
    which needs real numbers: `encoder`, or one built from the config, sees the smallest picture.

    Raises:
        ValueError: for an encoder that takes or returns something else than expected.
    """
    with torch.device("meta"):
        unreal = build_vision_encoder(copy.deepcopy(vision_config)).eval()
    check_inputs(unreal)
    if (channels := _channels(unreal.config)) != 3:
        raise ValueError(
            f"{type(unreal).__name__} reads pictures of {channels} channels, items have such of 3. {EXPECTED}"
        )
    parameters = inspect.signature(unreal.forward).parameters
    probes: list[Callable[[], PreTrainedModel]] = [lambda: unreal] if takes_pictures(parameters) else []
    probes.append(lambda: build_vision_encoder(copy.deepcopy(vision_config)).eval() if encoder is None else encoder)
    reason: Exception | None = None
    for make in probes:
        probe = make()
        for pixels, sizes in probe_inputs(probe, parameters):
            try:
                with torch.no_grad(), torch.device(pixels.device):
                    return vision_features(probe, pixels, feature_layer, sizes).last_hidden_state.shape[-1]
            except Exception as error:  # the encoder's own, of any kind, for inputs that it doesn't understand
                reason = error
    if isinstance(reason, ValueError) and EXPECTED in str(reason):
        raise reason
    raise ValueError(_unreadable(unreal, parameters, reason)) from reason


def _unreadable(encoder: PreTrainedModel, parameters: Any, reason: Exception | None) -> str:
    """Why an encoder understands none of the pictures it was shown: a video's, with inputs of its own, or another shape."""
    name = type(encoder).__name__
    frames = getattr(encoder.config, "num_frames", None)
    if frames and frames > 1:
        return f"{name} reads videos of {frames} frames, not single pictures. {EXPECTED}"
    own = [
        parameter.name
        for parameter in parameters.values()
        if "Tensor" in str(parameter.annotation) and parameter.name not in {*PIXELS, *KNOWN_INPUTS, *IDLE_INPUTS}
    ]
    if own:
        return f"{name} can't be read as a vision encoder: beside its pictures it takes {', '.join(own)}. {EXPECTED}"
    height, width = _picture_size(encoder.config)
    pictures = f"pictures (n, c, {height}, {width})"
    taken = pictures if takes_pictures(parameters) else "patches in a form that is known here"
    return f"{name} can't be read as a vision encoder: it does not take {taken}. {EXPECTED} Its own error was: {reason}"


def takes_pictures(parameters: Any) -> bool:
    return parameters.keys().isdisjoint(READERS) or "aspect_ratio_ids" in parameters


def probe_inputs(encoder: PreTrainedModel, parameters: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """One empty picture as the encoder takes it; several for patches, which encoders take flat or not."""
    config = encoder.config
    channels = _channels(config)
    like: dict[str, Any] = {"dtype": encoder.dtype, "device": encoder.device}
    if takes_pictures(parameters):
        yield torch.zeros(1, channels, *_picture_size(config), **like), None
        return
    side = 2 * (first_of(config, "spatial_merge_size", "pooling_kernel_size", "merge_size") or 2)
    in_time = not {"grid_thw", "image_grid_thw"}.isdisjoint(parameters)
    sizes = torch.tensor([[1, side, side] if in_time else [side, side]], device=encoder.device)
    frames = (first_of(config, "temporal_patch_size") or 1) if in_time else 1
    patch = config.patch_size
    shapes: list[tuple[int, ...]] = [
        (channels * frames * patch**2,),
        (2 * channels * patch**2,),
        (channels, patch, patch),
    ]
    for shape in shapes:
        yield torch.zeros(1, side * side, *shape, **like), sizes


def check_inputs(encoder: PreTrainedModel) -> None:
    """Checks that an encoder asks for pictures and for nothing that only a text or a video has; ValueError if not."""
    name, parameters = type(encoder).__name__, inspect.signature(encoder.forward).parameters
    needed = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    first = next((pixels for pixels in PIXELS if pixels in parameters), None)
    unknown = [other for other in needed if other != first and other not in KNOWN_INPUTS]
    if first is None or unknown or "input_ids" in parameters:
        asked = ", ".join(unknown or needed or list(parameters)[:1])
        raise ValueError(f"{name} can't be read as a vision encoder: it takes {asked}. {EXPECTED}")


def _channels(config: PreTrainedConfig) -> int:
    """Of the pictures that an encoder takes: its config's, timm's own, or 3."""
    timm = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    return first_of(config, "num_channels", "in_channels", "in_chans") or (timm[0] if timm else 3)


def _picture_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width that an encoder was made for: its config's, timm's own, or 224."""
    timm = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    size = getattr(config, "image_size", None) or (timm[-2:] if timm else 224)
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


__all__ = ["check_inputs", "probe_inputs", "vision_width"]
