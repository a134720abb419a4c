"""Every vision encoder of the installed transformers, joined: right in every check, or refused with a sentence."""

import pytest
import torch
from transformers import AutoModel
from transformers.utils import logging

from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.vision_notellm2 import vision_features
from tests.support.families import strengthen
from tests.support.vision_checks import embed, examine, join, pictures
from tests.support.vision_families import encoder_types, tiny_config, tiny_encoder, tower_types


# What people use, and one of each way in which an encoder takes its pictures or returns its tokens.
USED = [
    "aimv2_vision_model",
    "beit",
    "blip_vision_model",
    "bridgetower_vision_model",
    "clip_vision_model",
    "convnext",
    "cvt",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "efficientnet",
    "gemma4_vision",
    "hgnet_v2",
    "idefics3_vision",
    "ijepa",
    "llama4_vision_model",
    "metaclip_2_vision_model",
    "mllama_vision_model",
    "pixtral",
    "pvt_v2",
    "qwen2_vl_vision",
    "qwen2_5_vl_vision",
    "qwen3_vl_vision",
    "resnet",
    "sam_vision_model",
    "segformer",
    "siglip_vision_model",
    "siglip2_vision_model",
    "smolvlm_vision",
    "swin",
    "vit",
    "vit_mae",
    "yolos",
]


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl_vision", "siglip2_vision_model", "blip_vision_model", "cvt"])
def test_an_encoder_of_each_kind_is_right(model_type, tmp_path):
    finding = examine(model_type, tmp_path)
    assert finding.status == "right", finding.note


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        ("videomae", "VideoMAEModel reads videos of 16 frames, not single pictures"),
        ("xclip_vision_model", "XCLIPVisionModel reads videos of 8 frames, not single pictures"),
        ("minicpmv4_6_vision", "beside its pictures it takes target_sizes"),
        ("molmo2_vision", "does not take pictures (n, c, 64, 64)"),
        ("inkling2_vision", "does not take patches in a form that is known here"),
        ("imagegpt", "it takes input_ids"),
    ],
)
def test_what_an_encoder_takes_instead_is_said(model_type, sentence, tmp_path):
    finding = examine(model_type, tmp_path)
    assert finding.status == "refused"
    assert sentence in finding.note


@pytest.mark.parametrize("channels", [1, 4])
def test_an_encoder_of_other_channels_than_pictures_have_is_refused(channels):
    config = tiny_config("clip_vision_model")
    config.num_channels = channels
    with pytest.raises(ValueError, match=f"CLIPVisionModel reads pictures of {channels} channels"):
        join(tiny_encoder(config))


@pytest.mark.parametrize("composite", ["blip", "owlvit", "qwen2_vl"])
@torch.no_grad()
def test_the_tower_of_a_whole_composite_is_taken_out_and_saved(composite, tmp_path):
    torch.manual_seed(0)
    whole = AutoModel.from_config(tiny_config(composite)).eval()
    strengthen(whole)
    whole.save_pretrained(tmp_path / "whole")
    model = join(str(tmp_path / "whole"))
    (tower,) = [part for part in whole.modules() if type(part) is type(model.vision_model)]
    inputs = pictures(tower)
    features, own = model.get_vision_features(**inputs), vision_features(tower, **inputs)
    torch.testing.assert_close(features.last_hidden_state, own.last_hidden_state)

    expected = embed(model, inputs)
    assert (expected[0] - expected[1]).abs().amax(-1).min() > 1e-3
    model.save_pretrained(tmp_path / "joined")
    loaded, info = NoteLLM2Model.from_pretrained(tmp_path / "joined", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded.vision_model) is type(tower)
    torch.testing.assert_close(embed(loaded.eval(), inputs), expected, atol=2e-5, rtol=0)


def test_a_class_token_that_is_taken_off_is_no_summary():
    """Unlimited-OCR's tower has one, takes it off, and has no patch size of its own to count by."""
    encoder = tiny_encoder(tiny_config("unlimited_ocr_vision"))
    with torch.no_grad():
        features = vision_features(encoder, torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(features.pooler_output, features.last_hidden_state.mean(1))


@pytest.mark.slow
@pytest.mark.timeout(900)  # all families of transformers, one after the other; about 40 seconds of one core
def test_every_family_is_right_or_refused(tmp_path):
    findings = {}
    for number, model_type in enumerate([*encoder_types(), *tower_types()]):
        findings[model_type] = examine(model_type, tmp_path / str(number))
    assert {name: finding.note for name, finding in findings.items() if finding.status == "wrong"} == {}
    assert {name: finding.note for name, finding in findings.items() if finding.status == "untried"} == {}
    assert {name: findings[name] for name in USED if findings[name].status != "right"} == {}
    refused = [finding.note for finding in findings.values() if finding.status == "refused"]
    assert refused
    assert all(len(note) > 30 for note in refused)
