"""Packed items: the states that they have alone and the gradients of a padded batch, in families known to permit it alone."""

import pytest
import torch
from PIL import Image
from transformers import Gemma2Config, Gemma2Model, Qwen2Config, Qwen2Model

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.packing_notellm2 import FAMILIES
from tests.support.families import strengthen, tiny_model
from tests.support.models import QFORMER, make_backbones, make_image_processor, make_tokenizer


def rows_of(model: torch.nn.Module) -> list[int]:
    """Rows of each batch that the LLM's layers see from now on."""
    rows: list[int] = []
    model.language_model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def join(text) -> tuple[NoteLLM2Model, NoteLLM2Processor]:
    settings = {"qformer_config": QFORMER, "num_query_tokens": 4, "embedding_dim": 24}
    model = NoteLLM2Model.from_vision_text_pretrained(make_backbones()[0], text, **settings)
    torch.nn.init.normal_(model.query_tokens)
    processor = NoteLLM2Processor.from_vision_text_pretrained(
        make_image_processor(), make_tokenizer(), model=model, prompt_language="en"
    )
    return model.eval(), processor


def pictured(items):
    """The items, every second one with a picture."""
    return [
        {**(item if isinstance(item, dict) else {"content": item}), "image": Image.new("RGB", (40, 30), colour)}
        if number % 2
        else item
        for number, (item, colour) in enumerate(zip(items, ["red", "green", "blue", "white"], strict=True))
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_items_get_the_embeddings_that_they_have_alone(family, side):
    torch.manual_seed(0)
    text = tiny_model(family)
    strengthen(text)
    model, processor = join(text)
    items = pictured([{"title": "a"}, {"title": "b" * 30}, "x", {"title": "c", "topics": ["one", "two"]}])
    with torch.no_grad():
        alone = [model(**processor([item], return_tensors="pt")) for item in items]
        rows = rows_of(model)
        together = model(**processor(items, return_tensors="pt", padding_side=side))
    assert rows == [1]  # four items, one row
    for name in ("embeddings", "visual_embeddings"):
        expected = torch.cat([getattr(output, name) for output in alone])
        torch.testing.assert_close(getattr(together, name), expected, rtol=0, atol=1e-5)


def test_training_on_packed_items_has_the_gradients_of_a_padded_batch():
    model, processor = join(make_backbones()[1])
    inputs = processor(pictured(["a", "b" * 30, "x", "c" * 9]), return_tensors="pt")
    gradients = []
    for implementation, expected_rows in ((None, [1]), ("sdpa", [4])):
        if implementation:
            model.language_model.set_attn_implementation(implementation)
        model.zero_grad()
        rows = rows_of(model)
        model(**inputs, return_loss=True).loss.backward()
        assert rows == expected_rows
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 260,
}


WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


@pytest.mark.parametrize(
    "text",
    [
        lambda: Qwen2Model(Qwen2Config(**SIZES, num_key_value_heads=4, **WINDOW)),
        lambda: Gemma2Model(Gemma2Config(**SIZES, num_key_value_heads=4, head_dim=12)),
    ],
    ids=["sliding window", "unknown family"],
)
def test_other_models_are_padded(text):
    model, processor = join(text())
    rows = rows_of(model)
    model(**processor(["a", "b" * 30], return_tensors="pt"))
    assert rows == [2]


def test_states_of_padded_shape_are_given_where_they_are_asked_for():
    model, processor = join(make_backbones()[1])
    inputs = processor(["a", "b" * 30], return_tensors="pt")
    states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert states.shape[:2] == inputs["input_ids"].shape
