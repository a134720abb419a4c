"""Standardized states: centred and scaled by what was measured, kept with the weights, off unless asked for."""

import torch
import torch.nn.functional as F

from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.fusion_notellm2 import NoteLLM2Standardization
from tests.support.models import make_model


ITEMS = [{"title": "a"}, {"title": "b" * 30}, "x", {"title": "c", "topics": ["one", "two"]}]


def test_fitted_states_have_mean_zero_and_deviation_one_in_each_direction():
    model, _ = make_model(standardize_states=True)
    part: NoteLLM2Standardization = model.standardization
    states = torch.randn(200, 48) * torch.linspace(0.1, 9, 48) + 1
    states[:, 3] = 7
    assert not part.is_fitted
    torch.testing.assert_close(part(states), states, rtol=0, atol=0)
    part.fit(states)
    assert part.is_fitted
    moving = torch.arange(48) != 3
    torch.testing.assert_close(part(states).mean(0), torch.zeros(48), rtol=0, atol=1e-2)
    torch.testing.assert_close(part(states).std(0)[moving], torch.ones(47), rtol=0, atol=1e-3)
    assert not part(states)[:, 3].any()
    still = states * 1e-4 + 1
    part.fit(still)
    assert part(still).std(0).max() < 0.2  # rounding, for a model in bfloat16


def test_embeddings_are_those_of_standardized_states(tmp_path):
    settings = {"late_fusion": False, "micl": False, "embedding_dim": None, "readout": "mean"}
    plain, processor = make_model(**settings)
    plain.save_pretrained(tmp_path)
    assert not any("standardization" in name for name, _ in plain.named_parameters())
    model = NoteLLM2Model.from_pretrained(tmp_path, standardize_states=True).eval()
    inputs = processor(ITEMS, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).embeddings, plain(**inputs).embeddings)  # nothing is measured yet
        hidden = plain(**inputs, output_hidden_states=True).hidden_states[-1]
        mask = inputs["attention_mask"].unsqueeze(-1)
        states = (hidden * mask).sum(1) / mask.sum(1)
        model.standardization.fit(states)
        expected = F.normalize((states - states.mean(0)) / states.std(0), dim=-1)
        torch.testing.assert_close(model(**inputs).embeddings, expected, rtol=0, atol=1e-4)
        model.save_pretrained(tmp_path / "fitted")
        again = NoteLLM2Model.from_pretrained(tmp_path / "fitted").eval()
        torch.testing.assert_close(again(**inputs).embeddings, expected, rtol=0, atol=1e-4)


def test_what_was_measured_is_no_parameter_and_is_saved():
    model, _ = make_model(standardize_states=True)
    assert not any("standardization" in name for name, _ in model.named_parameters())
    assert {name for name in model.state_dict() if name.startswith("standardization.")} == {
        "standardization.mean",
        "standardization.scale",
    }
