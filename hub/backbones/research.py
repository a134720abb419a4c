"""A checkpoint of the research code as our model: its settings, its state dict, where each weight goes, and the folder."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer

from hub.backbones.qwen import qwen2_config, qwen2_weights
from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model, NoteLLM2Processor
from training.tables.commands.files import atomic_write


# Research name -> ours, tried in order. Longest and most special first.
RENAMES = [
    (r"^vision_tower\.vision_tower\.vision_model\.", "vision_model."),
    (r"^vision_tower\.vision_tower\.", "vision_model."),
    (r"^model\.", "language_model."),
    (r"^mm_projector\.0\.", "projector.linear_1."),
    (r"^mm_projector\.2\.", "projector.linear_2."),
    (r"^mm_projector_latefusion\.", "late_fusion.projection."),
    (r"^gate\.trans_all\.", "late_fusion.gate."),
    (r"^linear\.", "reduction."),
    (r"^temperature$", "logit_scale"),
]
PICKLES = (".bin", ".pt", ".pth")
# Buffers that old versions of transformers saved and that are recomputed, and the LLM's unused output layer.
DROPPED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids|^lm_head\.weight)$")


def convert_name(name: str) -> str | None:
    """Our name of a research parameter; None for what is not carried over."""
    if DROPPED.search(name):
        return None
    for pattern, replacement in RENAMES:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def convert_config(research: dict[str, Any]) -> NoteLLM2Config:
    """Our config from the research code's sizes and flags.

    Raises:
        ValueError: for settings that this model does not compute.
    """
    expected = {"projector": "mlp2x_gelu", "vision_feature": "cls_patch"}
    for key, value in expected.items():
        if research.get(key, value) != value:
            raise ValueError(f"config {key}={research[key]!r} is not supported; expected {value!r}.")
    text = research["text_config"]
    qformer = {k: v for k, v in research["qformer_config"].items() if k != "vocab_size"}
    return NoteLLM2Config(
        vision_config=research["vision_config"],
        text_config=qwen2_config(text) if text.get("model_type") == "qwen" else text,
        qformer_config=qformer,
        num_query_tokens=research["num_query_tokens"],
        early_fusion=research["early_fusion"],
        late_fusion=research["late_fusion"],
        micl=research["micl"],
        embedding_dim=research["dim_reduction"],
        logit_scale_init=float(research.get("temperature", 3.0)),
        multimodal_loss_weight=research.get("text_weight", 9.0),
        visual_loss_weight=research.get("vision_weight", 1.0),
        vision_feature_layer=research.get("vision_feature_layer", -1),
        image_token_id=research["image_token_id"],
        visual_embedding_token_id=research["visual_embedding_token_id"],
    )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from disk. Pickles are read weights-only: nothing in them is executed.

    Raises:
        ValueError: for another kind of file, for one that holds no state dict, and for a pickle that holds anything but
            tensors.
    """
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix not in PICKLES:
        raise ValueError(f"{path}: expected a .safetensors, .bin, .pt, .pth or .index.json file.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} was not read: it is damaged, or a pickle that holds more than tensors, such as code, which is never run "
            f"({reason}). Ask for a .safetensors file, or for a plain state dict as zero_to_fp32.py writes it."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors).")
    return weights


def _read_parts(index: Path) -> dict[str, torch.Tensor]:
    """All files that an index lists, which must lie beside it and hold what it says."""
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    weights: dict[str, torch.Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}; its files lie beside it.")
        weights |= read_weights(index.parent / name)
    if weights.keys() != places.keys():
        raise ValueError(
            f"{index} and its files differ: {len(places)} names in the index, {len(weights)} tensors in the files."
        )
    return weights


def convert(weights: dict[str, torch.Tensor], research_config: dict[str, Any]) -> NoteLLM2Model:
    """A model with the research weights; every weight must find its place and every place its weight.

    Raises:
        ValueError: listing the weights that are missing, left over or of another shape.
    """
    model = NoteLLM2Model(convert_config(research_config))
    if research_config["text_config"].get("model_type") == "qwen":
        weights = qwen2_weights(weights)
    places = model.state_dict()
    state = {ours: tensor for name, tensor in weights.items() if (ours := convert_name(name)) is not None}
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(1)
    missing, surplus = sorted(set(places) - set(state)), sorted(set(state) - set(places))
    shapes = [n for n in set(places) & set(state) if places[n].shape != state[n].shape]
    if missing or surplus or shapes:
        raise ValueError(
            f"The weights do not fit the config. Missing: {missing or 'none'}. Left over: {surplus or 'none'}. "
            f"Other shape: {sorted(shapes) or 'none'}."
        )
    model.load_state_dict(state)
    return model.eval()


def save_converted(model: NoteLLM2Model, output: Path, tokenizer: str | None, image_processor: str | None) -> None:
    """Write a model's folder, which appears only when it is complete.

    Args:
        tokenizer, image_processor: ids or folders of the backbones' own, for a processor beside the model; None: none.

    Raises:
        ValueError: when the tokenizer is not the one that the checkpoint was trained with.
    """
    with atomic_write(output) as place:
        model.save_pretrained(place)
        if tokenizer is not None:
            processor = NoteLLM2Processor.from_vision_text_pretrained(
                AutoImageProcessor.from_pretrained(image_processor),
                AutoTokenizer.from_pretrained(tokenizer),
                num_query_tokens=model.config.num_query_tokens,
                micl=model.config.micl,
                early_fusion=model.config.early_fusion,
            )
            ours = (model.config.image_token_id, model.config.visual_embedding_token_id)
            theirs = (processor.image_token_id, processor.visual_embedding_token_id)
            if ours != theirs:
                raise ValueError(
                    f"The tokenizer gives <IMG> and <IMG_EMB> the ids {theirs}, the checkpoint has {ours}: use the tokenizer "
                    "that the checkpoint was trained with."
                )
            processor.save_pretrained(place)
