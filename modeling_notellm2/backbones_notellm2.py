"""Fetching the language half of NoteLLM-2, a decoder-only LLM with its tokenizer, from the Hub or from a folder."""

import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging


logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<IMG>"
VISUAL_EMBEDDING_TOKEN = "<IMG_EMB>"
# Tokens that vocabularies keep free: Llama 3, Gemma, Mistral, Qwen.
SPARE_TOKEN = re.compile(r"<\|reserved_special_token_\d+\|>|<unused\d+>|<SPECIAL_\d+>|<\|extra_\d+\|>")


def load_language_model(source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """The decoder of a language model, without its head.

    Args:
        source: id, folder, or an already loaded model (with or without a head).
        kwargs: for `AutoModel.from_pretrained`, e.g. `gguf_file="model.gguf"`.

    Raises:
        ValueError: for encoders and encoder-decoders.
    """
    if not isinstance(source, PreTrainedModel):
        if "gguf_file" not in kwargs:
            check_decoder_only(AutoConfig.from_pretrained(source, **_config_kwargs(kwargs)))
        loaded = AutoModel.from_pretrained(source, **kwargs)
    else:
        loaded = source
    check_decoder_only(loaded.config)
    model = loaded.get_decoder()
    if model.get_input_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no token embeddings; pass a decoder-only language model as `text`."
        )
    return model


def base_models(vision: str | PreTrainedModel, text: str | PreTrainedModel) -> dict[str, str]:
    """Ids of the halves for `NoteLLM2Config.base_models`; a folder of this machine is none."""
    halves = {"vision_encoder": vision, "language_model": text}
    names = {part: half if isinstance(half, str) else half.name_or_path for part, half in halves.items()}
    return {part: name for part, name in names.items() if name and not os.path.exists(name)}


def check_decoder_only(config: PreTrainedConfig) -> None:
    """Raises ValueError unless `config` is that of a decoder-only language model."""
    text_config = config.get_text_config()
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder or not causal or not getattr(text_config, "is_decoder", True):
        raise ValueError(
            f"`text` is a {config.model_type!r} model. A decoder-only language model is expected (Llama, Qwen2/3, Mistral, "
            "SmolLM, Gemma, ...): the embedding is read at the last position, which only a causal model has gathered "
            "the whole item in."
        )


def _config_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in ("revision", "token", "subfolder", "cache_dir") if name in kwargs}


@dataclass(frozen=True)
class ItemTokens:
    """The two tokens of a vocabulary that stand for an image and for the visual embedding's read-out."""

    image_id: int
    visual_embedding_id: int
    fresh: bool  # no training has used their embedding rows yet


def item_tokens(tokenizer: PreTrainedTokenizerBase) -> ItemTokens:
    """Finds or makes <IMG> and <IMG_EMB> in a tokenizer, changed in place; the same tokenizer always gives the same ids.

    A vocabulary that has tokens of these names keeps them; one with reserved tokens (Llama 3, Gemma) lends its last two,
    so that the embedding matrix need not grow; any other is extended. All become special tokens.
    """
    names = [IMAGE_TOKEN, VISUAL_EMBEDDING_TOKEN]
    vocabulary = tokenizer.get_vocab()
    spare: list[str] = []
    if not all(name in vocabulary for name in names):
        spare = sorted((name for name in vocabulary if SPARE_TOKEN.fullmatch(name)), key=lambda name: vocabulary[name])
    if len(spare) >= 2:
        names = spare[-2:]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    image_id, visual_embedding_id = (tokenizer.get_vocab()[name] for name in names)
    appended = min(image_id, visual_embedding_id) >= len(tokenizer) - 2
    return ItemTokens(image_id, visual_embedding_id, fresh=bool(spare) or appended)


def tokenizer_of(source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, or None for an already loaded model that names no folder with one."""
    place = source if isinstance(source, str) else source.name_or_path
    if not place:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, **kwargs)
    except (OSError, ValueError) as error:
        logger.warning("No tokenizer found at %s (%s); call `processor.prepare_model(model)` later.", place, error)
        return None


def fit_token_embeddings(model: PreTrainedModel, tokens: ItemTokens) -> None:
    """Gives <IMG> and <IMG_EMB> rows in the LLM's embedding; fresh ones start as the mean of the others.

    Spare rows (many matrices are padded beyond their tokenizer) are used before the matrix is enlarged.
    """
    ids = [tokens.image_id, tokens.visual_embedding_id]
    before = _rows(model).shape[0]
    if max(ids) >= before:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    rows = _rows(model)
    if tokens.fresh and rows.device.type != "meta":
        with torch.no_grad():
            known = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
            known[ids] = False
            known[before:] = False
            rows[ids] = rows[known].float().mean(0).to(rows.dtype)


def _rows(model: PreTrainedModel) -> torch.Tensor:
    rows = model.get_input_embeddings().weight
    assert isinstance(rows, torch.Tensor)
    return rows
