"""Items of a batch one behind the other, without padding: what stands between them in a padded batch is never computed.

On a CPU padding costs as much as text. Everything in a decoder but attention treats each position alone, so the items go
through it as one long row; attention is called once for each item, so no item sees another. Only families whose layers mix
positions by plain causal attention alone, through transformers' attention interface, are called like this.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput


PACKED_SDPA = "notellm2_packed_sdpa"
"""Name of the attention below: SDPA for a padded batch, SDPA item by item for a packed one."""

FAMILIES = ("llama", "qwen2", "qwen3", "smollm3", "granite", "olmo2")
"""Of which tests show that packed items get the states that they have alone; others are padded."""


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    item_lengths: list[int] | None = None,
    item_masks: list[torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: `query` `(rows, heads, length, width)` to `(rows, length, heads, width)`.

    Args:
        item_lengths: tokens of each item, where the only row holds items one behind the other.
        item_masks: bool `(1, tokens, tokens)` of each, for each token those that it sees; None: those before it.
    """
    if item_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    q, k, v = (states.split(item_lengths, dim=2) for states in (query, key, value))
    attended = [
        sdpa_attention_forward(module, q[item], k[item], v[item], item_masks[item] if item_masks else None, **kwargs)[0]
        for item in range(len(item_lengths))
    ]
    return torch.cat(attended, dim=1), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


def allow_packing(model: PreTrainedModel) -> None:
    """Gives an LLM the attention that packed items need, if its family is known to permit it and it would use SDPA."""
    config = model.config
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    plain = config.model_type in FAMILIES and not windows and getattr(config, "sliding_window", None) is None
    if plain and config._attn_implementation == "sdpa":
        model.set_attn_implementation(PACKED_SDPA)


def can_pack(model: PreTrainedModel, attention_mask: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a batch is better packed: it has padding, the LLM permits it, and nobody asks for states of padded shape.

    On CPUs alone: there it is measured (tests/benchmarks/NOTES.md); GPUs have kernels of their own for it.
    """
    config = model.config
    asks_for_more = kwargs or config.output_hidden_states or config.output_attentions
    if torch.compiler.is_compiling() or attention_mask.device.type != "cpu" or asks_for_more:
        return False
    return config._attn_implementation == PACKED_SDPA and not bool(attention_mask.all())


def call_packed(
    model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    seen: torch.Tensor | None = None,
) -> BaseModelOutput:
    """Runs an LLM on the real tokens of a batch alone.

    Args:
        model: a headless decoder that `allow_packing` changed.
        inputs_embeds (`torch.Tensor` of shape `(n, length, width)`).
        attention_mask (`torch.Tensor` of shape `(n, length)`): 1 for tokens, 0 for padding on either side.
        seen (`torch.BoolTensor` of shape `(n, 1, length, length)`, *optional*): for each token those that it sees; those before
            it if left out.

    Returns:
        `last_hidden_state` `(n, length, width)`, zeros at padding.
    """
    real = attention_mask.bool()
    lengths = real.sum(-1)
    positions = (real.cumsum(-1) - 1)[real]
    extra = {}
    if seen is not None:
        extra["item_masks"] = [mask[:, row][:, :, row] for mask, row in zip(seen, real, strict=True) if row.any()]
    states = model(
        inputs_embeds=inputs_embeds[real].unsqueeze(0),
        # A mask of four dimensions is passed on as it is: none is built.
        attention_mask=inputs_embeds.new_empty(1, 1, 0, 0),
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        item_lengths=lengths[lengths > 0].tolist(),
        **extra,
    ).last_hidden_state
    padded = states.new_zeros(*real.shape, states.shape[-1])
    return BaseModelOutput(last_hidden_state=padded.masked_scatter(real.unsqueeze(-1), states))
