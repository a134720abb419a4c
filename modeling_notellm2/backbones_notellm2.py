"""Fetching the two halves that NoteLLM-2 joins: a vision encoder and a decoder-only LLM, from the Hub or from a folder."""

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
# How composite checkpoints (CLIP, SigLIP, ...) name their vision tower.
VISION_TOWER_NAMES = ("vision_model", "vision_tower", "visual")


def load_vision_encoder(source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """The vision encoder of a checkpoint; of a composite one (CLIP) its vision tower alone.

    Args:
        source: id, folder, or an already loaded model.
        kwargs: for `AutoModel.from_pretrained`.

    Raises:
        ValueError: if a composite checkpoint has no vision tower.
    """
    model = source if isinstance(source, PreTrainedModel) else AutoModel.from_pretrained(source, **kwargs)
    if not hasattr(model.config, "vision_config"):
        return model
    for name in VISION_TOWER_NAMES:
        tower = getattr(model, name, None)
        if isinstance(tower, PreTrainedModel):
            return tower
    raise ValueError(
        f"{type(model).__name__} has a vision_config but none of {', '.join(VISION_TOWER_NAMES)}. "
        "Pass its vision encoder itself, loaded, as `vision`."
    )


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


def add_item_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Makes <IMG> and <IMG_EMB> special tokens of a tokenizer, changed in place, and returns their ids.

    Tokens of that name that the vocabulary already has keep their ids.
    """
    names = (IMAGE_TOKEN, VISUAL_EMBEDDING_TOKEN)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(names[0]), tokenizer.convert_tokens_to_ids(names[1])  # type: ignore[return-value]


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


def fit_token_embeddings(model: PreTrainedModel, token_ids: tuple[int, ...], old_size: int) -> None:
    """Gives each of `token_ids` a row in the LLM's embedding, set to the mean of the rows that were in use.

    Spare rows (many vocabularies are padded beyond their tokenizer) are used before the matrix is enlarged.

    Args:
        model: the [`NoteLLM2Model`].
        token_ids: ids of <IMG> and <IMG_EMB>.
        old_size: number of tokens before they were added; ids below it keep their trained rows.
    """
    needed = max(token_ids) + 1
    if needed > _rows(model).shape[0]:
        model.resize_token_embeddings(needed, mean_resizing=False)
    rows = _rows(model)
    new = [token for token in token_ids if token >= old_size]
    if new and rows.device.type != "meta":
        with torch.no_grad():
            rows[new] = rows[:old_size].float().mean(0).to(rows.dtype)


def _rows(model: PreTrainedModel) -> torch.Tensor:
    rows = model.get_input_embeddings().weight
    assert isinstance(rows, torch.Tensor)
    return rows
