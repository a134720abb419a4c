"""What NoteLLM-2 costs on paper: operations, bytes and tokens of an item, and hours on one H100; nothing is run.

    python -m tests.benchmarks.cost_model

Operations are counted by torch's own counter, over the real classes in their real sizes, built without memory. Two for a
multiplication with its addition. The rest is arithmetic: `Costs` says what was assumed.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Blip2QFormerModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_notellm2 import NoteLLM2Config
from modeling_notellm2.connectors_notellm2 import NoteLLM2Projector


PEAK = 989e12
"""Operations of an H100 SXM in bfloat16 a second, dense, as its maker states."""
USED = 0.40
"""Share of the peak that is reached."""
VISION = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
"""SigLIP2-so400m-patch14-384."""
QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
LLMS = {
    "Qwen3-0.6B": Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, **QWEN3
    ),
    "Qwen3-4B": Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, **QWEN3
    ),
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_attention_heads=32, **QWEN3
    ),
}
"""Sizes as the families' published configs have them."""


@dataclass(frozen=True)
class Costs:
    """Operations of one item's forward pass by part.

    Attributes:
        vision, connector, llm: operations.
        tokens: of the item in the LLM, visual ones among them.
        weights: parameters of all parts.
        stored: bytes of a picture's features in the vision cache, 16 bits each.
        real_tokens: share of real tokens in a padded batch, as measured on the emoji items.
    """

    vision: float
    connector: float
    llm: float
    tokens: int
    weights: int
    stored: int
    real_tokens: float = field(default=0.68)

    @property
    def forward(self) -> float:
        """An item whose picture goes through the vision encoder."""
        return self.vision + self.connector + self.llm

    def step(self, lora: bool, cached: bool) -> float:
        """An item in a training step: gradients pass through LLM and connector, never through the frozen vision encoder.

        In full training the backward pass costs two forward passes; the LLM's own weights need none of it with LoRA, whose
        matrices are small, and one pass remains.
        """
        return (0 if cached else self.vision) + 3 * self.connector + (2 if lora else 3) * self.llm


def count(run: Callable[[], object]) -> int:
    """Operations of what is run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def costs(text: Qwen3Config, vision: SiglipVisionConfig = VISION, text_tokens: int = 128) -> Costs:
    """Those of an item with one picture and the published Q-Former.

    Args:
        text_tokens: of the item's texts and the prompt around them.
    """
    text, vision = copy.deepcopy(text), copy.deepcopy(vision)  # a model that is built writes into its config
    config = NoteLLM2Config(vision_config=vision, text_config=text, vision_hidden_size=vision.hidden_size)
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = text_tokens + config.num_query_tokens
    with torch.device("meta"):
        encoder, llm = SiglipVisionModel(vision), Qwen3Model(text)
        qformer = Blip2QFormerModel._from_config(config.qformer_config)
        new = nn.ModuleList([NoteLLM2Projector(config.qformer_config.hidden_size, text.hidden_size)])
        pixels = torch.empty(1, 3, vision.image_size, vision.image_size)
        queries = torch.empty(1, config.num_query_tokens, config.qformer_config.hidden_size)
        features = torch.empty(1, patches, vision.hidden_size)
        embedded, mask = torch.empty(1, tokens, text.hidden_size), torch.empty(1, 1, tokens, tokens)
        parts: list[PreTrainedModel | nn.Module] = [encoder, qformer, new, llm]
        connector = count(lambda: qformer(query_embeds=queries, encoder_hidden_states=features)) + count(
            lambda: new[0](queries)
        )
        return Costs(
            vision=count(lambda: encoder(pixels)),
            connector=connector,
            llm=count(lambda: llm(inputs_embeds=embedded, attention_mask=mask, use_cache=False)),
            tokens=tokens,
            weights=sum(weight.numel() for part in parts for weight in part.parameters()),
            stored=2 * (patches + 1) * vision.hidden_size,
        )


def hours(operations: float) -> str:
    """On one H100, to two digits."""
    value = operations / (PEAK * USED) / 3600
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def tables() -> str:
    """Both tables in Markdown: an item, and hours on one H100."""
    of_llm = {name: costs(config) for name, config in LLMS.items()}
    lines = [
        "| LLM | tokens | weights | vision | connector | LLM | weights, bf16 | vision cache |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cost in of_llm.items():
        operations = " | ".join(f"{part / 1e9:,.0f} G" for part in (cost.vision, cost.connector, cost.llm))
        lines.append(
            f"| {name} | {cost.tokens} | {cost.weights / 1e9:.2f} B | {operations} | {2 * cost.weights / 1e9:.1f} GB | "
            f"{cost.stored / 1e6:.1f} MB a picture |"
        )
    lines += ["", "| hours on one H100 | " + " | ".join(of_llm) + " |", "|---|" + "---|" * len(of_llm)]
    jobs: dict[str, Callable[[Costs], float]] = {
        "encode 100 million items": lambda c: 1e8 * c.forward,
        "the same, padded instead of packed": lambda c: 1e8 * (c.vision + c.connector + c.llm / c.real_tokens),
        "the same, vision features stored": lambda c: 1e8 * (c.connector + c.llm),
        "train 1.5 million pairs in full": lambda c: 3e6 * c.step(lora=False, cached=False),
        "the same, padded": lambda c: 3e6 * (c.step(False, False) + 3 * c.llm * (1 / c.real_tokens - 1)),
        "the same, later epochs with cached vision features": lambda c: 3e6 * c.step(lora=False, cached=True),
        "train with LoRA": lambda c: 3e6 * c.step(lora=True, cached=False),
        "LoRA, cached vision features": lambda c: 3e6 * c.step(lora=True, cached=True),
    }
    for job, of in jobs.items():
        lines.append(f"| {job} | " + " | ".join(hours(of(cost)) for cost in of_llm.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
