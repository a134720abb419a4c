"""Read-out by mean and bidirectional attention: what they compute, packed and padded, and which LLMs are refused."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.packing_notellm2 import PACKED_SDPA
from tests.support.families import strengthen, tiny_model
from tests.support.models import QFORMER, make_backbones, make_model


RED, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
ITEMS = [{"title": "a", "image": RED}, {"title": "b" * 30}, {"image": BLUE}, {"title": "c", "topics": ["one", "two"]}]
BIDIRECTIONAL = {"readout": "mean", "text_attention": "bidirectional"}


def strong_model(**overrides):
    """A tiny model whose attention matters."""
    model, processor = make_model(**overrides)
    strengthen(model.language_model)
    return model, processor


def embed(model, processor, items, **options):
    with torch.no_grad():
        return model(**processor(items, return_tensors="pt", **options))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_mean_is_over_the_items_own_tokens(attention):
    model, processor = strong_model(readout="mean", text_attention=attention, embedding_dim=None, late_fusion=False)
    inputs = processor(ITEMS, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    hidden = output.hidden_states[-1]
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        states = hidden[row, mask.bool()]
        torch.testing.assert_close(output.embeddings[row], F.normalize(states.mean(0), dim=0), rtol=0, atol=1e-6)
        slots = (ids[mask.bool()] == processor.visual_embedding_token_id).nonzero()
        if len(slots):
            expected = F.normalize(states[: int(slots[0])].mean(0), dim=0)
            torch.testing.assert_close(output.visual_embeddings[row], expected, rtol=0, atol=1e-6)
        else:
            assert not output.visual_embeddings[row].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", [PACKED_SDPA, "sdpa", "eager"])
@pytest.mark.parametrize("settings", [{"readout": "mean"}, BIDIRECTIONAL, {"text_attention": "bidirectional"}])
def test_an_item_has_the_embeddings_that_it_has_alone(settings, implementation, side):
    model, processor = strong_model(**settings)
    alone = [embed(model, processor, [item]) for item in ITEMS]
    assert model.language_model.config._attn_implementation == PACKED_SDPA
    model.language_model.set_attn_implementation(implementation)
    together = embed(model, processor, ITEMS, padding_side=side)
    for name in ("embeddings", "visual_embeddings"):
        expected = torch.cat([output[name] for output in alone])
        torch.testing.assert_close(together[name], expected, rtol=0, atol=1e-5)


def test_bidirectional_tokens_see_behind_them_but_no_picture_sees_the_text():
    model, processor = strong_model(**BIDIRECTIONAL)
    ids = processor(["abcd", "abce"], return_tensors="pt")
    with torch.no_grad():
        first = model(**ids, output_hidden_states=True).hidden_states[-1][:, 0]
    assert (first[0] - first[1]).norm() > 1e-3 * first[0].norm()
    one, other = (embed(model, processor, [{"title": title, "image": RED}]) for title in ("a", "something else"))
    torch.testing.assert_close(one.visual_embeddings, other.visual_embeddings, rtol=0, atol=1e-6)
    assert (one.embeddings - other.embeddings).norm() > 1e-3


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_llms_that_heed_no_such_mask_are_refused_by_name(family):
    text = tiny_model(family)
    strengthen(text)
    with pytest.raises(ValueError, match=type(text.base_model).__name__):
        NoteLLM2Model.from_vision_text_pretrained(
            make_backbones()[0], text, qformer_config=QFORMER, text_attention="bidirectional"
        )


def test_flash_attention_is_refused():
    model, _ = make_model(text_attention="bidirectional")
    model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="sdpa or eager"):
        model.try_attention()


@pytest.mark.parametrize("settings", [{"readout": "first"}, {"text_attention": "both"}])
def test_unknown_names_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        make_model(**settings)
