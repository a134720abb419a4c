"""Fetching the language half of NoteLLM-2, a decoder-only LLM with its tokenizer, from the Hub or from a folder."""

import os
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .language_notellm2 import (
    EXPECTED,
    check_rebuilt,
    class_to_rebuild,
    embedding_rows,
    takes_positions,
    try_language_model,
)


logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<IMG>"
VISUAL_EMBEDDING_TOKEN = "<IMG_EMB>"
# Tokens that vocabularies keep free: Llama 3, Gemma, Mistral, Qwen.
SPARE_TOKEN = re.compile(r"<\|reserved_special_token_\d+\|>|<unused\d+>|<SPECIAL_\d+>|<\|extra_\d+\|>")


def load_language_model(source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """The decoder of a language model, or of a model of pictures and text, without its head.

    Args:
        source: id, folder, or an already loaded model (with or without a head).
        kwargs: for `AutoModel.from_pretrained`, e.g. `gguf_file="model.gguf"`.

    Raises:
        ValueError: for encoder-decoders, for models without a decoder of text, and where weights of the decoder are not
            in the checkpoint.
    """
    if isinstance(source, PreTrainedModel):
        check_no_encoder(source.config)
        return language_stack(source)
    classes: list[Any] = [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText]
    if "gguf_file" not in kwargs:
        config = AutoConfig.from_pretrained(source, **_config_kwargs(kwargs))
        check_no_encoder(config)
        # Those that wrote the weights: for the text parts of some families there is no Auto class.
        classes += [getattr(transformers, name) for name in config.architectures or [] if hasattr(transformers, name)]
    problems = []
    for auto in classes:
        try:
            loaded, info = auto.from_pretrained(source, output_loading_info=True, **kwargs)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            continue
        model = language_stack(loaded)
        problem = unfit_weights(model, loaded, info)
        if problem is None:
            return model
        problems.append(problem)
    raise ValueError(
        f"The weights of {source} don't fit its config: {problems[0] if problems else 'transformers has no model for it'}. "
        "Was it saved by another version or another class of model? Load it yourself and pass the loaded model as `text`."
    )


def language_stack(loaded: PreTrainedModel) -> PreTrainedModel:
    """What is left of a model without head and towers: the innermost part that looks up the same token embeddings.

    Raises:
        ValueError: if there is none, or if towers for pictures or sound are a part of it.
    """
    tokens = _token_embeddings(loaded)
    if tokens is None:
        raise ValueError(f"`text` is a {loaded.config.model_type!r} model without token embeddings. {EXPECTED}")
    stack = [
        part for part in loaded.modules() if isinstance(part, PreTrainedModel) and _token_embeddings(part) is tokens
    ][-1]
    towers = [type(part).__name__ for part in stack.modules() if isinstance(part, PreTrainedModel) and _is_tower(part)]
    if towers:
        raise ValueError(
            f"{type(stack).__name__} holds {' and '.join(towers)} inside its language model, which can't be taken out. Use "
            "the text-only model of its family as `text`."
        )
    return stack


def _token_embeddings(model: PreTrainedModel) -> Any:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _is_tower(model: PreTrainedModel) -> bool:
    modalities = model.input_modalities
    return "text" not in ([modalities] if isinstance(modalities, str) else list(modalities or ["text"]))


def unfit_weights(model: PreTrainedModel, loaded: PreTrainedModel, info: dict[str, Any]) -> str | None:
    """What is wrong with the weights that a stack was loaded with; None if nothing.

    A head or a tower that the stack leaves out may be missing or left over. Weights of the stack that the checkpoint
    lacks, and weights of its own layers that it has no place for, may not.
    """
    prefix = next((name + "." for name, part in loaded.named_modules() if part is model and name), "")
    missing = sorted(name for name in info["missing_keys"] if name.startswith(prefix))
    if missing:
        return f"{len(missing)} weights of {type(model).__name__} are missing ({', '.join(missing[:3])})"
    modules = {
        name for name, part in loaded.named_modules() if name.startswith(prefix) and name not in ("", prefix[:-1])
    }
    parents = {name: name.rpartition(".")[0] for name in info["unexpected_keys"]}
    head = loaded.base_model_prefix + "."
    surplus = sorted(name for name, of in parents.items() if of in modules or of.removeprefix(head) in modules)
    if surplus:
        return f"{type(model).__name__} has no place for {len(surplus)} weights ({', '.join(surplus[:3])})"
    if info["mismatched_keys"]:
        return f"weights of another shape: {', '.join(str(key) for key in list(info['mismatched_keys'])[:3])}"
    return None


def text_settings(model: PreTrainedModel, check: bool) -> dict[str, Any]:
    """Fields of `NoteLLM2Config` that say how an LLM is built and called.

    Args:
        model: a headless decoder.
        check: try it (see `try_language_model`), and that its config gives the same model again. A model without weights
            (on the meta device) is not tried.

    Raises:
        ValueError: for an LLM that can't be used.
    """
    class_name = class_to_rebuild(model)
    settings: dict[str, Any] = {"text_class": class_name}
    if check and all(parameter.device.type != "meta" for parameter in model.parameters()):
        call = try_language_model(model)
        if not getattr(model, "is_quantized", False):  # its weights are packed
            check_rebuilt(model, class_name)
        settings |= {"text_inputs": call.inputs, "padding_side": call.padding_side}
        if call.positions != takes_positions(model):
            settings["text_positions"] = call.positions
        if call.hidden_size != getattr(model.config, "hidden_size", None):
            settings["text_hidden_size"] = call.hidden_size
    return settings


def base_models(vision: str | PreTrainedModel, text: str | PreTrainedModel) -> dict[str, str]:
    """Ids of the halves for `NoteLLM2Config.base_models`; a folder of this machine is none."""
    halves = {"vision_encoder": vision, "language_model": text}
    names = {part: half if isinstance(half, str) else half.name_or_path for part, half in halves.items()}
    return {part: name for part, name in names.items() if name and not os.path.exists(name)}


def check_no_encoder(config: PreTrainedConfig) -> None:
    """Raises ValueError for the config of an encoder-decoder, before its weights are loaded."""
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise ValueError(f"`text` is a {config.model_type!r} model, which has an encoder. {EXPECTED}")


def _config_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: kwargs[name]
        for name in ("revision", "token", "subfolder", "cache_dir", "trust_remote_code")
        if name in kwargs
    }


@dataclass(frozen=True)
class ItemTokens:
    """The two tokens of a vocabulary that stand for an image and for the visual embedding's read-out."""

    image_id: int
    visual_embedding_id: int
    fresh: bool  # no training has used their embedding rows yet
    vocabulary: int  # tokens that the tokenizer has beside them


def item_tokens(tokenizer: PreTrainedTokenizerBase, image_token_id: int | None = None) -> ItemTokens:
    """Finds or makes <IMG> and <IMG_EMB> in a tokenizer, changed in place; the same tokenizer always gives the same ids.

    A vocabulary that has tokens of these names keeps them; one with reserved tokens (Llama 3, Gemma) lends its last two,
    so that the embedding matrix need not grow; any other is extended. All become special tokens.

    Args:
        image_token_id: a checkpoint's own placeholder, which then takes the place of <IMG>.
    """
    check_tokenizer(tokenizer)
    names = [_image_token(tokenizer, image_token_id), VISUAL_EMBEDDING_TOKEN]
    needed = 2 if image_token_id is None else 1
    vocabulary = tokenizer.get_vocab()
    spare: list[str] = []
    if not all(name in vocabulary for name in names):
        spare = sorted((name for name in vocabulary if SPARE_TOKEN.fullmatch(name)), key=lambda name: vocabulary[name])
    if len(spare) >= needed:
        names[-needed:] = spare[-needed:]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    image_id, visual_embedding_id = (tokenizer.get_vocab()[name] for name in names)
    taken = {number for name, number in vocabulary.items() if name not in names}
    if not taken.isdisjoint({image_id, visual_embedding_id}):
        raise ValueError(
            f"{type(tokenizer).__name__} gives {' and '.join(names)} ids that other tokens have: its ids have gaps. Add the two "
            "tokens to the tokenizer yourself, with ids of their own, and save it."
        )
    appended = min((image_id, visual_embedding_id)[-needed:]) >= len(tokenizer) - needed
    return ItemTokens(image_id, visual_embedding_id, fresh=bool(spare) or appended, vocabulary=len(taken))


def _image_token(tokenizer: PreTrainedTokenizerBase, image_token_id: int | None) -> str:
    if image_token_id is None:
        return IMAGE_TOKEN
    if image_token_id not in tokenizer.get_vocab().values():
        raise ValueError(
            f"The tokenizer has no token {image_token_id}, which its checkpoint's config names for pictures."
        )
    return str(tokenizer.convert_ids_to_tokens(image_token_id))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a tokenizer that can't spell a text: transformers makes one up where a folder has no files."""
    ids = tokenizer("red apple", add_special_tokens=False)["input_ids"]
    if set(ids) <= set(tokenizer.all_special_ids):
        raise ValueError(
            f"{type(tokenizer).__name__} of {len(tokenizer)} token(s) can't spell a text: its folder holds no tokenizer's "
            "files, so that transformers made one up. Put the LLM's own tokenizer there."
        )


def tokenizer_of(source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, or None for an already loaded model that names no folder with one."""
    place = source if isinstance(source, str) else source.name_or_path
    if not place:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **kwargs)
        check_tokenizer(tokenizer)
        return tokenizer
    except (OSError, ValueError) as error:
        logger.warning("No tokenizer found at %s (%s); call `processor.prepare_model(model)` later.", place, error)
        return None


def fit_token_embeddings(model: PreTrainedModel, tokens: ItemTokens) -> None:
    """Gives <IMG> and <IMG_EMB> rows in the LLM's embedding; fresh ones start as the mean of the others.

    Spare rows (many matrices are padded beyond their tokenizer) are used before the matrix is enlarged.

    Raises:
        ValueError: if the rows would be others' in the LLM's own vocabulary.
    """
    ids = [tokens.image_id, tokens.visual_embedding_id]
    if model.config.connector == "native":
        ids = ids[1:]  # no visual token reads the other's row
    before = embedding_rows(model).shape[0]
    _check_vocabulary(model, tokens, before)
    if max(ids) >= before:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    rows = embedding_rows(model)
    if tokens.fresh and rows.device.type != "meta":
        with torch.no_grad():
            known = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
            known[ids] = False
            known[before:] = False
            rows[ids] = rows[known].float().mean(0).to(rows.dtype)


def _check_vocabulary(model: PreTrainedModel, tokens: ItemTokens, rows: int) -> None:
    """Raises ValueError where fresh tokens would take rows that another vocabulary than the tokenizer's uses."""
    config = model.config.get_text_config()
    special = [getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    used = {number for ids in special for number in (ids if isinstance(ids, list) else [ids])}
    if tokens.fresh and (
        2 * tokens.vocabulary < rows or not used.isdisjoint({tokens.image_id, tokens.visual_embedding_id})
    ):
        raise ValueError(
            f"The tokenizer has {tokens.vocabulary} tokens, but the LLM has {rows} rows of embeddings: it is another LLM's "
            "tokenizer, and <IMG> and <IMG_EMB> would overwrite rows in use. Take the tokenizer that the LLM came with."
        )
