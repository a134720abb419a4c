"""Properties of the model: items don't see each other, padding and order change nothing, saving is exact, misuse is named."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoModel, AutoProcessor

from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.packing_notellm2 import PACKED_SDPA
from tests.support.models import QFORMER, make_backbones, make_image_processor, make_model, make_tokenizer


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8))


ITEMS = [
    {"title": "red panda", "content": "eats bamboo", "image": picture(0)},
    {"title": "text alone"},
    {"image": picture(1)},
    {"title": "three pictures", "topics": ["a", "b"], "image": [picture(2), picture(3), picture(4)]},
    "a string",
    picture(5),
]
VARIANTS = [
    {},
    {"micl": False},
    {"late_fusion": False},
    {"micl": False, "late_fusion": False},
    {"micl": False, "early_fusion": False},
    {"embedding_dim": None},
]


def embed(model, processor, items, **settings):
    with torch.no_grad():
        return model(**processor(items, return_tensors="pt", **settings))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_mixed_batch_equals_its_items_one_by_one(variant):
    model, processor = make_model(**variant)
    together = embed(model, processor, ITEMS)
    assert together.has_image.tolist() == [True, False, True, True, False, True]
    assert (together.visual_embeddings is not None) == model.config.micl
    for row, item in enumerate(ITEMS):
        alone = embed(model, processor, item)
        torch.testing.assert_close(together.embeddings[row], alone.embeddings[0], atol=1e-5, rtol=0)
        if model.config.micl:
            torch.testing.assert_close(together.visual_embeddings[row], alone.visual_embeddings[0], atol=1e-5, rtol=0)
            assert together.visual_embeddings[row].any() == together.has_image[row]
    torch.testing.assert_close(together.embeddings.norm(dim=-1), torch.ones(len(ITEMS)))


def test_padding_and_order_change_nothing():
    model, processor = make_model()
    right = embed(model, processor, ITEMS, padding_side="right")
    left = embed(model, processor, ITEMS, padding_side="left", pad_to_multiple_of=64)
    backwards = embed(model, processor, ITEMS[::-1])
    for name in ("embeddings", "visual_embeddings"):
        torch.testing.assert_close(right[name], left[name], atol=1e-5, rtol=0)
        torch.testing.assert_close(right[name], backwards[name].flip(0), atol=1e-5, rtol=0)


def test_every_image_counts():
    """The picture changes both embeddings, each of several pictures does, and a text-only item passes no gate."""
    model, processor = make_model()
    base = embed(model, processor, ITEMS)
    items = [
        dict(ITEMS[0], image=picture(9)),
        ITEMS[1],
        ITEMS[2],
        dict(ITEMS[3], image=[picture(2), picture(3), picture(9)]),
    ]
    changed = embed(model, processor, items)
    for row in (0, 3):
        assert (base.embeddings[row] - changed.embeddings[row]).norm() > 1e-3
        assert (base.visual_embeddings[row] - changed.visual_embeddings[row]).norm() > 1e-3
    before = embed(model, processor, ["text"]).embeddings
    torch.nn.init.normal_(model.late_fusion.gate.weight)
    torch.testing.assert_close(embed(model, processor, [picture(0), "text"]).embeddings[1:], before, atol=1e-6, rtol=0)


def test_the_visual_embedding_does_not_see_the_text():
    model, processor = make_model()
    output = embed(model, processor, [dict(ITEMS[0], title=title, content=title) for title in ("one", "quite another")])
    torch.testing.assert_close(output.visual_embeddings[0], output.visual_embeddings[1], atol=1e-5, rtol=0)
    assert (output.embeddings[0] - output.embeddings[1]).norm() > 1e-3


def test_computed_vision_features_replace_pixels():
    model, processor = make_model()
    inputs = processor(ITEMS, return_tensors="pt")
    features = model.get_vision_features(inputs["pixel_values"])
    with torch.no_grad():
        output = model(
            **processor(ITEMS, return_tensors="pt", process_images=False),
            vision_hidden_states=features.last_hidden_state,
            vision_pooler_output=features.pooler_output,
        )
    torch.testing.assert_close(output.embeddings, embed(model, processor, ITEMS).embeddings, atol=0, rtol=0)


def test_kept_and_computed_vision_features_mix():
    model, processor = make_model()
    inputs = processor(ITEMS, return_tensors="pt")
    expected = model(**inputs, output_vision_features=True)
    cached = torch.tensor([True, False, False, True, False, True])
    assert len(cached) == len(expected.vision_hidden_states) == len(inputs["pixel_values"])
    mixed = {
        "pixel_values": inputs["pixel_values"][~cached],
        "vision_hidden_states": expected.vision_hidden_states[cached],
        "vision_pooler_output": expected.vision_pooler_output[cached],
        "cached_images": cached,
    }
    torch.testing.assert_close(model(**{**inputs, **mixed}).embeddings, expected.embeddings, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", [{}, {"freeze_vision": False}, {"micl": False, "early_fusion": False}])
def test_an_image_of_nobody_changes_nothing_but_reaches_every_parameter(variant):
    """Where processes wait for each other's gradients, one with texts alone must have all of them too: zeros."""
    model, processor = make_model(**variant)
    model.train()
    torch.manual_seed(0)
    inputs = processor(["a", "b", "c", "d"], return_tensors="pt")
    expected = model.eval()(**inputs)
    spare = {**inputs, "pixel_values": torch.rand(1, 3, 32, 32)}
    output = model(**spare, return_loss=True)
    torch.testing.assert_close(output.embeddings, expected.embeddings)
    assert not output.has_image.any()
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    # CLIP's last norm belongs to its pooled output, which is not read.
    missing = {name for name, gradient in gradients.items() if gradient is None and "post_layernorm" not in name}
    assert not missing
    assert gradients["language_model.norm.weight"].any()
    assert not any(g.any() for name, g in gradients.items() if g is not None and ("vision" in name or "late" in name))
    with pytest.raises(ValueError, match="ask for 0 image.* but 2 came"):
        model(**{**inputs, "pixel_values": torch.rand(2, 3, 32, 32)})


def test_every_parameter_has_a_dimension_and_older_checkpoints_load(tmp_path):
    """What spreads weights over processes can't cut scalars; the logit scale was one."""
    model, _ = make_model(logit_scale_init=2.5)
    assert all(parameter.dim() >= 1 for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["logit_scale"].shape == (1,)
    weights["logit_scale"] = torch.tensor(1.5)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = NoteLLM2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.logit_scale.tolist() == [1.5]
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")["logit_scale"].shape == (1,)
    model.load_state_dict(weights)
    assert model.logit_scale.tolist() == [1.5]


def test_loss_over_pairs_with_missing_images():
    """The visual loss is over the pairs whose both members have an image; with none of them it is zero, not NaN."""
    model, processor = make_model()
    first, second = [ITEMS[0], ITEMS[2], ITEMS[1]], [ITEMS[3], ITEMS[5], ITEMS[0]]
    output = model(**processor(first + second, return_tensors="pt"), return_loss=True)
    complete = model(**processor(first[:2] + second[:2], return_tensors="pt"), return_loss=True)
    torch.testing.assert_close(output.visual_loss, complete.visual_loss, atol=1e-5, rtol=0)
    assert (output.multimodal_loss - complete.multimodal_loss).abs() > 1e-3
    output = model(**processor(["a", "b", "c", "d"], return_tensors="pt"), return_loss=True)
    assert output.visual_loss == 0
    assert output.loss.isfinite()
    output.loss.backward()
    with pytest.raises(ValueError, match="even number"):
        model(**processor(["a", "b", "c"], return_tensors="pt"), return_loss=True)


def test_frozen_vision_stays_as_it_is(tiny_model_folder):
    model, processor = make_model()
    model.train()
    assert not model.vision_model.training
    assert model.qformer.training
    model(**processor(ITEMS, return_tensors="pt"), return_loss=True).loss.backward()
    assert all(parameter.grad is None for parameter in model.vision_model.parameters())
    used = {"query_tokens", "qformer", "projector", "late_fusion", "reduction", "logit_scale", "language_model"}
    assert {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None} == used
    loaded = AutoModel.from_pretrained(tiny_model_folder)
    assert not any(parameter.requires_grad for parameter in loaded.vision_model.parameters())
    thawed, processor = make_model(freeze_vision=False)
    thawed.train()(**processor(ITEMS, return_tensors="pt"), return_loss=True).loss.backward()
    assert thawed.vision_model.training
    assert thawed.vision_model.embeddings.patch_embedding.weight.grad is not None


def test_misuse_names_the_row():
    model, processor = make_model()
    inputs = processor(ITEMS, return_tensors="pt")
    ids = inputs["input_ids"].clone()
    ids[3][(ids[3] == processor.image_token_id).nonzero()[0]] = 5
    with pytest.raises(ValueError, match="Row 3 has 11 image placeholders but 3 image"):
        model(**{**inputs, "input_ids": ids})
    ids = inputs["input_ids"].clone()
    ids[0][ids[0] == processor.visual_embedding_token_id] = 5
    with pytest.raises(ValueError, match="Row 0 has 0 <IMG_EMB>"):
        model(**{**inputs, "input_ids": ids})
    with pytest.raises(ValueError, match="ask for 6 image.* but 5 came.*is 5"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:-1]})
    with pytest.raises(ValueError, match="Row 0 has 4 image placeholders"):
        basic = NoteLLM2Processor(make_image_processor(), make_tokenizer(), num_query_tokens=4, micl=False)
        model(**{**basic(ITEMS[0], return_tensors="pt"), "num_images": torch.tensor([2])})
    with pytest.raises(ValueError, match="Row 0 has 0 <IMG_EMB> token"):
        model(**basic(ITEMS[0], return_tensors="pt"))
    with pytest.raises(ValueError, match="prepare_model"):
        vision, text = make_backbones()
        NoteLLM2Model.from_vision_text_pretrained(vision, text, qformer_config=QFORMER)(**inputs)


def test_contradicting_settings_are_refused():
    for settings, reason in (
        ({"early_fusion": False}, "micl=False"),
        ({"early_fusion": False, "micl": False, "late_fusion": False}, "image out altogether"),
        ({"num_query_tokens": 0}, "at least 1"),
        ({"visual_loss_weight": 0, "multimodal_loss_weight": 0}, "nothing would be trained"),
    ):
        with pytest.raises(ValueError, match=reason):
            NoteLLM2Config(**settings)
    with pytest.raises(ValueError, match="Unknown NoteLLM2Config fields: embeding_dim"):
        NoteLLM2Model.from_vision_text_pretrained(*make_backbones(), embeding_dim=3)


def test_assembly_keeps_pretrained_weights_and_means_new_rows():
    vision, text = make_backbones()
    kept = {name: value.clone() for name, value in text.state_dict().items()}
    seen = {name: value.clone() for name, value in vision.state_dict().items()}
    model = NoteLLM2Model.from_vision_text_pretrained(vision, text, qformer_config=QFORMER)
    processor = NoteLLM2Processor.from_vision_text_pretrained(make_image_processor(), make_tokenizer(), model=model)
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == model.config.text_config.vocab_size == len(processor.tokenizer) == 262
    mean = kept["embed_tokens.weight"].mean(0)
    for token in (processor.image_token_id, processor.visual_embedding_token_id):
        torch.testing.assert_close(rows[token], mean, atol=1e-6, rtol=0)
    rows = rows[:260]
    for name, value in kept.items():
        assert torch.equal(rows if name == "embed_tokens.weight" else model.language_model.state_dict()[name], value)
    assert all(torch.equal(model.vision_model.state_dict()[name], value) for name, value in seen.items())
    assert not model.query_tokens.any()
    assert model.logit_scale == 3
    drawn = NoteLLM2Model.from_vision_text_pretrained(
        *make_backbones(), qformer_config=QFORMER, query_tokens_std=0.02, num_query_tokens=64
    )
    assert drawn.query_tokens.std().item() == pytest.approx(0.02, rel=0.2)
    # Vocabularies padded beyond their tokenizer: spare rows are used, the matrix keeps its size.
    padded = NoteLLM2Model.from_vision_text_pretrained(*make_backbones(vocab_size=300), qformer_config=QFORMER)
    NoteLLM2Processor.from_vision_text_pretrained(make_image_processor(), make_tokenizer(), model=padded)
    assert padded.get_input_embeddings().weight.shape[0] == 300


def test_reserved_tokens_are_reused_and_stay_out_of_users_reach():
    """A vocabulary with reserved tokens lends two: nothing grows, and their names in a text are plain characters."""
    tokenizer = make_tokenizer()
    names = [f"<|reserved_special_token_{number}|>" for number in range(3)]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    model = NoteLLM2Model.from_vision_text_pretrained(*make_backbones(vocab_size=263), qformer_config=QFORMER)
    trained = model.get_input_embeddings().weight.detach().clone()
    processor = NoteLLM2Processor.from_vision_text_pretrained(make_image_processor(), tokenizer, model=model)
    assert (processor.image_token_id, processor.visual_embedding_token_id) == (261, 262)
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[:261], trained[:261])
    torch.testing.assert_close(rows[262], trained[:261].mean(0), atol=1e-6, rtol=0)
    assert not {261, 262} & set(processor({"title": names[1], "content": "".join(names)})["input_ids"][0])


def test_save_and_load_is_exact(tmp_path):
    model, processor = make_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded, reloaded = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert torch.equal(embed(model, processor, ITEMS).embeddings, embed(loaded, reloaded, ITEMS).embeddings)
    reloaded.prepare_model(loaded)  # a trained model is left as it is
    assert torch.equal(embed(model, processor, ITEMS).embeddings, embed(loaded, reloaded, ITEMS).embeddings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(tiny_model_folder, dtype):
    processor = AutoProcessor.from_pretrained(tiny_model_folder)
    full = embed(AutoModel.from_pretrained(tiny_model_folder).eval(), processor, ITEMS)
    model = AutoModel.from_pretrained(tiny_model_folder, dtype=dtype).eval()
    half = embed(model, processor, ITEMS)
    assert half.embeddings.dtype == model.dtype == dtype
    assert torch.cosine_similarity(full.embeddings, half.embeddings.float()).min() > 0.99


def test_attention_implementations_agree(tiny_model_folder):
    processor = AutoProcessor.from_pretrained(tiny_model_folder)
    outputs = {}
    for name in ("eager", "sdpa"):
        model = AutoModel.from_pretrained(tiny_model_folder, attn_implementation=name).eval()
        of_llm = PACKED_SDPA if name == "sdpa" else name  # SDPA without padding
        assert model.language_model.config._attn_implementation == of_llm
        outputs[name] = embed(model, processor, ITEMS).embeddings
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], atol=1e-5, rtol=0)
    eager = AutoModel.from_pretrained(tiny_model_folder, attn_implementation="eager").eval()
    inputs = processor(ITEMS, return_tensors="pt")
    output = eager(**inputs, output_attentions=True, output_hidden_states=True)
    n, length = inputs["input_ids"].shape
    assert [a.shape for a in output.attentions] == [(n, 4, length, length)] * 2
    assert [h.shape for h in output.hidden_states] == [(n, length, 48)] * 3
    assert isinstance(eager(**inputs, return_dict=False), tuple)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, processor = make_model(
        qformer_config={**QFORMER, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    )
    inputs = processor(ITEMS, return_tensors="pt")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model.train().zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_meta_init_device_map_and_token_resize(tiny_model_folder):
    config = NoteLLM2Config.from_pretrained(tiny_model_folder)
    with torch.device("meta"):
        model = NoteLLM2Model(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    processor = AutoProcessor.from_pretrained(tiny_model_folder)
    plain = AutoModel.from_pretrained(tiny_model_folder).eval()
    placed = AutoModel.from_pretrained(tiny_model_folder, device_map="auto").eval()
    expected = embed(plain, processor, ITEMS).embeddings
    assert torch.equal(embed(placed, processor, ITEMS).embeddings, expected)
    plain.resize_token_embeddings(300)
    assert plain.config.text_config.vocab_size == 300
    torch.testing.assert_close(embed(plain, processor, ITEMS).embeddings, expected)


def test_query_tokens_of_zeros_drown_all_other_gradients():
    """A LayerNorm of zeros divides by its epsilon's root; a clipped step is then nearly theirs alone."""
    norms = {}
    for std in (0.0, 0.02):
        model, processor = make_model()
        torch.nn.init.normal_(model.query_tokens, std=std)
        items = [{"title": colour, "image": Image.new("RGB", (8, 8), colour)} for colour in ("red", "blue")]
        model(**processor(items * 2, return_tensors="pt"), return_loss=True).loss.backward()
        norms[std] = model.query_tokens.grad.norm() / model.reduction.weight.grad.norm()
    assert norms[0.0] > 1e6
    assert norms[0.02] < 1e4
