"""The cost model counts what the model does, and the documented tables are what it prints."""

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel

from modeling_notellm2 import NoteLLM2Model
from tests.benchmarks.cost_model import LLMS, costs, count, tables


TEXT = Qwen3Config(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
VISION = SiglipVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)


def test_operations_and_weights_are_those_of_a_whole_model():
    """With all but late fusion and reduction, whose parts of a model of usual size are below a thousandth."""
    model = NoteLLM2Model.from_vision_text_pretrained(
        SiglipVisionModel(VISION),
        Qwen3Model(TEXT),
        check=False,
        image_token_id=298,
        visual_embedding_token_id=299,
        late_fusion=False,
        micl=False,
        embedding_dim=None,
    )
    model.set_attn_implementation("eager")  # the counter doesn't know torch's fused attention on CPUs
    model.eval().requires_grad_(False)
    input_ids = torch.tensor([[1] * 10 + [298] * 16 + [2] * 10])
    cost = costs(TEXT, VISION, text_tokens=20)
    assert cost.tokens == 36
    with torch.no_grad():
        assert count(lambda: model(input_ids, pixel_values=torch.randn(1, 3, 32, 32))) == cost.forward
    own = model.query_tokens.numel() + model.logit_scale.numel()
    assert sum(weight.numel() for weight in model.parameters()) == cost.weights + own
    features = model.get_vision_features(torch.randn(1, 3, 32, 32))
    assert 2 * (features.last_hidden_state.numel() + features.pooler_output.numel()) == cost.stored


def test_a_step_is_three_forward_passes_of_what_is_trained():
    """Counted on a CPU, forward and backward; LoRA's frozen weights need no gradients of their own."""
    llm = Qwen3Model(TEXT)
    llm.set_attn_implementation("eager")
    for trained, passes in ((True, 3), (False, 2)):
        llm.requires_grad_(trained)
        embedded = torch.randn(1, 36, 64, requires_grad=True)
        forward = count(lambda embedded=embedded: llm(inputs_embeds=embedded, use_cache=False))
        both = count(lambda embedded=embedded: llm(inputs_embeds=embedded).last_hidden_state.sum().backward())
        assert (
            abs(both / forward - passes) < 0.15
        )  # attention itself, of 36 tokens, is a larger part than in a real LLM


def test_the_documented_tables_are_those_that_are_printed():
    readme = (Path(__file__).parents[1] / "training" / "README.md").read_text(encoding="utf-8")
    assert all(line in readme for line in tables().splitlines())
    sizes = {name: costs(config).weights / 1e9 for name, config in LLMS.items()}
    assert sizes["Qwen3-0.6B"] < 1.2 < sizes["Qwen3-4B"] < 5 < sizes["Qwen3-8B"] < 9
