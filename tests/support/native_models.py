"""Tiny checkpoints of pictures and text, saved whole with tokenizer and processors, for native connectors."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from tests.support.families import shrunk_fields, strengthen
from tests.support.models import make_tokenizer


IN_FULL = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "idefics3", "smolvlm", "gemma3", "llava", "internvl"]
"""Families that are tried with a processor, prompts and pictures of their own; of the others joining's trial decides."""

TOWER = {"image_size": 32, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}
# Fields that make a family tiny and consistent, and options of its image processor.
FIELDS: dict[str, dict[str, Any]] = {
    "idefics3": {"scale_factor": 2, "vision_config": TOWER},
    "smolvlm": {"scale_factor": 2, "vision_config": TOWER},
    "gemma3": {"mm_tokens_per_image": 4, "vision_config": TOWER},
    "paligemma": {"projection_dim": 64, "vision_config": {**TOWER, "projection_dim": 64}},
    "llava": {"vision_config": TOWER},
    "llava_next": {"vision_config": TOWER},
    "internvl": {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}, "image_seq_length": 4},
}
GRID = {"size": {"shortest_edge": 28 * 28, "longest_edge": 96 * 96}, "merge_size": 2}
IMAGE_PROCESSORS: dict[str, dict[str, Any]] = {
    "idefics3": {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False},
    "smolvlm": {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False},
    "gemma3": {"size": SQUARE},
    "paligemma": {"size": SQUARE},
    "llava": {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
    "internvl": {"size": SQUARE, "crop_to_patches": False},
}
# Special tokens of a family's tokenizer, by the names under which its processor asks for them.
QWEN = {
    "start": "<|vision_start|>",
    "end": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
IDEFICS = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
}
SPECIAL = {
    "idefics3": {**IDEFICS, "end_of_utterance_token": "<end_of_utterance>"},
    "smolvlm": {**IDEFICS, "end_of_utterance_token": "<end_of_utterance>"},
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "paligemma": {"image_token": "<image>"},
    "llava": {"image_token": "<image>"},
    "llava_next": {"image_token": "<image>"},
    "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "image_token": "<IMG_CONTEXT>"},
}
IMAGE_TOKEN_ID = 270


def tiny_checkpoint(family: str) -> PreTrainedModel:
    """A family's model with its head, random, with weights as large as trained ones, in eval mode."""
    config_class = hf.CONFIG_MAPPING[family]
    fields = shrunk_fields(config_class())
    for name, value in FIELDS.get(family, {}).items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    torch.manual_seed(0)
    config = config_class(**fields)
    if family in SPECIAL:
        config.image_token_id = IMAGE_TOKEN_ID
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    strengthen(model)
    return model


def tokenizer_for(model: PreTrainedModel, family: str) -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens of the family, where the model's config names ids of theirs at these."""
    special = SPECIAL.get(family, QWEN)
    config = model.config
    ids = {special["image_token"]: config.image_token_id}
    for field, name in (("vision_start_token_id", "start"), ("vision_end_token_id", "end")):
        if name in special:
            ids[special[name]] = getattr(config, field, None) or getattr(config, field.replace("vision", "image"))
    places = {number: token for token, number in ids.items()}
    others = [token for token in special.values() if token not in ids]
    bytes_alone = make_tokenizer()
    for number in range(len(bytes_alone), 288):
        token = places.get(number) or (others.pop(0) if others else f"<free{number}>")
        bytes_alone.add_tokens([token], special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone.backend_tokenizer, pad_token="<pad>", bos_token="<s>", extra_special_tokens=special
    )


def image_processor_for(model: PreTrainedModel, family: str) -> Any:
    """The family's own image processor, for tiny pictures."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES[family]
    name = names["pil"] if isinstance(names, dict) else names[-1] or names[0]
    vision = model.config.vision_config
    options = IMAGE_PROCESSORS.get(family) or {**GRID, "patch_size": vision.patch_size, "temporal_patch_size": 2}
    return getattr(hf, name)(**options)


def saved_checkpoint(family: str, folder: Path) -> PreTrainedModel:
    """A tiny checkpoint in a folder, with tokenizer and image processor."""
    model = tiny_checkpoint(family)
    model.save_pretrained(folder)
    tokenizer_for(model, family).save_pretrained(folder)
    image_processor_for(model, family).save_pretrained(folder)
    return model
