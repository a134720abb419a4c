"""The model computes what the research code computes: every tensor of tests/reference/official, and every prompt."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel

from hub.backbones.research import convert_name
from modeling_notellm2 import NoteLLM2Processor
from modeling_notellm2.prompts_notellm2 import WORDINGS, FieldLimits, build_pieces, item_text, join_pieces


REFERENCE = Path(__file__).parents[1] / "reference"
ROOT = Path(__file__).parents[2]
VARIANTS = ["basic", "micl", "late_early", "late_only", "full", "full_zeroq"]


def expand_placeholders(inputs: dict, image_token_id: int, num_query_tokens: int) -> dict:
    """The research ids hold one placeholder for each image; ours hold `num_query_tokens`."""
    ids, masks = [], []
    for row, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        times = [num_query_tokens if token == image_token_id else 1 for token in row]
        ids.append([token for token, n in zip(row, times, strict=True) for _ in range(n)])
        masks.append([kept for kept, n in zip(mask, times, strict=True) for _ in range(n)])
    return {**inputs, "input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory):
    """A variant converted by the command a user types, loaded with AutoModel, with its inputs and expected outputs."""
    source = REFERENCE / "official" / request.param
    folder = tmp_path_factory.mktemp("converted") / request.param
    command = [sys.executable, "hub/convert_official.py", "--weights", source / "weights.safetensors"]
    command += ["--config", source / "config.json", "--output", folder]
    subprocess.run(command, check=True, cwd=ROOT)
    config = json.loads((source / "config.json").read_text())
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = load_file(source / "inputs.safetensors")
    if config["early_fusion"]:
        inputs = expand_placeholders(inputs, config["image_token_id"], config["num_query_tokens"])
    return model, inputs, load_file(source / "outputs.safetensors")


def test_embeddings_tokens_and_losses(case):
    model, inputs, expected = case
    with torch.no_grad():
        features = model.get_vision_features(inputs["pixel_values"])
        output = model(**inputs, return_loss=True)
    torch.testing.assert_close(features.last_hidden_state, expected["vision_features"], atol=1e-5, rtol=0)
    assert ("visual_tokens" in expected) == model.config.early_fusion
    if model.config.early_fusion:
        tokens = model.get_visual_tokens(features.last_hidden_state)
        torch.testing.assert_close(tokens, expected["visual_tokens"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.embeddings, F.normalize(expected["embeddings"], dim=-1), atol=1e-5, rtol=0)
    assert ("visual_embeddings" in expected) == model.config.micl
    if model.config.micl:
        visual = F.normalize(expected["visual_embeddings"], dim=-1)
        torch.testing.assert_close(output.visual_embeddings, visual, atol=1e-5, rtol=0)
    for name in ("loss", "multimodal_loss", "visual_loss"):
        if name in expected:
            torch.testing.assert_close(output[name], expected[name].squeeze(), atol=0, rtol=1e-5)


def test_gradients(case):
    model, inputs, expected = case
    model.zero_grad()
    model(**inputs, return_loss=True).loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {name.removeprefix("grad."): value for name, value in expected.items() if name.startswith("grad.")}
    assert gradients
    for name, value in gradients.items():
        ours = parameters[convert_name(name)].grad
        # Relative to the tensor's size: single entries near zero carry rounding only.
        error = (ours.reshape(value.shape) - value).norm()
        assert error <= 1e-4 * value.norm() + 1e-9, f"{name}: {error:.1e} off, of {value.norm():.1e}"
    assert all(parameter.grad is None for parameter in model.vision_model.parameters())


@pytest.mark.parametrize("mode", ["micl", "basic", "text", "late_only"])
def test_prompts_of_every_row(mode):
    reference = json.loads((REFERENCE / "prompts.json").read_text(encoding="utf-8"))
    images = 0 if mode == "text" else 1
    for row, prompt in zip(reference["rows"], reference["prompts"][mode], strict=True):
        text = item_text(row, WORDINGS["zh"], FieldLimits(), cut=lambda text, most: text)
        pieces = build_pieces(text, images, "basic" if mode == "text" else mode, WORDINGS["zh"])
        assert join_pieces(pieces) == prompt + reference["suffix"], row["item_id"]


def test_prompts_of_images_alone(tiny_processor: NoteLLM2Processor):
    """The research code doubles the braces in training by a slip and not at inference; we write single ones."""
    reference = json.loads((REFERENCE / "prompts.json").read_text(encoding="utf-8"))
    processor = NoteLLM2Processor(tiny_processor.image_processor, tiny_processor.tokenizer, micl=False)
    for row, prompt in zip(reference["rows"], reference["prompts"]["only_image"], strict=True):
        single = prompt.replace("{{", "{").replace("}}", "}")
        assert processor.build_prompt({"image": row["image"]}) == single + reference["suffix"]
