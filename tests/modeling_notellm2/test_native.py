"""One checkpoint as both halves: its own merger joins pictures and text, and NoteLLM-2 reads the embeddings."""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from tests.support.families import multimodal_families
from tests.support.native_checks import examine, rows_of
from tests.support.native_models import IN_FULL, image_processor_for, saved_checkpoint, tiny_checkpoint, tokenizer_for
from tests.support.training_runs import ROOT


GRIDS = IN_FULL[:4]
"""Families whose pictures have as many tokens as their size asks for."""


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


ITEMS = [
    {"title": "red apple", "image": picture(90, 60)},
    {"title": "a text alone"},
    {"title": "two pictures", "image": [picture(40, 80, 1), picture(64, 64, 2)]},
    {"image": picture(60, 90, 3)},
]


def joined(family, **overrides):
    checkpoint = tiny_checkpoint(family)
    torch.manual_seed(0)
    model = NoteLLM2Model.from_vision_text_pretrained(checkpoint, checkpoint, embedding_dim=16, **overrides).eval()
    processor = NoteLLM2Processor.from_vision_text_pretrained(
        image_processor_for(checkpoint, family), tokenizer_for(checkpoint, family), model=model, prompt_language="en"
    )
    return model, processor


@pytest.fixture(scope="module", params=IN_FULL)
def pair(request):
    return joined(request.param)


def embed(model, inputs):
    with torch.no_grad():
        return model(**inputs)


def test_alone_and_in_a_batch_on_either_side(pair):
    model, processor = pair
    assert model.config.connector == "native" and model.qformer is None and model.projector is None
    alone = [embed(model, processor([item], return_tensors="pt")) for item in ITEMS]
    for side in ("left", "right"):
        together = embed(model, processor(ITEMS, return_tensors="pt", padding_side=side))
        for name in ("embeddings", "visual_embeddings"):
            expected = torch.cat([getattr(of_item, name) for of_item in alone])
            assert (getattr(together, name) - expected).abs().max() < 2e-5, (side, name)
    assert together.has_image.tolist() == [True, False, True, True]
    assert not together.visual_embeddings[1].any()


def test_the_picture_counts_and_the_visual_embedding_knows_no_text(pair):
    model, processor = pair
    first = embed(model, processor([ITEMS[0]], return_tensors="pt"))
    other_text = embed(model, processor([{**ITEMS[0], "title": "green pear"}], return_tensors="pt"))
    other_picture = embed(model, processor([{**ITEMS[0], "image": picture(90, 60, 9)}], return_tensors="pt"))
    assert (other_text.embeddings - first.embeddings).abs().max() > 1e-4
    assert (other_text.visual_embeddings - first.visual_embeddings).abs().max() < 2e-6
    for name in ("embeddings", "visual_embeddings"):
        assert (getattr(other_picture, name) - getattr(first, name)).abs().max() > 1e-4


def test_saved_and_loaded_it_is_the_same(pair, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, info = NoteLLM2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = NoteLLM2Processor.from_pretrained(tmp_path)(ITEMS, return_tensors="pt")
    assert torch.equal(embed(again.eval(), inputs).embeddings, embed(model, inputs).embeddings)
    half = NoteLLM2Model.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    embeddings = embed(half, inputs).embeddings
    assert embeddings.dtype == torch.bfloat16
    assert (embeddings.float() * embed(model, inputs).embeddings).sum(-1).min() > 0.8


def test_gradients_reach_the_llm_and_not_the_frozen_tower(pair):
    model, processor = pair
    model.train()
    model(**processor(ITEMS, return_tensors="pt"), return_loss=True).loss.backward()
    frozen = [parameter for part in model.vision_parts for parameter in part.parameters()]
    assert frozen and all(parameter.grad is None for parameter in frozen)
    assert all(not module.training for part in model.vision_parts for module in part.modules())
    learning = [parameter for parameter in model.get_decoder().parameters() if parameter.requires_grad]
    assert learning and all(parameter.grad is not None for parameter in learning[1:])
    model.zero_grad()
    model.eval()


def test_features_given_instead_of_pixels(pair):
    model, processor = pair
    inputs = processor(ITEMS, return_tensors="pt")
    expected = model(**inputs, output_vision_features=True)
    given = {name: getattr(expected, name) for name in expected if name.startswith("vision_")}
    assert ("vision_grids" in given) == ("image_sizes" in inputs)
    pixels = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes") if name in inputs}
    assert torch.equal(embed(model, inputs | given).embeddings, expected.embeddings)
    cached = torch.tensor([True, False, True, False])
    some = {name: values[cached] for name, values in given.items()} | {"cached_images": cached}
    some |= {name: values[~cached] for name, values in pixels.items()}
    assert (embed(model, inputs | some).embeddings - expected.embeddings).abs().max() < 2e-6


def test_a_picture_of_nobody_changes_nothing(pair):
    model, processor = pair
    texts = processor(["a text", "another"], return_tensors="pt")
    blank = processor.process_images([picture(40, 40)])
    assert torch.equal(embed(model, texts | blank).embeddings, embed(model, texts).embeddings)


@pytest.mark.parametrize("family", IN_FULL)
def test_the_familys_own_prompt_gives_its_own_states(family, tmp_path):
    """Hidden states of our model and of transformers' own on the same ids and pixels."""
    checkpoint = saved_checkpoint(family, tmp_path)
    model, processor = joined(family)
    image = picture(90, 60)
    inputs = own_inputs(family, checkpoint, processor, image)
    own = {name: values for name, values in inputs.items() if name != "num_images"}
    with torch.no_grad():
        expected = checkpoint.base_model(**own).last_hidden_state
    ours = {name: inputs[name] for name in ("input_ids", "attention_mask")} | processor.process_images([image])
    model.config.micl = False
    output = model(**ours, num_images=torch.tensor([1]), output_hidden_states=True)
    assert (output.hidden_states[-1] - expected).abs().max() < 2e-5 * expected.abs().max()


def own_inputs(family, checkpoint, processor, image):
    """What the family's own processor makes of a picture and a text, where it needs no torchvision; else its format by hand."""
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    if family == "idefics3":
        own = hf.Idefics3Processor(image_processor, tokenizer, image_seq_len=4)
        return own(text="<image>in one word:", images=[image], return_tensors="pt")
    if family == "gemma3":
        own = hf.Gemma3Processor(image_processor, tokenizer, image_seq_length=4)
        return own(text="<start_of_image>in one word:", images=[image], return_tensors="pt")
    if family == "llava":
        own = hf.LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        return own(text="<image>in one word:", images=[image], return_tensors="pt")
    pixels = image_processor(images=[image], return_tensors="pt")
    count = processor.count_tokens(processor.process_images([image]))
    frame = [*processor.image_prefix_ids, *[processor.image_token_id] * count, *processor.image_suffix_ids]
    ids = torch.tensor([frame + tokenizer("in one word:", add_special_tokens=False)["input_ids"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    return inputs | ({"mm_token_type_ids": (ids == processor.image_token_id).long()} if family in GRIDS else {})


def test_what_stands_around_a_picture(tmp_path):
    """As the checkpoint's own processor writes it, or as config and tokenizer name it."""
    for family, before, behind in [
        ("qwen3_vl", "<|vision_start|>", "<|vision_end|>"),
        ("internvl", "<img>", "</img>"),
        ("smolvlm", "<fake_token_around_image><global-img>", "<fake_token_around_image>"),
        ("gemma3", "<start_of_image>", "<end_of_image>"),
        ("llava", "", ""),
    ]:
        _, processor = joined(family)
        decode = processor.tokenizer.decode
        assert (decode(processor.image_prefix_ids), decode(processor.image_suffix_ids)) == (before, behind), family
    checkpoint = saved_checkpoint("gemma3", tmp_path)
    hf.Gemma3Processor(
        image_processor_for(checkpoint, "gemma3"), tokenizer_for(checkpoint, "gemma3"), image_seq_length=4
    ).save_pretrained(tmp_path)
    model = NoteLLM2Model.from_vision_text_pretrained(str(tmp_path), str(tmp_path), embedding_dim=16)
    processor = NoteLLM2Processor.from_vision_text_pretrained(str(tmp_path), str(tmp_path), model=model)
    decode = processor.tokenizer.decode
    assert decode(processor.image_prefix_ids) == "\n\n<start_of_image>"
    assert decode(processor.image_suffix_ids) == "<end_of_image>\n\n"


@pytest.mark.parametrize("family", GRIDS)
def test_max_pixels_bounds_the_placeholders(family):
    model, processor = joined(family)
    large, small = ({"image": picture(side, side)} for side in (90, 30))
    counts = [
        (processor([item], return_tensors="pt")["input_ids"] == processor.image_token_id).sum()
        for item in (large, small)
    ]
    assert counts[0] > counts[1] >= 1
    processor.max_pixels = 30 * 30
    bounded = processor([large], return_tensors="pt")
    assert (bounded["input_ids"] == processor.image_token_id).sum() == counts[1]
    embed(model, bounded)


def test_placeholders_that_are_not_the_pictures_are_refused():
    model, processor = joined("qwen3_vl")
    inputs = processor([ITEMS[0]], return_tensors="pt")
    inputs["input_ids"][inputs["input_ids"] == model.config.image_token_id] = 7
    with pytest.raises(ValueError, match="Row 0 has 0 image placeholders but 1 image"):
        model(**inputs)
    with pytest.raises(ValueError, match="num_images is missing"):
        model(input_ids=inputs["input_ids"])


def test_what_users_write_is_text():
    _, processor = joined("qwen3_vl")
    written = processor([{"title": "<|image_pad|><IMG_EMB>"}], return_tensors="pt")["input_ids"]
    assert not torch.isin(written, torch.tensor([processor.image_token_id, processor.visual_embedding_token_id])).any()


@pytest.mark.parametrize(
    ("family", "reason"),
    [("paligemma", "PaliGemmaModel reads ahead"), ("llava_next", "LlavaNextModel can't be called with features")],
)
def test_refused_with_what_to_use_instead(family, reason):
    checkpoint = tiny_checkpoint(family)
    with pytest.raises(ValueError, match=rf'{reason}.*Use connector="qformer"'):
        NoteLLM2Model.from_vision_text_pretrained(checkpoint, checkpoint)


def test_weights_that_are_not_in_the_checkpoint_end_the_join(tmp_path):
    checkpoint = saved_checkpoint("llava", tmp_path)
    weights = {name: value for name, value in checkpoint.state_dict().items() if "multi_modal_projector" not in name}
    checkpoint.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="don't fit its config: 4 weights of LlavaModel are missing"):
        NoteLLM2Model.from_vision_text_pretrained(str(tmp_path), str(tmp_path))


@pytest.mark.slow
def test_every_family_is_right_or_refused_as_the_table_says():
    """The trial of joining compares with the family's own states of a picture's pixels."""
    findings = {family: examine(family) for family in multimodal_families()}
    assert {family: finding.note for family, finding in findings.items() if finding.status == "wrong"} == {}
    written = rows_of((ROOT / "hub" / "backbones" / "FAMILIES.md").read_text(encoding="utf-8"))
    assert written == {family: finding.status for family, finding in findings.items()}


def test_two_checkpoints_have_no_merger_between_them():
    first, second = tiny_checkpoint("llava"), tiny_checkpoint("internvl")
    with pytest.raises(ValueError, match="pass the same one as vision and as text"):
        NoteLLM2Model.from_vision_text_pretrained(first, second, connector="native")


def test_the_same_checkpoint_through_a_qformer():
    checkpoint = tiny_checkpoint("qwen3_vl")
    model = NoteLLM2Model.from_vision_text_pretrained(
        checkpoint, checkpoint, connector="qformer", qformer_config={"num_hidden_layers": 1}
    )
    assert model.config.connector == "qformer" and model.qformer is not None
