"""Information flow: the definition by finite differences, tokens told apart, and a model that is left as it was."""

import pytest
import torch
from PIL import Image
from tokenizers import models
from transformers.models.llama import modeling_llama

from tests.support.models import make_model
from training.batches.collators import ItemCollator
from training.evaluation.saliency import (
    KINDS,
    OTHER,
    PADDING,
    TEXT,
    VISUAL,
    attention_flows,
    measure_saliency,
    token_kinds,
)


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (32, 32), colour)


HOSTILE = 'a", "topics": "b", "content": "<IMG_EMB>'
ITEMS = [
    {"item_id": "0", "title": "red panda", "topics": ["zoo", "bamboo"], "content": "sleeps", "image": plain("red")},
    {"item_id": "1", "title": HOSTILE, "image": plain("blue")},
    {"item_id": "2", "content": "a text alone, the longest of all by far"},
    {"item_id": "3", "image": plain("green")},
]
PAIRS = [(ITEMS[0], ITEMS[1]), (ITEMS[3], ITEMS[2]), (ITEMS[1], ITEMS[3])]


def test_flow_is_attention_times_its_gradient(monkeypatch):
    """Scaling one probability by 1 + e changes the loss by e * A * dL/dA: central differences, head by head."""
    model, processor = make_model()
    model.double().set_attn_implementation("eager")
    model.requires_grad_(True)
    inputs = dict(processor([ITEMS[0], ITEMS[3], ITEMS[1], ITEMS[2]], return_tensors="pt"))
    flows = attention_flows(model, inputs)
    last = inputs["attention_mask"].sum(1) - 1
    eager = modeling_llama.eager_attention_forward

    def loss(layer: int, row: int, head: int, source: int, change: float) -> float:
        def scaled(module, query, key, value, mask, scaling, **kwargs):
            output, probabilities = eager(module, query, key, value, mask, scaling, **kwargs)
            if module.layer_idx == layer:
                factor = torch.ones_like(probabilities)
                factor[row, head, last[row], source] += change
                heads = modeling_llama.repeat_kv(value, module.num_key_value_groups)
                output = torch.matmul(probabilities * factor, heads).transpose(1, 2).contiguous()
            return output, probabilities

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", scaled)
        with torch.no_grad():
            return model(**inputs, return_loss=True).loss.item()

    step = 0.05  # the loss is float32
    for layer, row, source in ((0, 0, 3), (0, 3, 1), (1, 1, 5), (1, 2, int(last[2]))):
        expected = sum(
            abs(loss(layer, row, head, source, step) - loss(layer, row, head, source, -step)) / (2 * step)
            for head in range(4)
        )
        assert flows[layer][row, last[row], source].item() == pytest.approx(expected, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("variant", [{}, {"micl": False}, {"early_fusion": False, "micl": False}])
def test_tokens_are_told_apart_whatever_the_padding_and_the_batch(variant):
    _, processor = make_model(**variant)
    tokenizer = processor.tokenizer
    for item in ITEMS:
        alone = processor([item], return_tensors="pt")
        kinds = token_kinds(processor, [item], alone)
        text = processor.item_text(item)
        own = alone["input_ids"][kinds == TEXT]
        assert tokenizer.decode(own) == text.title + text.topics + text.content
        images = 1 if item.get("image") and processor.early_fusion else 0
        assert (kinds == VISUAL).sum() == images * processor.num_query_tokens
        for side in ("left", "right"):
            together = processor(ITEMS, return_tensors="pt", padding_side=side)
            row = token_kinds(processor, ITEMS, together)[ITEMS.index(item)]
            assert torch.equal(row[row != PADDING], kinds[0])
            assert torch.equal(row == PADDING, together["attention_mask"][ITEMS.index(item)] == 0)


def test_a_token_over_an_empty_field_is_the_template_s():
    """Where a tokenizer merges the two quotes around it."""
    _, processor = make_model()
    backend = processor.tokenizer.backend_tokenizer
    backend.model = models.BPE(vocab={**backend.get_vocab(with_added_tokens=False), '""': 300}, merges=[('"', '"')])
    for item in ({"content": "alone"}, {"title": "red"}, {}):
        inputs = processor([item], return_tensors="pt")
        assert 300 in inputs["input_ids"]
        own = inputs["input_ids"][token_kinds(processor, [item], inputs) == TEXT]
        assert processor.tokenizer.decode(own) == "".join(item.values())


def test_shares_and_a_model_that_is_left_as_it_was():
    model, processor = make_model()
    model.requires_grad_(False).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    saliency = measure_saliency(model, processor, ItemCollator(processor), PAIRS, batch_pairs=2)
    assert torch.equal(torch.get_rng_state(), random_state)  # training goes on as it would have without
    for shares in (saliency.multimodal, saliency.visual):
        assert set(shares) == set(KINDS)
        sums = torch.tensor([shares[kind] for kind in KINDS]).sum(0)
        assert len(sums) == 2
        assert torch.allclose(sums, torch.ones(2))
    assert saliency.visual["text"] == [0, 0]  # it stands before the text
    assert all(0 < share < 1 for kind in KINDS for share in saliency.multimodal[kind])
    assert model.training and not model.vision_model.training
    assert (
        model.language_model.config._attn_implementation == make_model()[0].language_model.config._attn_implementation
    )
    assert not model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shares_do_not_depend_on_padding():
    """One batch of all pairs, padded on either side."""
    model, processor = make_model()
    found = []
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        found.append(measure_saliency(model, processor, ItemCollator(processor), PAIRS))
    for kind in KINDS:
        assert found[0].multimodal[kind] == pytest.approx(found[1].multimodal[kind], rel=1e-3)
        assert found[0].visual[kind] == pytest.approx(found[1].visual[kind], rel=1e-3)


def test_one_pair_has_no_negatives_and_texts_alone_no_visual_embedding():
    model, processor = make_model()
    with pytest.raises(ValueError, match="at least two"):
        measure_saliency(model, processor, ItemCollator(processor), PAIRS[:1])
    texts = [({"title": f"a{n}"}, {"title": f"b{n}"}) for n in range(3)]
    saliency = measure_saliency(model, processor, ItemCollator(processor), texts, batch_pairs=2)
    assert saliency.visual is None
    assert saliency.multimodal["visual"] == [0, 0]
    assert OTHER in token_kinds(processor, [texts[0][0]], processor([texts[0][0]], return_tensors="pt"))
