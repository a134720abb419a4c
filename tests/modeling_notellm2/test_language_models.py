"""LLMs of every kind: tried when joined, called as their family calls them, and refused where they can't be right."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.backbones_notellm2 import load_language_model
from modeling_notellm2.language_notellm2 import UnusableModelError, try_language_model
from tests.support.families import causal_families, multimodal_families, shrunk, strengthen, tiny_model
from tests.support.family_checks import Finding, examine, join, rows_of
from tests.support.models import make_backbones, make_image_processor, make_tokenizer


FAMILIES = [*causal_families(), *multimodal_families()]
TABLE = (Path(__file__).parents[2] / "hub/backbones/FAMILIES.md").read_text(encoding="utf-8")


# One of each kind that went wrong once, with how it is called now.
KINDS = {
    "gemma3n_text": "called with its token ids beside the embeddings",  # per-layer embeddings
    "gemma4_text": "called with its token ids beside the embeddings",  # would search the ids of ready embeddings
    "opt": "built as OPTDecoder",  # AutoModel builds another class around it
    "bart": "padded on the right only, built as BartDecoder",
    "rwkv": "padded on the right only",  # ignores the mask
    "recurrent_gemma": "padded on the right only",
    "falcon_h1": "",  # a buffer that no checkpoint holds
    "deepseek_v3": "",  # keeps `gate.weight` in float32
    "gpt_oss": "",  # keeps norms in float32
    "mamba2": "",  # its states are in float32
    "llama4": "",  # its get_decoder has a head
    "gpt_neox": "",  # is_decoder is False in its config
    "qwen2_vl": "",  # M-RoPE
    "mllama": "built as MllamaTextModel",  # no Auto class knows its text part
}


@pytest.mark.parametrize("family", KINDS)
def test_kinds(family, tmp_path):
    assert examine(family, tmp_path) == Finding("right", KINDS[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in KINDS])
def test_every_family_is_right_or_refused_with_a_sentence(family, tmp_path):
    finding = examine(family, tmp_path)
    if finding.status == "untried":
        pytest.skip(finding.note)
    assert finding.status in ("right", "refused"), finding.note
    if f"transformers {hf.__version__} " in TABLE and rows_of(TABLE)[family] != "untried":
        assert finding.status == rows_of(TABLE)[family], finding.note
    if finding.status == "refused":
        assert " is expected (" in finding.note or "as `text`" in finding.note


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("llama", {"is_causal": False}),
        ("xlnet", {}),
        ("xlm", {}),
    ],
)
def test_models_that_read_ahead_are_refused(family, field):
    config = shrunk(hf.CONFIG_MAPPING[family], **field)
    model = hf.AutoModel.from_config(config)
    strengthen(model)
    with pytest.raises(UnusableModelError, match="reads ahead.* A decoder-only language model is expected"):
        join(model)


def test_a_model_padded_on_one_side_refuses_the_other(tmp_path):
    model = join(load_language_model(_saved("rwkv", tmp_path)))
    processor = NoteLLM2Processor.from_vision_text_pretrained(make_image_processor(), make_tokenizer(), model=model)
    processor.save_pretrained(tmp_path / "processor")
    again = NoteLLM2Processor.from_pretrained(tmp_path / "processor")
    assert again(["a", "longer"], return_tensors="pt")["attention_mask"][:, 0].all()
    with pytest.raises(ValueError, match="Row 0 is padded on the other side than the right"):
        model(**again(["a", "longer"], return_tensors="pt", padding_side="left"))


@pytest.mark.parametrize(
    ("family", "most", "rope"),
    [
        ("llama", 32, {"rope_type": "dynamic", "factor": 2.0}),
        ("phi3", 64, {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}),
    ],
)
def test_positions_that_follow_the_longest_row_end_where_they_would_change(family, most, rope):
    """Beyond that length a short text's embedding in a batch differed from that alone by 0.04 to 0.7."""
    length = {"original_max_position_embeddings": 32} if most > 32 else {}
    rope = {**rope, **length, "rope_theta": 1e4}
    config = shrunk(hf.CONFIG_MAPPING[family], max_position_embeddings=most, rope_parameters=rope, **length)
    text = hf.AutoModel.from_config(config).eval()
    strengthen(text)
    model = join(text)
    processor = NoteLLM2Processor.from_vision_text_pretrained(make_image_processor(), make_tokenizer(), model=model)
    short, longer = processor(text="a", return_tensors="pt"), processor(text=["a", "b" * 32], return_tensors="pt")
    assert (model(**short).embeddings - model(**longer).embeddings[:1]).abs().max() < 5e-5
    with pytest.raises(ValueError, match="Row 1 has 33 tokens; beyond 32 this LLM scales the positions"):
        model(**processor(text=["a", "b" * 33], return_tensors="pt"))


def test_widths_come_from_the_model(tmp_path):
    """OPT-350m's states are narrower than its hidden_size."""
    config = shrunk(hf.OPTConfig, word_embed_proj_dim=32)
    hf.OPTForCausalLM(config).save_pretrained(tmp_path)
    model = join(str(tmp_path))
    assert (config.hidden_size, model.config.text_width) == (64, 32)
    assert model.projector.linear_2.out_features == model.reduction.in_features == 32


def test_weights_that_are_not_in_the_checkpoint_end_the_join(tmp_path):
    model = tiny_model("llama")
    weights = {name: value for name, value in model.state_dict().items() if "layers.2.mlp" not in name}
    model.save_pretrained(tmp_path / "missing", state_dict=weights)
    with pytest.raises(ValueError, match="don't fit its config: 3 weights of LlamaModel are missing .*layers.2.mlp"):
        join(str(tmp_path / "missing"))
    biased = hf.LlamaForCausalLM(shrunk(hf.LlamaConfig, attention_bias=True))
    biased.save_pretrained(tmp_path / "surplus")
    model.config.save_pretrained(tmp_path / "surplus")
    with pytest.raises(ValueError, match="LlamaModel has no place for 16 weights .*self_attn.k_proj.bias"):
        join(str(tmp_path / "surplus"))


def test_the_trial_can_be_left_out(monkeypatch):
    vision, text = make_backbones()
    text.config.is_causal = False
    for layer in text.layers:
        layer.self_attn.is_causal = False
    assert NoteLLM2Model.from_vision_text_pretrained(vision, text, check=False).config.text_inputs == "embeds"


def test_the_trial_leaves_the_model_as_it_was():
    _, text = make_backbones()
    text.train()
    before = {name: value.clone() for name, value in text.state_dict().items()}
    state = torch.random.get_rng_state()
    assert try_language_model(text).padding_side is None
    assert text.training and not text.embed_tokens._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in text.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def _saved(family, folder) -> str:
    tiny_model(family).save_pretrained(folder / "text")
    return str(folder / "text")
