"""One checkpoint of pictures and text as both halves (`connector: native`): its own tower, merger and LLM, called as its family
calls them.

The family's own forward joins visual tokens and text, so that what it does beside (positions in the plane, features for
several layers, pictures that see themselves whole) is done by it. What its tower made of the pictures is given to it as
`mm_encoder_outputs`, and is therefore computed, cached and joined as any encoder's features.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .backbones_notellm2 import unfit_weights
from .language_notellm2 import UnusableModelError, differ, takes_positions, tolerance, trial_ids, understood
from .towers_notellm2 import tower_of
from .vision_features_notellm2 import VisionFeatures, join_features
from .vision_probe_notellm2 import probe_inputs


INSTEAD = (
    'Use connector="qformer" (--connector qformer), which reads the same checkpoint\'s vision tower through a Q-Former, or a '
    "checkpoint of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, SmolVLM, Idefics3, Gemma 3, LLaVA or InternVL."
)
# By which a family's forward knows where pictures stand in the ids: 1 there, 0 elsewhere.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
BEFORE, BEHIND = 5, 7
"""Text tokens on either side of the picture in a trial."""


class PerImage(list):
    """Visual tokens of each picture, `(tokens, width)` each: a list for families that join one, and for all others a tensor
    `(all tokens, width)`, whose methods it has."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cat(self), name)


def load_native_model(source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """A model of pictures and text without its head.

    Raises:
        ValueError: for a checkpoint that is none, or whose weights are not those of its config.
    """
    model: Any
    if isinstance(source, PreTrainedModel):
        model = source.base_model
    else:
        model, info = AutoModel.from_pretrained(source, output_loading_info=True, **kwargs)
        problem = unfit_weights(model, model, info)
        if problem is not None:
            raise ValueError(f"The weights of {source} don't fit its config: {problem}. {INSTEAD}")
    check_native(model)
    return model


def check_native(model: PreTrainedModel) -> None:
    """Raises UnusableModelError for a model that doesn't take its pictures' features in a known way."""
    if not hasattr(model, "get_image_features"):
        raise UnusableModelError(
            f"{type(model).__name__} has no merger of its own between pictures and text. {INSTEAD}"
        )
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UnusableModelError(f"{type(model).__name__} does not take features of its pictures. {INSTEAD}")


def vision_parts(model: PreTrainedModel) -> list[nn.Module]:
    """Those parts of a model of pictures and text that make visual tokens: all but the one that has the token embeddings."""
    tokens = model.get_input_embeddings()
    return [part for part in model.children() if all(inner is not tokens for inner in part.modules())]


def native_features(model: Any, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> VisionFeatures:
    """What a model's own tower and merger make of pictures.

    Args:
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)` or `(images, patches, values)`).
        image_sizes (`torch.LongTensor` of shape `(images, k)`, *optional*): as the processor gives them.

    Returns:
        [`VisionFeatures`]: the visual tokens, with what the merger made for further layers of the LLM (deepstack) behind
        them in the same rows, `(images, tokens, (1 + layers) * width)`; their mean as summary `(images, width)`; and the
        grids of patches for families that give tokens places in the plane.

    Raises:
        ValueError: for pictures that the model doesn't take, or features of another form.
    """
    if "image_grid_thw" in inspect.signature(model.get_image_features).parameters:
        if image_sizes is None or image_sizes.shape[-1] != 3 or pixel_values.dim() != 3:
            raise ValueError(
                f"{type(model).__name__} takes patches and their grid, but pixel_values came as {tuple(pixel_values.shape)}. "
                "Use the image processor of its own checkpoint."
            )
        counts = image_sizes.prod(-1, keepdim=True)
        held = torch.arange(pixel_values.shape[1], device=counts.device) < counts
        outputs = model.get_image_features(pixel_values[held], image_grid_thw=image_sizes, return_dict=True)
        return _packed(model, outputs, image_sizes)
    if image_sizes is None:
        return _packed(model, _of_pictures(model, pixel_values), None)
    parts = []
    for pixels, (height, width) in zip(pixel_values.split(1), image_sizes.tolist(), strict=True):
        parts.append(_packed(model, _of_pictures(model, pixels[:, :, :height, :width]), None))  # without padding
    return join_features(parts)


def _of_pictures(model: Any, pixels: torch.Tensor) -> Any:
    """Features of pictures `(n, c, h, w)`, each of which Idefics' families take as the only one of its sample."""
    parameters = inspect.signature(model.get_image_features).parameters
    kwargs = {
        "pixel_values": pixels.unsqueeze(1) if "pixel_attention_mask" in parameters else pixels,
        "return_dict": True,
    }
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        if name in parameters and hasattr(model.config, name):
            kwargs[name] = getattr(model.config, name)
    return model.get_image_features(**kwargs)


def _packed(model: PreTrainedModel, outputs: Any, grids: torch.Tensor | None) -> VisionFeatures:
    """A family's features in our form."""
    pooled = getattr(outputs, "pooler_output", None)
    rows = [tokens.reshape(-1, tokens.shape[-1]) for tokens in (pooled if pooled is not None else [])]
    if not rows or (grids is not None and len(rows) != len(grids)):
        raise ValueError(
            f"{type(model).__name__} gives features of its pictures in a form that is not known. {INSTEAD}"
        )
    layers = getattr(outputs, "deepstack_features", None) or []
    parts = []
    for number, tokens in enumerate(rows):
        stacked = torch.cat([tokens, *(layer[number] for layer in layers)], dim=-1)
        grid = None if grids is None else grids[number : number + 1]
        parts.append(VisionFeatures(stacked.unsqueeze(0), tokens.mean(0, keepdim=True), grids=grid))
    return join_features(parts)


def _unpacked(features: VisionFeatures, count: int) -> Any:
    """The features of the first `count` pictures as the family's forward takes them."""
    width = features.pooler_output.shape[-1]
    rows = [
        features.last_hidden_state[number, : int(length)]
        for number, length in enumerate(tokens_of_each(features)[:count].tolist())
    ]
    first, *layers = zip(*(row.split(width, dim=-1) for row in rows), strict=True)
    outputs = BaseModelOutputWithPooling()
    outputs["pooler_output"] = PerImage(first)
    outputs.deepstack_features = [list(layer) for layer in layers]
    return outputs


def tokens_of_each(features: VisionFeatures) -> torch.Tensor:
    """Number of visual tokens of each picture, `(images,)` int64."""
    if features.attention_mask is not None:
        return features.attention_mask.sum(-1)
    images, tokens = features.last_hidden_state.shape[:2]
    return torch.full((images,), tokens, device=features.last_hidden_state.device)


def call_native_model(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_token_id: int,
    features: VisionFeatures | None,
    **kwargs: Any,
) -> Any:
    """Runs a family's own forward on ids and features of their pictures.

    Args:
        input_ids (`torch.LongTensor` of shape `(n, length)`): every picture as as many `image_token_id` as it has tokens.
        attention_mask (`torch.Tensor` of shape `(n, length)`).
        features: of `native_features`, all pictures in order of the rows; None without any.

    Returns:
        What the model returns, with `last_hidden_state`.
    """
    parameters = inspect.signature(model.forward).parameters
    pictures = input_ids == image_token_id
    kwargs |= {name: pictures.long() for name in TOKEN_TYPES if name in parameters}
    if features is not None:
        kwargs["mm_encoder_outputs"] = {"image": _unpacked(features, len(features.pooler_output))}
        if "image_grid_thw" in parameters:
            kwargs["image_grid_thw"] = features.grids
    if takes_positions(model) and "image_grid_thw" not in parameters:
        kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    kwargs |= understood(model, {"use_cache": False, "return_dict": True})
    return model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


# Trial -------------------------------------------------------------------------------------------------------------------


def native_settings(model: PreTrainedModel, check: bool) -> dict[str, Any]:
    """Fields of `NoteLLM2Config` for a model of pictures and text, found by trying it.

    Raises:
        UnusableModelError: for a model that would make wrong embeddings.
    """
    text = model.config.get_text_config()
    settings = {
        "connector": "native",
        "image_token_id": _image_token(model),
        "text_hidden_size": text.hidden_size,
        "vision_hidden_size": text.hidden_size,
    }
    if check and all(parameter.device.type != "meta" for parameter in model.parameters()):
        settings["padding_side"] = _tried(model, settings["image_token_id"])
    return settings


def _image_token(model: PreTrainedModel) -> int:
    """The id that stands for a picture's token."""
    token = getattr(model.config, "image_token_id", None)
    if token is None:
        raise UnusableModelError(f"the config of {type(model).__name__} names no image_token_id. {INSTEAD}")
    return token


def _tried(model: PreTrainedModel, image_token_id: int) -> str | None:
    """Compares our call with the family's own on a text with a picture; the only side of padding that is safe.

    Raises:
        UnusableModelError: if the states differ, if the model reads ahead, or if padding or neighbours change states.
    """
    name = type(model).__name__
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            return _try_with_picture(model, image_token_id)
    except UnusableModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UnusableModelError(
            f"{name} can't be called with features of pictures ({type(error).__name__}: {reason}). {INSTEAD}"
        ) from error
    finally:
        model.train(training)


def _try_with_picture(model: PreTrainedModel, image_token_id: int) -> str | None:
    name, most = type(model).__name__, tolerance(model)
    first, second = (_trial_picture(model, seed) for seed in range(2))
    features = native_features(model, *first)
    tokens = int(tokens_of_each(features)[0])
    ids = trial_ids(model)[:1]
    text = ids[ids != image_token_id][: BEFORE + BEHIND].unsqueeze(0)
    picture = text.new_full((1, tokens), image_token_id)
    row = torch.cat([text[:, :BEFORE], picture, text[:, BEFORE:]], dim=1)
    mask = torch.ones_like(row)

    def states(rows: torch.Tensor, mask: torch.Tensor, features: VisionFeatures) -> torch.Tensor:
        return call_native_model(model, rows, mask, image_token_id, features).last_hidden_state

    expected = states(row, mask, features)[0]
    if differ(expected, _own_states(model, row, image_token_id, *first)[0], most):
        raise UnusableModelError(f"{name} makes other states of a picture's features than of the picture. {INSTEAD}")
    if not differ(states(row, mask, native_features(model, *second))[0], expected, most):
        raise UnusableModelError(f"{name} makes the same of any picture. {INSTEAD}")
    later = row.clone()
    later[:, -BEHIND // 2 :] = row[:, :1]
    until = row.shape[1] - BEHIND // 2 - 1
    if differ(states(later, mask, features)[0, :until], expected[:until], most):
        raise UnusableModelError(
            f"{name} reads ahead: a later token changes the states of earlier ones, so the picture's embedding would know "
            f"the text. {INSTEAD}"
        )
    both = join_features([native_features(model, *second), features])
    longer = torch.cat([row[:, :BEFORE], row], dim=1)
    safe = []
    for side, pad in (("left", (BEFORE, 0)), ("right", (0, BEFORE))):
        padded, padding = (nn.functional.pad(values, pad) for values in (row, mask))
        batch = states(torch.cat([longer, padded]), torch.cat([torch.ones_like(longer), padding]), both)
        if not differ(batch[1][padding[0].bool()], expected, most):
            safe.append(side)
    if not safe:
        raise UnusableModelError(f"{name} makes other states of an item in a padded batch than alone. {INSTEAD}")
    return safe[0] if len(safe) == 1 else None


def _trial_picture(model: PreTrainedModel, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Noise as the model's tower takes a picture."""
    tower = tower_of(model)
    pixels, sizes = next(probe_inputs(tower, inspect.signature(tower.forward).parameters))
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(pixels), sizes


def _own_states(
    model: PreTrainedModel, ids: torch.Tensor, image_token_id: int, pixels: torch.Tensor, sizes: torch.Tensor | None
) -> torch.Tensor:
    """What the family makes of ids and pixels, called as anybody would."""
    parameters = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {name: (ids == image_token_id).long() for name in TOKEN_TYPES if name in parameters}
    if "image_grid_thw" in parameters:
        kwargs |= {"pixel_values": pixels[0], "image_grid_thw": sizes}
    else:
        kwargs["pixel_values"] = pixels.unsqueeze(1) if "pixel_attention_mask" in parameters else pixels
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).last_hidden_state
