"""Encoders of timm and image processors of torchvision, where these packages are installed."""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.pixels_notellm2 import picture_pixels
from modeling_notellm2.vision_notellm2 import vision_features
from tests.support.models import QFORMER, make_backbones, make_tokenizer


ROUNDING = 2.5 / 255
"""Largest distance of two resamplings of a smooth picture, as a share of the range from black to white."""


def smooth_picture(width=320, height=240):
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("architecture", "tokens"), [("vit_tiny_patch16_224", 197), ("resnet10t", 36), ("swin_tiny_patch4_window7_224", 49)]
)
def test_an_encoder_of_timm(architecture, tokens, tmp_path):
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    settings = {"architecture": architecture, "num_classes": 0}
    config = hf.TimmWrapperConfig.from_dict(
        {**settings, "pretrained_cfg": timm.create_model(architecture).pretrained_cfg}
    )
    hf.AutoModel.from_config(config).save_pretrained(tmp_path / "vision")
    _, text = make_backbones()
    model = NoteLLM2Model.from_vision_text_pretrained(
        str(tmp_path / "vision"), text, qformer_config=QFORMER, num_query_tokens=4, embedding_dim=16
    ).eval()
    processor = NoteLLM2Processor.from_vision_text_pretrained(str(tmp_path / "vision"), make_tokenizer(), model=model)
    items = [{"title": "a", "image": smooth_picture()}, {"title": "b"}, {"image": smooth_picture(200, 320)}]
    inputs = processor(items, return_tensors="pt")
    assert model.get_vision_features(inputs["pixel_values"]).last_hidden_state.shape[:2] == (2, tokens)
    with torch.no_grad():
        embeddings = model(**inputs).embeddings
        alone = torch.cat([model(**processor([item], return_tensors="pt")).embeddings for item in items])
    assert (embeddings - alone).abs().max() < 2e-5
    model.save_pretrained(tmp_path / "joined")
    with torch.no_grad():
        assert torch.equal(NoteLLM2Model.from_pretrained(tmp_path / "joined").eval()(**inputs).embeddings, embeddings)


def test_the_mean_of_an_encoder_of_timm_leaves_registers_out():
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    architecture = "vit_small_patch16_dinov3"
    cfg = timm.create_model(architecture).pretrained_cfg
    config = hf.TimmWrapperConfig.from_dict({"architecture": architecture, "num_classes": 0, "pretrained_cfg": cfg})
    encoder = hf.AutoModel.from_config(config).eval()
    with torch.no_grad():
        features = vision_features(encoder, torch.randn(1, 3, *cfg["input_size"][1:]), summary="mean")
    assert encoder.timm_model.num_prefix_tokens == 5  # a class token and four registers
    assert (features.pooler_output - features.last_hidden_state[:, 5:].mean(1)).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["CLIP", "Siglip", "ViT", "Qwen2VL", "Gemma3", "ConvNext", "Blip"])
def test_torchvision_gives_the_pixels_of_pil(family):
    pytest.importorskip("torchvision")
    by_pil, by_torchvision = (
        picture_pixels(getattr(hf, f"{family}ImageProcessor{backend}")(), smooth_picture()) for backend in ("Pil", "")
    )
    assert by_pil.keys() == by_torchvision.keys()
    expected, given = by_pil["pixel_values"], by_torchvision["pixel_values"]
    assert given.shape == expected.shape
    assert (given - expected).abs().max() < ROUNDING * (expected.max() - expected.min())
