"""An assembled folder is tried before it takes its place; what can't be right never gets there."""

import pytest
import torch
from transformers import CLIPVisionModel, LlamaModel, Qwen2Model

from hub.backbones import assembling
from hub.backbones.assembling import AssembleArguments
from hub.backbones.joining import check_saved
from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from tests.support.families import tiny_model
from tests.support.models import make_backbones, make_image_processor, make_model, make_tokenizer


@pytest.fixture
def halves(tmp_path):
    """Folders of a vision encoder and of an LLM."""
    vision, text = make_backbones()
    vision.save_pretrained(tmp_path / "vision")
    make_image_processor().save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    return tmp_path / "vision", tmp_path / "text"


def arguments(halves, output, **more):
    sizes = {"qformer_layers": 1, "qformer_hidden_size": 32, "qformer_heads": 2, "embedding_dim": 8}
    return AssembleArguments(str(output), text=str(halves[1]), vision=str(halves[0]), **sizes, **more)


def test_a_folder_of_a_model_with_padding_on_one_side(halves, tmp_path):
    tiny_model("rwkv").save_pretrained(tmp_path / "rwkv")
    make_tokenizer().save_pretrained(tmp_path / "rwkv")
    options = arguments((halves[0], tmp_path / "rwkv"), tmp_path / "out")
    model, processor = assembling.assemble(options)
    assembling.save(model, processor, options)
    assert NoteLLM2Model.from_pretrained(tmp_path / "out").config.padding_side == "right"
    assert NoteLLM2Processor.from_pretrained(tmp_path / "out").tokenizer.padding_side == "right"


def test_a_model_that_would_load_otherwise_is_not_kept(halves, tmp_path, monkeypatch):
    options = arguments(halves, tmp_path / "out")
    model, processor = assembling.assemble(options)
    monkeypatch.setattr(type(model.language_model), "_keys_to_ignore_on_save", ["norm.weight"], raising=False)
    model._keys_to_ignore_on_save = {"language_model.norm.weight"}
    with pytest.raises(ValueError, match=r"does not load whole: 1 missing \(language_model.norm.weight\)"):
        assembling.save(model, processor, options)
    assert not (tmp_path / "out").exists()
    options.check = False
    assembling.save(model, processor, options)
    assert (tmp_path / "out").exists()


def test_a_model_that_embeds_otherwise_is_noticed(tmp_path):
    model, processor = make_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    check_saved(tmp_path, model)
    with torch.no_grad():
        model.language_model.norm.weight += torch.linspace(0, 1, 48)
    with pytest.raises(ValueError, match="embeds otherwise than before .*CLIPVisionModel and LlamaModel"):
        check_saved(tmp_path, model)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_a_folder_without_a_tokenizer_is_refused(family, halves, tmp_path):
    """transformers makes up a tokenizer of a few tokens there, whose new tokens would take rows in use."""
    source = tiny_model(family)
    source.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="can't spell a text.*made one up"):
        assembling.assemble(arguments((halves[0], tmp_path / "bare"), tmp_path / "out"))
    model = NoteLLM2Model.from_vision_text_pretrained(
        CLIPVisionModel.from_pretrained(halves[0]), str(tmp_path / "bare")
    )
    assert torch.equal(model.get_input_embeddings().weight, source.get_input_embeddings().weight)
    assert model.config.image_token_id is None


def test_another_llms_tokenizer_is_refused():
    """Its vocabulary is smaller: <IMG> would get the row of a token that the LLM has trained."""
    vision, text = make_backbones(vocab_size=1000)
    text.config.eos_token_id = [2, 3]  # as many chat models have it
    model = NoteLLM2Model.from_vision_text_pretrained(vision, text)
    with pytest.raises(ValueError, match="260 tokens, but the LLM has 1000 rows"):
        NoteLLM2Processor.from_vision_text_pretrained(make_image_processor(), make_tokenizer(), model=model)


def test_a_tokenizer_with_gaps_is_refused():
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    tokenizer.get_vocab = lambda: {**vocabulary, "<IMG>": 7, "<IMG_EMB>": 8}
    with pytest.raises(ValueError, match="ids that other tokens have"):
        NoteLLM2Processor(make_image_processor(), tokenizer)


def test_text_layers_of_a_folder(halves, tmp_path):
    options = arguments(halves, tmp_path / "out", text_layers="1")
    model, processor = assembling.assemble(options)
    assembling.save(model, processor, options)
    assert isinstance(model.language_model, LlamaModel) and not isinstance(model.language_model, Qwen2Model)
    assert NoteLLM2Model.from_pretrained(tmp_path / "out").config.text_config.num_hidden_layers == 1
