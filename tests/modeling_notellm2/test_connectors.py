"""Connectors beside the published Q-Former: pooled patches through the projector (`connector: mlp`)."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model
from modeling_notellm2.connectors_notellm2 import patch_weights, pooled_patches
from tests.support.models import make_model


RED, BLUE = (Image.new("RGB", (40, 32), colour) for colour in ("red", "blue"))
ITEMS = [{"title": "a", "image": RED}, {"title": "b" * 30}, {"image": [RED, BLUE], "title": "c"}, {"image": BLUE}]


@pytest.mark.parametrize(("prefix", "side", "across"), [(0, 7, 2), (1, 7, 4), (5, 16, 4), (1, 2, 4)])
def test_a_square_picture_is_pooled_in_both_directions(prefix, side, across):
    hidden = torch.randn(3, prefix + side * side, 6)
    plane = hidden[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    expected = F.adaptive_avg_pool2d(plane, across).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled_patches(hidden, None, across * across), expected)


def test_other_pictures_are_pooled_in_stripes_without_their_padding():
    for tokens, cells in [(96, 16), (56, 4), (50, 3)]:
        prefix = 1 if tokens == 50 else 0
        expected = F.adaptive_avg_pool1d(torch.eye(tokens - prefix), cells).T
        torch.testing.assert_close(patch_weights(tokens, cells)[:, prefix:], expected)
    hidden, mask = torch.randn(2, 50, 6), torch.ones(2, 50, dtype=torch.long)
    mask[1, 30:] = 0
    hidden[1, 30:] = 1e9
    expected = F.adaptive_avg_pool1d(hidden[1, :30].T, 4).T
    torch.testing.assert_close(pooled_patches(hidden, mask, 4)[1], expected)


def test_a_model_without_a_qformer_sees_pictures(tmp_path):
    model, processor = make_model(connector="mlp")
    assert model.qformer is None and model.query_tokens is None
    assert model.projector.linear_1.in_features == 32
    with torch.no_grad():
        together = model(**processor(ITEMS, return_tensors="pt"))
        for number, item in enumerate(ITEMS):
            alone = model(**processor([item], return_tensors="pt"))
            torch.testing.assert_close(alone.embeddings[0], together.embeddings[number], rtol=0, atol=1e-5)
        blue = model(**processor([{**ITEMS[0], "image": BLUE}], return_tensors="pt"))
        for name in ("embeddings", "visual_embeddings"):
            assert (blue[name][0] - together[name][0]).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        again = NoteLLM2Model.from_pretrained(tmp_path).eval()
        assert torch.equal(again(**processor(ITEMS, return_tensors="pt")).embeddings, together.embeddings)
    model.train()(**processor(ITEMS, return_tensors="pt"), return_loss=True).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.projector.parameters())


def test_an_unknown_connector_is_refused():
    with pytest.raises(ValueError, match="expected qformer, mlp or native"):
        NoteLLM2Config(connector="resampler")
