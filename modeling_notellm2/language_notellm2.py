"""Reading any LLM alike: built from its own class, called as its family calls it, tried by short forward passes.

Families differ in what they take (positions, token ids beside embeddings for per-layer inputs), in what they make of
padding, and in whether they are causal. No list of families says so here: a model is tried, and what it does decides.
"""

import contextlib
import copy
import importlib
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from .packing_notellm2 import call_packed, can_pack


# Tokens of a trial. Longer than the windows and blocks of tiny models, short enough for seconds on a large one.
TRIAL_LENGTH = 48
TRIAL_PREFIX = 31
# Largest relative distance of two states that are the same but for rounding, in single and in half precision.
TOLERANCE, TOLERANCE_OF_HALF = 2e-4, 5e-2
EXPECTED = (
    "A decoder-only language model is expected (Llama, Qwen2/3, Mistral, SmolLM, Gemma, ...): the embedding is read at the "
    "last position, which only a causal model has gathered the whole item in."
)


class UnusableModelError(ValueError):
    """A model that NoteLLM-2 can't be built on; the message says what to use instead."""


@dataclass(frozen=True)
class LanguageCall:
    """How an LLM is called.

    Args:
        inputs: "embeds" for `inputs_embeds` alone; "ids" for `input_ids`, with the embeddings put in where the model looks
            them up, for families that use the ids for more than one lookup (per-layer embeddings).
        positions: whether `position_ids` are given.
        padding_side: the only side on which padding leaves states as they are; None: either.
        hidden_size: width of the last hidden state.
    """

    inputs: Literal["embeds", "ids"]
    positions: bool
    padding_side: Literal["left", "right"] | None = None
    hidden_size: int | None = None


def takes_positions(model: nn.Module) -> bool:
    """Whether the model takes `position_ids`. Alibi models (Bloom, MPT) derive distances from the mask."""
    return "position_ids" in inspect.signature(model.forward).parameters


def call_language_model(
    model: PreTrainedModel,
    call: LanguageCall,
    input_ids: torch.Tensor,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    seen: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Runs an LLM on embeddings, as its family wants to be called.

    Args:
        model: a headless decoder.
        call: what `try_language_model` found out.
        input_ids (`torch.LongTensor` of shape `(n, length)`): only of use where `call.inputs` is "ids"; every one must
            be an id of the model's own vocabulary.
        inputs_embeds (`torch.Tensor` of shape `(n, length, width)`).
        attention_mask (`torch.Tensor` of shape `(n, length)`).
        seen (`torch.BoolTensor` of shape `(n, 1, length, length)`, *optional*): for each token those that it sees, where that
            is not the LLM's own affair; see `try_bidirectional`.
        kwargs: for the model.

    Returns:
        What the model returns, with `last_hidden_state`.
    """
    if call.positions and call.inputs == "embeds" and can_pack(model, attention_mask, kwargs):
        return call_packed(model, inputs_embeds, attention_mask, seen)
    if call.positions:
        kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if seen is not None:  # transformers adds a mask of four dimensions to the scores as it is
        lowest = torch.finfo(inputs_embeds.dtype).min
        attention_mask = torch.zeros_like(seen, dtype=inputs_embeds.dtype).masked_fill(~seen, lowest)
    kwargs |= understood(model, {"use_cache": False, "return_dict": True})
    if call.inputs == "embeds":
        return model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
    with _ready_embeddings(model.get_input_embeddings(), inputs_embeds):
        return model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@contextlib.contextmanager
def _ready_embeddings(embedding: nn.Module, ready: torch.Tensor) -> Iterator[None]:
    """While this lasts, a lookup of this thread in `embedding` gives `ready`."""
    thread = threading.get_ident()

    def replace(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        same = threading.get_ident() == thread and output.shape == ready.shape
        return ready if same else None

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def understood(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those keywords that the model's forward takes."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}


def embedding_rows(model: PreTrainedModel) -> torch.Tensor:
    """The token embeddings, `(vocabulary, width)`."""
    rows = model.get_input_embeddings().weight
    assert isinstance(rows, torch.Tensor)
    return rows


def embedding_width(model: PreTrainedModel) -> int:
    """Width of the token embeddings, also while DeepSpeed (ZeRO-3) keeps their content elsewhere and leaves them empty."""
    rows = embedding_rows(model)
    return getattr(rows, "ds_shape", rows.shape)[-1]


def class_to_rebuild(model: PreTrainedModel) -> str | None:
    """Name of the class that a stack must be built from again; None where `AutoModel` finds it by the config."""
    of_config = MODEL_MAPPING.get(type(model.config), None)
    known = of_config if isinstance(of_config, tuple) else (of_config,)
    remote = not type(model).__module__.startswith("transformers.")
    return None if remote or type(model) in known[:1] else type(model).__name__


def build_language_model(config: PreTrainedConfig, class_name: str | None) -> PreTrainedModel:
    """The stack of a config, new: by `AutoModel`, or of the class of that name beside the config's own.

    Raises:
        UnusableModelError: if the config's package has no such model.
    """
    if class_name is None:
        return AutoModel.from_config(config)
    package = type(config).__module__.rpartition(".")[0]
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    text_class = getattr(module, class_name, None)
    if not (isinstance(text_class, type) and issubclass(text_class, PreTrainedModel)):
        raise UnusableModelError(f"text_class is {class_name!r}, but {package} has no model of that name.")
    return text_class._from_config(config)


def check_rebuilt(model: PreTrainedModel, class_name: str | None) -> None:
    """Raises UnusableModelError unless the config gives a model with the same weights (built on meta, without memory)."""
    with torch.device("meta"):
        rebuilt = build_language_model(copy.deepcopy(model.config), class_name)
    here = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in rebuilt.state_dict().items()}
    if here != there:
        different = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise UnusableModelError(
            f"{type(model).__name__} would not load again once saved: its config gives {type(rebuilt).__name__} with other "
            f"weights ({', '.join(different[:3])}{', ...' if len(different) > 3 else ''}). Pass the LLM's own checkpoint, "
            "unchanged, or a text-only sibling of it, as `text`."
        )


def try_language_model(model: PreTrainedModel) -> LanguageCall:
    """Finds out by a few short forward passes how a model is called, and that it may be used at all.

    Args:
        model: a headless decoder with weights. It is left as it was.

    Raises:
        UnusableModelError: if the model can't be called with a text, reads ahead, or makes other states of a text in a batch.
    """
    name = type(model).__name__
    ids = trial_ids(model)
    training = model.training
    try:
        devices = [ids.device] if ids.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            model.eval()
            own = own_states(model, ids[:1])
            call = _call_like(model, ids[:1], own)
            tried = _tried(model, call, ids, own)
            model.train()
            embeds = model.get_input_embeddings()(ids)
            call_language_model(model, call, ids, embeds, torch.ones_like(ids))  # Reformer trains on one length alone
            return tried
    except UnusableModelError:
        raise
    except Exception as error:
        raise UnusableModelError(
            f"{name} can't be read as a language model ({type(error).__name__}: {error}). {EXPECTED}"
        ) from error
    finally:
        model.train(training)


def try_bidirectional(model: PreTrainedModel, call: LanguageCall) -> None:
    """Finds out by four short forward passes that a model sees the tokens that a mask says, behind a token too.

    Args:
        model: a headless decoder with weights.
        call: how it is called.

    Raises:
        UnusableModelError: if it doesn't.
    """
    ids, training = trial_ids(model), model.training
    everywhere = torch.ones(1, 1, TRIAL_LENGTH, TRIAL_LENGTH, dtype=torch.bool, device=ids.device)
    start = everywhere.clone()
    start[:, :, :TRIAL_PREFIX, TRIAL_PREFIX:] = False  # the two texts differ behind it
    try:
        if model.config._attn_implementation.startswith("flash"):
            raise ValueError("flash attention takes no mask of its own; load with attn_implementation sdpa or eager")
        states = []
        with torch.no_grad():
            for row, seen in ((ids[:1], everywhere), (ids[1:], everywhere), (ids[:1], start), (ids[1:], start)):
                embeds = model.eval().get_input_embeddings()(row)
                output = call_language_model(model, call, row, embeds, torch.ones_like(row), seen)
                states.append(output.last_hidden_state[:, :TRIAL_PREFIX])
    except Exception as error:
        raise UnusableModelError(
            f'{type(model).__name__} can\'t be read with text_attention="bidirectional" ({type(error).__name__}: {error}).'
        ) from error
    finally:
        model.train(training)
    if not differ(states[0], states[1], tolerance(model)) or differ(states[2], states[3], tolerance(model)):
        raise UnusableModelError(
            f'{type(model).__name__} doesn\'t see the tokens that a mask says; text_attention must stay "causal" with it.'
        )


def trial_ids(model: PreTrainedModel) -> torch.Tensor:
    """Two rows of random ids that differ behind the prefix, of rows that no special token uses: `(2, TRIAL_LENGTH)`."""
    rows = embedding_rows(model)
    config = model.config.get_text_config().to_dict()
    special = {value for key, value in config.items() if key.endswith("token_id") and isinstance(value, int)}
    usual = [number for number in range(min(rows.shape[0], 20_000)) if number not in special]
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(usual), (2, TRIAL_LENGTH), generator=generator)
    ids = torch.tensor(usual)[places]
    ids[1, :TRIAL_PREFIX] = ids[0, :TRIAL_PREFIX]
    return ids.to(rows.device)


def own_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the model makes of a text alone, called as anybody would."""
    kwargs = understood(model, {"use_cache": False, "return_dict": True})
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs)
    states = getattr(outputs, "last_hidden_state", None)
    if states is None or states.shape[:2] != ids.shape:
        given = "no last_hidden_state" if states is None else f"a last_hidden_state of shape {tuple(states.shape)}"
        raise UnusableModelError(
            f"{type(model).__name__} returns {given} for token ids of shape {tuple(ids.shape)}. {EXPECTED}"
        )
    return states


def _call_like(model: PreTrainedModel, ids: torch.Tensor, own: torch.Tensor) -> LanguageCall:
    """The first way of calling the model with ready embeddings that gives its own states."""
    embeds, mask = model.get_input_embeddings()(ids), torch.ones_like(ids)
    visual = embeds.roll(1, dims=-1)  # belong to no token, as visual tokens
    errors: list[str] = []
    inputs: list[Literal["embeds", "ids"]] = ["embeds", "ids"]
    for way in inputs:
        for positions in (True, False) if takes_positions(model) else (False,):
            call = LanguageCall(way, positions, hidden_size=own.shape[-1])
            try:
                states = call_language_model(model, call, ids, embeds, mask).last_hidden_state
                others = call_language_model(model, call, ids, visual, mask).last_hidden_state
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if not differ(states, own, tolerance(model)) and differ(others, own, tolerance(model)):
                return call
            errors.append("other states than from the token ids, or the same from other embeddings")
    raise UnusableModelError(
        f"{type(model).__name__} gives other states for ready embeddings than for the token ids they belong to, so visual "
        f"tokens can't enter it ({errors[0]}). {EXPECTED}"
    )


def _tried(model: PreTrainedModel, call: LanguageCall, ids: torch.Tensor, own: torch.Tensor) -> LanguageCall:
    """The call with the side of padding that is safe, after one batch of four rows.

    Rows: the text as it is; another end; its beginning, padded on the left; the same, padded on the right. The padding is
    made of tokens that would show if they were read.
    """
    end, length = TRIAL_PREFIX, TRIAL_LENGTH
    batch = torch.cat([ids, ids[:1].roll(length - end, dims=1), ids[:1]])
    batch[2, : length - end] = batch[3, end:] = ids[1, end:]
    mask = torch.ones_like(batch)
    mask[2, : length - end] = mask[3, end:] = 0
    embeds = model.get_input_embeddings()(batch)
    states = call_language_model(model, call, batch, embeds, mask).last_hidden_state
    name, most = type(model).__name__, tolerance(model)
    right = not differ(states[3, :end], own[0, :end], most)
    left = not differ(states[2, length - end :], own[0, :end], most)
    alike = (left or right) and not differ(states[0], own[0], most)
    beginning = own[0, :end] if alike else own_states(model, ids[:1, :end])[0]
    if differ(states[1, :end], states[0, :end], most) or differ(own[0, :end], beginning, most):
        raise UnusableModelError(
            f"`text` is a {model.config.model_type!r} model ({name}) that reads ahead: a later token changes the states of "
            f"earlier ones. {EXPECTED}"
        )
    if not alike:
        raise UnusableModelError(
            f"{name} makes other states of a text in a padded batch than alone, on either side of padding, so embeddings "
            f"would depend on their neighbours. {EXPECTED}"
        )
    side: Literal["left", "right"] | None = None if left and right else ("left" if left else "right")
    return LanguageCall(call.inputs, call.positions, side, call.hidden_size)


def tolerance(model: PreTrainedModel) -> float:
    """How far states may differ, relatively, that are the same but for rounding in the model's type."""
    return TOLERANCE if model.dtype.itemsize >= 4 else TOLERANCE_OF_HALF


def differ(states: torch.Tensor, expected: torch.Tensor, most: float) -> bool:
    """Whether any state is relatively further off than `most`; NaN is."""
    if states.shape != expected.shape:
        return True
    distance = (states.float() - expected.float()).norm(dim=-1)
    scale = expected.float().norm(dim=-1).clamp(min=1e-6)
    return not bool((distance / scale <= most).all())
