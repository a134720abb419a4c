"""Loading what a model is joined from, with the fields of its config that follow: two halves, or one checkpoint as both."""

from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbones_notellm2 import base_models, item_tokens, load_language_model, text_settings, tokenizer_of
from .configuration_notellm2 import NoteLLM2Config
from .native_notellm2 import load_native_model, native_settings
from .precision_notellm2 import cast_part
from .towers_notellm2 import load_vision_encoder, tower_of


logger = logging.get_logger(__name__)

Half = str | PreTrainedModel
Loaded = tuple[PreTrainedModel | None, PreTrainedModel, dict[str, Any]]
"""Vision encoder (None: it is within the other), LLM, and fields of `NoteLLM2Config`."""


def join(
    model_class: type[Any],
    vision: Half,
    text: Half,
    dtype: torch.dtype | None,
    vision_kwargs: dict[str, Any],
    text_kwargs: dict[str, Any],
    check: bool,
    overrides: dict[str, Any],
) -> Any:
    """What `NoteLLM2Model.from_vision_text_pretrained` gives; arguments and exceptions are its own."""
    unknown = set(overrides) - {field.name for field in fields(NoteLLM2Config)}
    if unknown:
        raise ValueError(f"Unknown NoteLLM2Config fields: {', '.join(sorted(unknown))}.")
    connector = overrides.get("connector") or connector_between(vision, text)
    load = load_native if connector == "native" else load_halves
    vision_model, language_model, settings = load(vision, text, vision_kwargs, text_kwargs, check)
    config = NoteLLM2Config(**(settings | overrides))
    model = model_class(config, vision_model, language_model)
    join_dtypes(model, dtype or language_model.dtype)
    if check:
        model.try_attention()
    if config.image_token_id is None or config.visual_embedding_token_id is None:
        beside = {k: v for k, v in text_kwargs.items() if k in ("gguf_file", "revision", "token", "subfolder")}
        tokenizer = tokenizer_of(text, **beside)
        if tokenizer is not None:
            model.set_item_tokens(item_tokens(tokenizer, config.native_image_token_id))
    logger.info("Connector, late fusion and reduction are new unless they are native: train before use.")
    return model


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
