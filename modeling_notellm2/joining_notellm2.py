"""Loading what a model is joined from, with the fields of its config that follow: two halves, or one checkpoint as both."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .backbones_notellm2 import base_models, load_language_model, text_settings
from .native_notellm2 import load_native_model, native_settings
from .precision_notellm2 import cast_part
from .towers_notellm2 import load_vision_encoder, tower_of


Half = str | PreTrainedModel
Loaded = tuple[PreTrainedModel | None, PreTrainedModel, dict[str, Any]]
"""Vision encoder (None: it is within the other), LLM, and fields of `NoteLLM2Config`."""


def connector_between(vision: Half, text: Half) -> str:
    """The connector where none is named: a checkpoint's own if it is both halves, else the published one."""
    return "native" if vision is text or (isinstance(vision, str) and vision == text) else "qformer"


def load_halves(
    vision: Half, text: Half, vision_kwargs: dict[str, Any], text_kwargs: dict[str, Any], check: bool
) -> Loaded:
    """A vision encoder and an LLM from anywhere; arguments as of `from_vision_text_pretrained`."""
    vision_model = load_vision_encoder(vision, **vision_kwargs)
    language_model = load_language_model(text, **text_kwargs)
    halves = {"vision_config": vision_model, "text_config": language_model}
    settings = {**_as_loaded(halves), "base_models": base_models(vision, text) or None}
    return vision_model, language_model, settings | text_settings(language_model, check)


def load_native(
    vision: Half, text: Half, vision_kwargs: dict[str, Any], text_kwargs: dict[str, Any], check: bool
) -> Loaded:
    """A checkpoint of pictures and text, whole but for its head; arguments as of `from_vision_text_pretrained`.

    Raises:
        ValueError: for two checkpoints, and for one that can't be read so.
    """
    if connector_between(vision, text) != "native":
        raise ValueError(
            'connector="native" keeps the merger of one checkpoint of pictures and text: pass the same one as vision and as '
            "text."
        )
    model = load_native_model(text, **(vision_kwargs | text_kwargs))
    halves = {"vision_config": tower_of(model), "text_config": model}
    settings = {**_as_loaded(halves), "base_models": base_models(vision, text) or None}
    return None, model, settings | native_settings(model, check)


def _as_loaded(halves: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """Configs of both halves. A composite config sets implementations on its parts; what they were built with must stay."""
    return {
        **{name: half.config for name, half in halves.items()},
        "attn_implementation": {name: half.config._attn_implementation for name, half in halves.items()},
        "experts_implementation": {name: half.config._experts_implementation for name, half in halves.items()},
    }


def join_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """All parts in one dtype. An LLM that has it already stays as it is: some weights of its may be in float32."""
    for part in model.children():
        if part is not model.language_model or part.dtype != dtype:
            cast_part(part, dtype)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
