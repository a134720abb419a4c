"""Leaving out layers of an LLM: a small model from a large one's first and last layers.

What says something of each layer in a config is cut with the layers; then the config must give the very model that was
cut, in weights and in what it computes. A family where it doesn't is refused.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_notellm2.language_notellm2 import build_language_model, class_to_rebuild, differ, own_states, trial_ids


# Numbers of a config that count its first layers.
LEADING = re.compile(r"first_k_.*|(num|n)_dense_layers|max_window_layers|moe_layer_(start|end)_index")


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Leaves out all but some of a decoder's layers, in place; its final norm stays.

    The first layers and some of the last make a better small model than as many of the first: what gathers an item into
    one word stands at the end.

    Args:
        model: a headless decoder.
        layers: numbers of the layers to keep, rising.

    Raises:
        ValueError: for layers that it doesn't have, in another order or twice, and for families whose layers can't be told
            apart or whose config can't describe the rest. The model is of no use then.
    """
    total = model.config.num_hidden_layers
    name = type(model).__name__
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < total:
        raise ValueError(
            f"{name} has layers 0 to {total - 1}; {list(layers)} can't be kept: name some of them, rising."
        )
    lists = [part for part, child in model.named_children() if isinstance(child, nn.ModuleList) and len(child) == total]
    if len(lists) != 1:
        raise ValueError(f"{name} has no single list of its {total} layers, so none can be left out.")
    parts = getattr(model, lists[0])
    setattr(model, lists[0], nn.ModuleList(parts[number] for number in layers))
    for number, part in enumerate(getattr(model, lists[0])):
        for module in part.modules():  # which part of a cache of keys and values is whose
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    cut_config(model.config, layers)
    _check_cut(model, layers)


def cut_config(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Cuts everything in a config that goes by layer, in place: lists of a value each, numbers of layers, counts of the first."""
    total = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and value and "token" not in name:
            setattr(config, name, _cut_list(value, layers, total))
        elif isinstance(value, int) and LEADING.fullmatch(name):
            setattr(config, name, sum(number < value for number in layers))
    config.num_hidden_layers = len(layers)


def _cut_list(values: Sequence[Any], layers: Sequence[int], total: int) -> list[Any]:
    """Numbers of layers are counted anew, a list of one value for each layer is cut, any other stays."""
    numbers = all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < total for value in values)
    if numbers and list(values) == sorted(set(values)):
        return [new for new, number in enumerate(layers) if number in values]
    return [values[number] for number in layers] if len(values) == total else list(values)


def _check_cut(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Raises ValueError unless the cut config gives the cut model."""
    advice = (
        f"{type(model).__name__} can't be cut to the layers {list(layers)}: its config would give another model (%s). Leave "
        "--text_layers out, or keep the first layers alone."
    )
    training = model.training
    try:
        rebuilt = build_language_model(copy.deepcopy(model.config), class_to_rebuild(model))
        rebuilt.load_state_dict(model.state_dict())
        with torch.no_grad():
            ids = trial_ids(model)[:1].cpu()
            rebuilt.to(model.dtype)  # type: ignore[arg-type]  # transformers' decorator hides that `to` is a method
            states = own_states(rebuilt.eval(), ids)
            expected = own_states(model.eval(), ids.to(model.device)).cpu()
    except Exception as error:
        raise ValueError(advice % " ".join(str(error).split())[:200]) from error
    finally:
        model.train(training)
    if differ(states, expected, 1e-3):
        raise ValueError(advice % "it computes something else")
