"""The packaged backbones are what they claim to be, and assemble into a folder that loads elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import LlamaConfig, LlamaModel

from hub.backbones import packaged as packaged_backbones
from hub.backbones.assembling import layer_numbers
from hub.backbones.layers import keep_layers
from hub.backbones.packaged import (
    efficientnet_lite0_image_processor,
    load_efficientnet_lite0,
    load_efficientnet_lite0_classifier,
    load_smollm2,
)


ROOT = Path(__file__).parents[2]
DAISY = 985
TEMPLE = {442, 449, 483, 663, 698}  # bell cote, boathouse, castle, monastery, palace
SMALL = ["--text_layers", "1", "--qformer_layers", "1", "--qformer_hidden_size", "32", "--qformer_heads", "2"]
# Runs without the project on the path: only the folder's own code is there.
READER = """
import sys, torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
picture = Image.new("RGBA", (72, 72), (255, 0, 0, 0))
inputs = processor([{"title": "red apple", "image": picture}, {"title": "a text"}], return_tensors="pt")
white = (255 - 127) / 128
assert inputs["pixel_values"].shape == (1, 3, 224, 224) and (inputs["pixel_values"] == white).all()
with torch.inference_mode():
    output = model(**inputs)
assert output.embeddings.shape == (2, 8) and output.embeddings.isfinite().all()
assert "modeling_notellm2" not in sys.modules
"""


def test_image_processor_is_exact():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(196).reshape(224, 224)
    image = Image.fromarray(pixels.numpy()).convert("RGB")
    values = efficientnet_lite0_image_processor()(images=[image], return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 224, 224)
    assert torch.equal(values[0, 1], (pixels.float() - 127) / 128)


def test_efficientnet_knows_photos():
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    with torch.inference_mode():
        pixels = efficientnet_lite0_image_processor()(images=photos, return_tensors="pt")["pixel_values"]
        classes = load_efficientnet_lite0_classifier()(pixels).logits.topk(5).indices
        features = load_efficientnet_lite0()[0](pixels)
    assert set(classes[0].tolist()) == TEMPLE
    assert classes[1, 0] == DAISY
    assert features.last_hidden_state.shape == (2, 1280, 7, 7)
    torch.testing.assert_close(features.pooler_output, features.last_hidden_state.mean((2, 3)))


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_efficientnet_weights_must_fit(monkeypatch, change):
    read = packaged_backbones._read_pickle

    def tampered(path):
        weights = read(path)
        stem = weights.pop("_conv_stem.weight") if change != "surplus" else weights["_conv_stem.weight"]
        if change == "surplus":
            weights["_conv_extra.weight"] = stem
        elif change == "shape":
            weights["_conv_stem.weight"] = stem[:16]
        return weights

    monkeypatch.setattr(packaged_backbones, "_read_pickle", tampered)
    name = "_conv_extra.weight" if change == "surplus" else "embeddings.convolution.weight"
    with pytest.raises(ValueError, match=name):
        load_efficientnet_lite0_classifier()


def test_kept_layers_compute_as_before():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, head_dim=8
    )
    model = LlamaModel(config).eval()
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        after_two = model(ids, output_hidden_states=True).hidden_states[2]
        last = model.layers[3]
        keep_layers(model, [0, 1, 3])
        assert model.layers[2] is last
        assert model(ids).last_hidden_state.shape == (1, 5, 16)  # with a cache, so its places must fit
        keep_layers(model, [0, 1])
        model.norm = torch.nn.Identity()
        assert torch.equal(model(ids).last_hidden_state, after_two)
    assert model.config.num_hidden_layers == 2
    for wrong in ([0, 2], [1, 0], [], [0, 0]):
        with pytest.raises(ValueError, match="has layers 0 to 1"):
            keep_layers(model, wrong)


def test_layers_are_named_by_number_or_range():
    assert layer_numbers("3") == [0, 1, 2]
    assert layer_numbers("0-2,5,7-8") == [0, 1, 2, 5, 7, 8]
    with pytest.raises(ValueError, match="'3-'; expected"):
        layer_numbers("3-")


@pytest.mark.slow
def test_smollm2_continues_a_sentence():
    model, tokenizer = load_smollm2()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        last = model.eval()(ids).last_hidden_state[0, -1]
        best = (last @ model.get_input_embeddings().weight.T).argmax()  # input and output embeddings are tied
    assert tokenizer.decode([best]) == " Paris"
    assert len(tokenizer) == 49152
    assert "gguf" not in json.dumps(model.config.to_dict())


@pytest.mark.slow
def test_assembled_folder_loads_elsewhere(tmp_path):
    output = tmp_path / "base"
    command = [sys.executable, "hub/assemble.py", "--output", str(output), "--embedding_dim", "8", *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "LlamaModel" in done.stdout
    assert "EfficientNetModel" in done.stdout
    assert json.loads((output / "assembly.json").read_text())["text_layers"] == "1"
    assert not [path for path in tmp_path.iterdir() if path != output]  # nothing half-written is left

    read = subprocess.run(
        [sys.executable, "-I", "-W", "error::UserWarning", "-c", _without_project(), str(output)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0, read.stderr
    assert "orchvision" not in done.stderr + read.stderr


def test_assemble_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "precious").write_text("keep me")
    command = [sys.executable, "hub/assemble.py", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "precious was not made by this program" in done.stderr
    assert (tmp_path / "precious").read_text() == "keep me"


def _without_project() -> str:
    """The reader, with the project's editable install taken off the path."""
    return f"import sys\nsys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n{READER}"
