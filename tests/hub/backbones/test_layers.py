"""Cutting layers gives a model that its config describes, in every family, or a refusal."""

import copy

import pytest
import torch
import transformers as hf

from hub.backbones.layers import cut_config, keep_layers
from modeling_notellm2.backbones_notellm2 import load_language_model
from modeling_notellm2.language_notellm2 import build_language_model, class_to_rebuild, own_states, trial_ids
from tests.support.families import tiny_model


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("smollm3", ["no_rope_layers"]),
        ("llama4_text", ["no_rope_layers", "moe_layers"]),
        ("glm4_moe", ["first_k_dense_replace"]),
        ("deepseek_v3", ["first_k_dense_replace"]),
        ("qwen3_next", ["layer_types"]),
        ("falcon_h1", []),
        ("gemma3_text", ["layer_types"]),
    ],
)
def test_what_goes_by_layer_is_cut_with_the_layers(family, fields):
    model = load_language_model(tiny_model(family))
    before = copy.deepcopy(model.config)
    keep_layers(model, [0, 1, 3])
    assert model.config.num_hidden_layers == 3
    assert all(getattr(before, field, None) is not None for field in fields)
    again = build_language_model(copy.deepcopy(model.config), class_to_rebuild(model)).eval()
    again.load_state_dict(model.state_dict())
    ids = trial_ids(model)
    with torch.no_grad():
        torch.testing.assert_close(own_states(again, ids), own_states(model, ids), atol=2e-5, rtol=1e-4)


def test_the_first_layers_of_a_cut_model_compute_as_before():
    """Jamba's kinds of layers come of a period: the first ones stay what they were."""
    model = load_language_model(tiny_model("jamba"))
    ids = trial_ids(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False, output_hidden_states=True).hidden_states[2]
        keep_layers(model, [0, 1])
        model.final_layernorm = torch.nn.Identity()
        torch.testing.assert_close(own_states(model, ids), expected)


@pytest.mark.parametrize(("family", "layers"), [("jamba", [0, 2, 3]), ("gemma3n_text", [0, 1])])
def test_a_family_that_cant_be_cut_so_is_refused(family, layers):
    model = load_language_model(tiny_model(family))
    with pytest.raises(ValueError, match="can't be cut to the layers .* Leave --text_layers out"):
        keep_layers(model, layers)


def test_lists_of_layers_are_told_from_lists_of_other_things():
    config = hf.Qwen2MoeConfig(num_hidden_layers=6, mlp_only_layers=[0, 3, 5], eos_token_id=[1, 2])
    config.scales = [0.5] * 6
    cut_config(config, [0, 2, 3])
    assert (config.mlp_only_layers, config.eos_token_id, config.scales) == ([0, 2], [1, 2], [0.5] * 3)
