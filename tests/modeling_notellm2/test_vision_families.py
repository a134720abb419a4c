"""Every vision encoder of the installed transformers, joined: right in every check, or refused with a sentence."""

import pytest
from transformers.utils import logging

from tests.support.vision_checks import examine
from tests.support.vision_families import encoder_types, tower_types


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


@pytest.mark.slow
def test_every_family_is_right_or_refused(tmp_path):
    findings = {}
    for number, model_type in enumerate([*encoder_types(), *tower_types()]):
        findings[model_type] = examine(model_type, tmp_path / str(number))
    assert {name: finding.note for name, finding in findings.items() if finding.status == "wrong"} == {}
    assert {name: findings[name] for name in USED if findings[name].status != "right"} == {}
    refused = [finding.note for finding in findings.values() if finding.status == "refused"]
    assert refused
    assert all(len(note) > 30 for note in refused)
