"""Reading any vision encoder alike: a row of tokens for the Q-Former and one summary feature for late fusion.

An encoder is called as its signature asks: with pictures `(n, c, h, w)`, with patches that a grid counts (Qwen-VL), with
padded patches and their shapes (SigLIP 2 NaFlex) or positions (Gemma 4), or with tiles (Llama 3.2 Vision). What it returns
may be tokens, with a class token before them or not, or a feature map with its channels first or last.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .vision_features_notellm2 import VisionFeatures, join_features


# How transformers' vision models name a learned class token; whether it stands before the patches shows in their number.
CLASS_TOKEN_NAMES = frozenset({"cls_token", "class_token", "class_embedding", "cls_embedding"})
# How they name the pictures that they take.
PIXELS = ("pixel_values", "hidden_states", "image")
EXPECTED = (
    "A vision encoder must take pictures and return `last_hidden_state` as tokens (batch, tokens, width) or as a feature "
    "map (batch, width, height, width of the map). Use one that does, e.g. CLIP, SigLIP, DINOv2, ViT or ConvNeXt."
)
OTHER_PICTURES = "%s takes %s, but pixel_values came as %s. Use the image processor of the encoder's own checkpoint."


def vision_features(
    vision_model: PreTrainedModel,
    pixel_values: torch.Tensor,
    feature_layer: int = -1,
    image_sizes: torch.Tensor | None = None,
    summary: str = "auto",
) -> VisionFeatures:
    """Runs a vision encoder and brings what it returns into one form.

    Args:
        vision_model: any vision encoder of transformers.
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`, or `(images, patches, values)` for
            encoders of patches): as the processor gives them.
        feature_layer: -1 for the encoder's last hidden state as returned (CLIP: before its post-layernorm), otherwise
            an index into its hidden states.
        image_sizes (`torch.LongTensor` of shape `(images, k)`, *optional*): the true size of each picture in
            `pixel_values`, which are padded: height and width, or what counts its patches. As the processor gives them.
        summary: "cls", the class token's state; "pooler", the encoder's own pooled output; "mean" of the patches' tokens;
            "auto", the first of these that the encoder has.

    Returns:
        [`VisionFeatures`].

    Raises:
        ValueError: for an encoder of another shape, or without the summary feature that was asked for.
    """
    parameters = inspect.signature(vision_model.forward).parameters
    if feature_layer != -1 and not parameters.keys().isdisjoint(READERS):
        raise ValueError(f"vision_feature_layer must be -1 for a {type(vision_model).__name__}.")
    for name, read in READERS.items():
        if name in parameters:
            return read(vision_model, pixel_values, image_sizes, summary)
    if pixel_values.dim() != 4:
        raise ValueError(
            OTHER_PICTURES % (type(vision_model).__name__, "pictures (n, c, h, w)", tuple(pixel_values.shape))
        )
    if image_sizes is None or bool((image_sizes == image_sizes.new_tensor(pixel_values.shape[-2:])).all()):
        return _of_one_size(vision_model, pixel_values, feature_layer, summary)
    parts: dict[int, VisionFeatures] = {}
    for size in image_sizes.unique(dim=0):
        rows = (image_sizes == size).all(-1).nonzero().flatten().tolist()
        height, width = size.tolist()
        features = _of_one_size(vision_model, pixel_values[rows, :, :height, :width], feature_layer, summary)
        parts |= {row: features.row(number) for number, row in enumerate(rows)}
    return join_features([parts[row] for row in range(len(pixel_values))])


def first_of(config: Any, *names: str) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


# Pictures of one size --------------------------------------------------------------------------------------------------


def _of_one_size(
    vision_model: PreTrainedModel, pixel_values: torch.Tensor, feature_layer: int, summary: str
) -> VisionFeatures:
    """Features of pictures `(n, c, h, w)` that have no padding."""
    parameters = inspect.signature(vision_model.forward).parameters
    kwargs: dict[str, Any] = {} if feature_layer == -1 else {"output_hidden_states": True}
    if "noise" in parameters and isinstance(getattr(vision_model.config, "patch_size", None), int):
        patches = math.prod(_grid(pixel_values, vision_model.config.patch_size))
        kwargs["noise"] = torch.arange(patches, device=pixel_values.device).expand(len(pixel_values), -1).float()
    outputs = _call(vision_model, pixel_values, **kwargs)
    name = type(vision_model).__name__
    images = len(pixel_values)
    tokens: Any
    pooled: Any
    if isinstance(outputs, torch.Tensor):  # BridgeTower: (layers, n, tokens, width)
        tokens, pooled = (outputs[feature_layer] if outputs.dim() == 4 else outputs), None
    else:
        tokens, pooled = getattr(outputs, "last_hidden_state", None), getattr(outputs, "pooler_output", None)
        if tokens is None and getattr(outputs, "feature_maps", None):  # HGNet-V2, which is a backbone alone
            tokens = outputs.feature_maps[-1]
    if isinstance(tokens, torch.Tensor) and tokens.dim() == 3 and tokens.shape[0] == 1 < images:
        tokens = tokens.reshape(images, -1, tokens.shape[-1])  # Pixtral: all pictures in one row
    if not isinstance(tokens, torch.Tensor) or tokens.dim() not in (3, 4) or tokens.shape[0] != images:
        returned = f"last_hidden_state of shape {tuple(tokens.shape)}" if isinstance(tokens, torch.Tensor) else "none"
        raise ValueError(f"{name} returned {returned}. {EXPECTED}")
    class_state = getattr(outputs, "cls_token_value", None)  # CvT: beside the feature map
    if tokens.dim() == 4:
        if feature_layer != -1:
            raise ValueError("vision_feature_layer must be -1 for a convolutional encoder: its layers differ in width.")
        channels_last = _is_channels_last(vision_model, tokens, pixel_values)
        tokens = tokens.flatten(1, 2) if channels_last else tokens.flatten(2).transpose(1, 2)
        patches = tokens
    else:
        if feature_layer != -1 and not isinstance(outputs, torch.Tensor):
            tokens = outputs.hidden_states[feature_layer]
        leads = _leads_with_class_token(vision_model, tokens, pixel_values)
        registers = getattr(vision_model.config, "num_register_tokens", 0) or 0
        timm = getattr(vision_model, "timm_model", None)  # says itself how many tokens are no patches
        first = getattr(timm, "num_prefix_tokens", 1 + registers if leads else 0)
        class_state, patches = tokens[:, 0] if leads else class_state, tokens[:, first:]
    has_pooled = isinstance(pooled, torch.Tensor) and pooled.shape[0] == images
    candidates = {
        "cls": None if class_state is None else class_state.flatten(1),
        "pooler": pooled.flatten(1) if has_pooled else None,
        "mean": patches.mean(1),
    }
    return VisionFeatures(last_hidden_state=tokens, pooler_output=_choose(name, candidates, tokens.shape[-1], summary))


def _call(vision_model: PreTrainedModel, pixels: torch.Tensor, **kwargs: Any) -> Any:
    """The encoder's output for pictures, under the name that it has for them."""
    parameters = inspect.signature(vision_model.forward).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "return_dict" in parameters or takes_more:
        kwargs["return_dict"] = True
    name = next((name for name in PIXELS if name in parameters), PIXELS[0])
    return vision_model(**{name: pixels}, **kwargs)


def _choose(name: str, candidates: dict[str, torch.Tensor | None], width: int, summary: str) -> torch.Tensor:
    fitting = {key: value for key, value in candidates.items() if value is not None and value.shape[-1] == width}
    if summary == "auto":
        return next(iter(fitting.values()))
    if summary not in fitting:
        raise ValueError(
            f"vision_summary is {summary!r}, but {name} gives no such feature of its tokens' width {width}; it has "
            f"{', '.join(fitting)}."
        )
    return fitting[summary]


def has_class_token(vision_model: nn.Module) -> bool:
    """Whether the encoder has a learned class token, wherever it uses it."""
    return any(name.rsplit(".", 1)[-1] in CLASS_TOKEN_NAMES for name, _ in vision_model.named_parameters())


def _leads_with_class_token(vision_model: PreTrainedModel, tokens: torch.Tensor, pixels: torch.Tensor) -> bool:
    """Whether the first token is a class token: there is one, and there are more tokens than patches.

    An encoder may use its class token elsewhere (AIMv2's head), or take it off again (Llama 4).
    """
    if not has_class_token(vision_model):
        return False
    patch_size = getattr(vision_model.config, "patch_size", None)
    if isinstance(patch_size, int):
        return tokens.shape[1] > math.prod(_grid(pixels, patch_size))
    shape = pixels.shape[-2] / pixels.shape[-1]
    height, width = round(math.sqrt(tokens.shape[1] * shape)), round(math.sqrt(tokens.shape[1] / shape))
    return tokens.shape[1] != height * width  # patches alone are a grid of the picture's shape


def _grid(pixels: torch.Tensor, patch_size: int) -> tuple[int, int]:
    return pixels.shape[-2] // patch_size, pixels.shape[-1] // patch_size


def _is_channels_last(vision_model: PreTrainedModel, feature_map: torch.Tensor, pixels: torch.Tensor) -> bool:
    """Whether a feature map is (n, h, w, c): timm says how wide it is; otherwise the picture's shape shows in two sides."""
    first, second, third = feature_map.shape[1:]
    width = getattr(getattr(vision_model, "timm_model", None), "num_features", None)
    if width in (first, third) and first != third:
        return third == width
    shape = math.log(pixels.shape[-2] / pixels.shape[-1])
    return abs(math.log(first / second) - shape) < abs(math.log(second / third) - shape)


# Patches and tiles -----------------------------------------------------------------------------------------------------


def _of_grids(
    vision_model: PreTrainedModel, pixel_values: torch.Tensor, sizes: torch.Tensor | None, summary: str
) -> VisionFeatures:
    """Patches of all pictures in one row, counted by a grid `(n, 3)` of time, height, width (Qwen-VL and its kin)."""
    _need_patches(vision_model, pixel_values, sizes, 3)
    assert sizes is not None
    parameters = inspect.signature(vision_model.forward).parameters
    counts = sizes.prod(-1)
    held = torch.arange(pixel_values.shape[1], device=counts.device) < counts.unsqueeze(-1)
    more = {}
    if "merge_sizes" in parameters:
        merge = first_of(vision_model.config, "spatial_merge_size", "merge_size") or 1
        more["merge_sizes"] = sizes.new_full((len(sizes),), merge)
    grid = next(name for name in ("grid_thw", "image_grid_thw") if name in parameters)
    outputs = _call(vision_model, pixel_values[held], **{grid: sizes}, **more)
    return _from_row(vision_model, outputs, counts, summary)


def _of_shapes(
    vision_model: PreTrainedModel, pixel_values: torch.Tensor, sizes: torch.Tensor | None, summary: str
) -> VisionFeatures:
    """Padded patches with the height and width of each picture in patches (SigLIP 2 NaFlex)."""
    _need_patches(vision_model, pixel_values, sizes, 2)
    assert sizes is not None
    longest = int(sizes.prod(-1).max())
    mask = (torch.arange(longest, device=sizes.device) < sizes.prod(-1, keepdim=True)).long()
    outputs = _call(vision_model, pixel_values[:, :longest], pixel_attention_mask=mask, spatial_shapes=sizes)
    tokens = outputs.last_hidden_state * mask.unsqueeze(-1).to(outputs.last_hidden_state.dtype)
    candidates = {"pooler": outputs.pooler_output, "mean": _masked_mean(tokens, mask)}
    chosen = _choose(type(vision_model).__name__, candidates, tokens.shape[-1], summary)
    return VisionFeatures(last_hidden_state=tokens, pooler_output=chosen, attention_mask=mask)


def _of_positions(
    vision_model: PreTrainedModel, pixel_values: torch.Tensor, sizes: torch.Tensor | None, summary: str
) -> VisionFeatures:
    """Padded patches with the place of each, -1 for padding (Gemma 4)."""
    _need_patches(vision_model, pixel_values, sizes, 2)
    assert sizes is not None
    counts = sizes.prod(-1)
    places = torch.arange(pixel_values.shape[1], device=sizes.device)
    widths = sizes[:, 1:]
    positions = torch.stack([places % widths, places // widths], dim=-1)
    positions = positions.masked_fill((places >= counts.unsqueeze(-1)).unsqueeze(-1), -1)
    outputs = _call(vision_model, pixel_values, pixel_position_ids=positions)
    return _from_row(vision_model, outputs, counts, summary)


def _of_tiles(
    vision_model: PreTrainedModel, pixel_values: torch.Tensor, sizes: torch.Tensor | None, summary: str
) -> VisionFeatures:
    """Pictures as tiles `(n, tiles, c, h, w)` with their layout's id and number (Llama 3.2 Vision); `(n, c, h, w)` is one."""
    if pixel_values.dim() == 4:
        pixel_values = pixel_values.unsqueeze(1)
    images, tiles = len(pixel_values), vision_model.config.max_num_tiles
    pixel_values = F.pad(pixel_values, (0, 0, 0, 0, 0, 0, 0, tiles - pixel_values.shape[1]))
    if sizes is None:
        sizes = torch.ones(images, 2, dtype=torch.long, device=pixel_values.device)
    mask = (torch.arange(tiles, device=sizes.device) < sizes[:, 1:]).long()
    outputs = _call(
        vision_model, pixel_values.unsqueeze(1), aspect_ratio_ids=sizes[:, :1], aspect_ratio_mask=mask.unsqueeze(1)
    )
    tokens = outputs.last_hidden_state[:, 0]  # (n, tiles, tokens, width)
    each = tokens.shape[2]
    tokens, mask = tokens.flatten(1, 2), mask.repeat_interleave(each, dim=1)
    candidates = {"cls": tokens[:, 0], "mean": _masked_mean(tokens, mask)}
    chosen = _choose(type(vision_model).__name__, candidates, tokens.shape[-1], summary)
    return VisionFeatures(last_hidden_state=tokens, pooler_output=chosen, attention_mask=mask)


# By the input that tells such an encoder from the others.
READERS: dict[str, Callable[..., VisionFeatures]] = {
    "grid_thw": _of_grids,
    "image_grid_thw": _of_grids,
    "spatial_shapes": _of_shapes,
    "pixel_position_ids": _of_positions,
    "aspect_ratio_ids": _of_tiles,
}
KNOWN_INPUTS = {*READERS, "merge_sizes", "pixel_attention_mask", "aspect_ratio_mask", "image_mask"}
# What encoders take for training or for other tasks, and do without.
IDLE_INPUTS = {"bool_masked_pos", "head_mask", "attention_mask", "pixel_mask", "patch_attention_mask", "labels"}


def _need_patches(
    vision_model: PreTrainedModel, pixel_values: torch.Tensor, sizes: torch.Tensor | None, columns: int
) -> None:
    if pixel_values.dim() not in (3, 5) or sizes is None or sizes.shape[-1] != columns:
        came = f"{tuple(pixel_values.shape)} with sizes {None if sizes is None else tuple(sizes.shape)}"
        raise ValueError(OTHER_PICTURES % (type(vision_model).__name__, "patches and their grid", came))


def _from_row(vision_model: PreTrainedModel, outputs: Any, counts: torch.Tensor, summary: str) -> VisionFeatures:
    """Tokens of all pictures in one row to `(n, tokens, width)`; several patches may have become one token."""
    states = outputs.last_hidden_state
    states = states.reshape(-1, states.shape[-1])
    patches = int(counts.sum())
    if not len(states) or patches % len(states):
        raise ValueError(f"{type(vision_model).__name__} made {len(states)} tokens of {patches} patches. {EXPECTED}")
    of_each = (counts // (patches // len(states))).tolist()
    parts = states.split(of_each)
    rows = [
        VisionFeatures(last_hidden_state=part.unsqueeze(0), pooler_output=part.mean(0, keepdim=True)) for part in parts
    ]
    _choose(type(vision_model).__name__, {"mean": states}, states.shape[-1], summary)
    return join_features(rows)


def _masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
