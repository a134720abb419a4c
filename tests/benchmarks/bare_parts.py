"""Encoding and a training step beside their bare parts: what padding and everything of ours around the backbones costs.

The bare parts are the vision encoder alone, Q-Former and projector alone, and the LLM alone on as many tokens as the items
have, in rows of one length; in training with their backward passes and the optimizer's step. Nothing that has to be done
is missing from them but joining.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from modeling_notellm2 import NoteLLM2Model
from tests.benchmarks.ratios import Ratio, compare


ITEMS = 32


@dataclass(frozen=True)
class Size:
    """A model and the lengths of its items, in tokens, least and most."""

    name: str
    text: LlamaConfig
    vision: CLIPVisionConfig
    qformer: dict[str, int]
    query_tokens: int
    lengths: tuple[int, int]


def sizes() -> list[Size]:
    """A medium one, and the demo's LLM and Q-Former with a vision encoder of the demo's cost."""
    medium = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    )
    smollm2 = LlamaConfig(
        vocab_size=49_154,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    vision = {"image_size": 224, "patch_size": 32}
    six = {"num_hidden_layers": 6, "num_attention_heads": 12}
    return [
        Size(
            "medium",
            medium,
            CLIPVisionConfig(hidden_size=768, intermediate_size=3072, **six, **vision),
            {"hidden_size": 768, "intermediate_size": 3072, **six},
            16,
            (59, 139),
        ),
        Size(
            "demo",
            smollm2,
            CLIPVisionConfig(
                hidden_size=384, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=6, **vision
            ),
            {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 6},
            4,
            (36, 75),
        ),
    ]


def make(size: Size) -> tuple[NoteLLM2Model, dict[str, Tensor]]:
    """A model of random weights and a batch of items with one picture each, in the order in which a table has them."""
    torch.manual_seed(0)
    model = NoteLLM2Model.from_vision_text_pretrained(
        CLIPVisionModel(size.vision),
        LlamaModel(copy.deepcopy(size.text)),  # the attention is set in the config
        qformer_config=size.qformer,
        num_query_tokens=size.query_tokens,
        image_token_id=5,
        visual_embedding_token_id=6,
        check=False,
    )
    lengths = torch.randint(size.lengths[0], size.lengths[1] + 1, (ITEMS,))
    lengths[0] = size.lengths[1]
    mask = (torch.arange(size.lengths[1]) < lengths[:, None]).long()
    ids = torch.randint(10, size.text.vocab_size, mask.shape) * mask
    ids[:, 4 : 4 + size.query_tokens], ids[:, 20 + size.query_tokens] = 5, 6
    pixels = torch.randn(ITEMS, 3, size.vision.image_size, size.vision.image_size)
    return model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def parts(model: NoteLLM2Model, inputs: dict[str, Tensor]) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """The bare parts: the vision encoder, and a sum of what Q-Former and LLM give, for a backward pass."""
    length = round(int(inputs["attention_mask"].sum()) / ITEMS)
    features = model.get_vision_features(inputs["pixel_values"]).last_hidden_state.detach()
    ids = inputs["input_ids"][:, :length].clamp(min=10)

    def others() -> Tensor:
        visual = model.get_visual_tokens(features)
        states = model.language_model(input_ids=ids, use_cache=False).last_hidden_state
        return visual.mean() + states[:, -1].mean()

    return lambda: model.vision_model(inputs["pixel_values"]), others


def encoding(size: Size, rounds: int) -> Ratio:
    """A batch's embeddings beside the bare forward passes."""
    model, inputs = make(size)
    model.eval()
    with torch.inference_mode():
        vision, others = parts(model, inputs)
        return compare(
            f"encoding, {size.name}", lambda: model(**inputs), "bare parts", lambda: (vision(), others()), rounds, 1.10
        )


def training_step(size: Size, rounds: int) -> Ratio:
    """A step on pairs, with AdamW, beside the bare parts' passes and the same optimizer's step."""
    model, inputs = make(size)
    model.train()
    vision, others = parts(model, inputs)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    def bare_loss() -> Tensor:
        with torch.no_grad():
            vision()
        return others()

    return compare(
        f"training step, {size.name}",
        lambda: step(lambda: model(**inputs, return_loss=True).loss),
        "bare parts",
        lambda: step(bare_loss),
        rounds,
        1.15,
    )


def padded(size: Size, rounds: int) -> Ratio:
    """The same batch without packing, for what packing saves."""
    model, inputs = make(size)
    plain, _ = make(size)
    model.eval()
    plain.eval().language_model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        return compare(
            f"encoding padded, {size.name}", lambda: plain(**inputs), "packed", lambda: model(**inputs), rounds
        )


def ratios(rounds: int) -> list[Ratio]:
    """All of these, at both sizes."""
    return [measure(size, rounds) for size in sizes() for measure in (encoding, padded, training_step)]
