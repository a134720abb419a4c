"""Any vision encoder with any LLM, from folders; and a saved folder where the package is not installed."""

import json
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from tests.support.models import QFORMER, make_backbones, make_image_processor, make_tokenizer


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
TEXT = {"vocab_size": 260, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
KV = {"num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION_CONFIGS = {
    "clip": lambda: hf.CLIPVisionConfig(patch_size=8, **VIT),
    "vit": lambda: hf.ViTConfig(patch_size=8, **VIT),
    "dinov2": lambda: hf.Dinov2Config(patch_size=8, **VIT),
    "dinov3": lambda: hf.DINOv3ViTConfig(patch_size=8, num_register_tokens=2, **VIT),
    "siglip": lambda: hf.SiglipVisionConfig(patch_size=8, **VIT),
    "swin": lambda: hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "efficientnet": lambda: hf.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320
    ),
    "convnext": lambda: hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    "mobilenet_v2": lambda: hf.MobileNetV2Config(image_size=32, depth_multiplier=0.35),
    "resnet": lambda: hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
}
TEXT_CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**TEXT),
    "mistral": lambda: hf.MistralConfig(**TEXT, **KV),
    "qwen2": lambda: hf.Qwen2Config(**TEXT, num_key_value_heads=2),
    "qwen3": lambda: hf.Qwen3Config(**TEXT, **KV),
    "gemma": lambda: hf.GemmaConfig(**TEXT, **KV),
    "gemma2": lambda: hf.Gemma2Config(**TEXT, **KV, sliding_window=16),
    "gemma3": lambda: hf.Gemma3TextConfig(**TEXT, **KV, sliding_window=512),
    "gpt2": lambda: hf.GPT2Config(vocab_size=260, n_embd=48, n_layer=2, n_head=4, n_positions=512),
}


def save_backbone(config, folder):
    hf.AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def check_pair(vision: str, text: str) -> None:
    """Assembled from folders it embeds a mixed batch as it embeds each item, on either padding side, and takes gradients."""
    make_tokenizer().save_pretrained(text)
    model = NoteLLM2Model.from_vision_text_pretrained(vision, text, qformer_config=QFORMER, num_query_tokens=4).eval()
    torch.nn.init.normal_(model.query_tokens)
    processor = NoteLLM2Processor.from_vision_text_pretrained(make_image_processor(), text, model=model)
    items = [{"title": "a", "image": PICTURE}, "text", PICTURE, {"image": [PICTURE, PICTURE]}]
    with torch.no_grad():
        together = model(**processor(items, return_tensors="pt", padding_side="left"))
        alone = [model(**processor(item, return_tensors="pt")) for item in items]
    torch.testing.assert_close(together.embeddings, torch.cat([o.embeddings for o in alone]), atol=2e-5, rtol=0)
    model.train()(**processor(items, return_tensors="pt"), return_loss=True).loss.backward()
    assert model.query_tokens.grad.any()
    assert model.late_fusion.gate.weight.grad.any()


@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_any_vision_encoder(vision, tmp_path):
    folder = save_backbone(VISION_CONFIGS[vision](), tmp_path / "vision")
    check_pair(folder, save_backbone(TEXT_CONFIGS["llama"](), tmp_path / "text"))


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_any_decoder_only_llm(text, tmp_path):
    folder = save_backbone(TEXT_CONFIGS[text](), tmp_path / "text")
    check_pair(save_backbone(VISION_CONFIGS["clip"](), tmp_path / "vision"), folder)


def test_a_composite_checkpoint_gives_its_vision_tower(tmp_path):
    config = hf.CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={"patch_size": 8, **VIT},
    )
    clip = hf.CLIPModel(config)
    clip.save_pretrained(tmp_path)
    model = NoteLLM2Model.from_vision_text_pretrained(str(tmp_path), make_backbones()[1], qformer_config=QFORMER)
    assert model.config.vision_config.model_type == "clip_vision_model"
    expected = clip.vision_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.vision_model.state_dict().items())


def test_unusable_backbones_are_refused_with_what_is_expected(tmp_path):
    vision, text = make_backbones()
    bert = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="'bert' model .*reads ahead.* A decoder-only language model is expected"):
        NoteLLM2Model.from_vision_text_pretrained(vision, hf.BertModel(hf.BertConfig(**bert)))
    folder = save_backbone(hf.T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2), tmp_path)
    with pytest.raises(ValueError, match="'t5' model, which has an encoder. A decoder-only language model is expected"):
        NoteLLM2Model.from_vision_text_pretrained(vision, folder)
    with pytest.raises(ValueError, match="can't be read as a vision encoder"):
        NoteLLM2Model.from_vision_text_pretrained(make_backbones()[1], text)
    with pytest.raises(ValueError, match="LlamaModel has no merger of its own"):
        NoteLLM2Model.from_vision_text_pretrained(text, text)


FRESH = """
import sys
sys.path.append(sys.argv[1])
import json, logging, warnings
warnings.simplefilter("error", DeprecationWarning)
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor
try:
    import modeling_notellm2
except ImportError:
    pass
else:
    raise SystemExit("the package is importable: this tests nothing")
folder, picture = sys.argv[2:4]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
items = [{"title": "a", "image": Image.open(picture)}, "text"]
with torch.no_grad():
    embeddings = model(**processor(items, return_tensors="pt")).embeddings
again = sys.argv[4]
model.save_pretrained(again)
processor.save_pretrained(again)
print(json.dumps({"type": config.model_type, "class": type(model).__name__, "embeddings": embeddings.tolist()}))
"""


def test_a_saved_folder_loads_where_the_package_is_not_installed(tiny_model_folder, tmp_path):
    """Twice: the folder as saved here, and the folder that the process without the package saved again."""
    PICTURE.save(tmp_path / "picture.png")
    model, processor = (
        hf.AutoModel.from_pretrained(tiny_model_folder).eval(),
        hf.AutoProcessor.from_pretrained(tiny_model_folder),
    )
    with torch.no_grad():
        expected = model(**processor([{"title": "a", "image": PICTURE}, "text"], return_tensors="pt")).embeddings
    for source, target in ((tiny_model_folder, tmp_path / "again"), (tmp_path / "again", tmp_path / "third")):
        # -S leaves out site-packages' .pth files, and with them the editable install.
        command = [sys.executable, "-I", "-S", "-c", FRESH, sysconfig.get_paths()["purelib"], source]
        command += [tmp_path / "picture.png", target]
        environment = {
            "HF_HOME": str(tmp_path / target.name),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "arning" not in run.stderr and "backend" not in run.stderr and "torchvision" not in run.stderr, (
            run.stderr
        )
        result = json.loads(run.stdout.splitlines()[-1])
        assert result["type"] == "notellm2"
        assert result["class"] == "NoteLLM2Model"
        torch.testing.assert_close(torch.tensor(result["embeddings"]), expected, atol=1e-6, rtol=0)
