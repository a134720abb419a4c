"""Where an item's embeddings are read in the LLM's last hidden state, and which of its tokens see which.

With mICL an item with images has two parts: its pictures with the words around them, up to <IMG_EMB>, and the rest. The visual
embedding is read in the first part, the multimodal one in the whole item. Other items have one part.
"""

import torch

from .configuration_notellm2 import NoteLLM2Config
from .inputs_notellm2 import last_position, positions_of, states_at


def item_parts(config: NoteLLM2Config, input_ids: torch.Tensor) -> torch.Tensor:
    """The part of the item that each token belongs to: 0 before <IMG_EMB>, else 1; `(n, length)` int64, as `input_ids`."""
    slots = positions_of(input_ids, config.visual_embedding_token_id if config.micl else None)
    return slots.long().cumsum(-1)


def read_tokens(
    config: NoteLLM2Config, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whose states become the embeddings: bool `(n, length)` each for the multimodal and the visual one.

    With `readout: last` (published) the last token of the item, and of its first part; with `mean` all tokens of the item, and
    all of its first part. Padding is never read. The visual one is of no meaning for items without <IMG_EMB>.
    """
    real = attention_mask.bool()
    first = real & torch.eq(item_parts(config, input_ids), 0)
    if config.readout == "mean":
        return real, first
    places = torch.arange(real.shape[1], device=real.device)
    last, last_of_first = (torch.eq(places, last_position(chosen).unsqueeze(-1)) for chosen in (real, first))
    return last, last_of_first


def read_states(
    config: NoteLLM2Config, hidden: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The states that become the embeddings: the mean over `read_tokens`, or the one state of the last token.

    Args:
        hidden (`torch.Tensor` of shape `(n, length, width)`): the LLM's last hidden state.
        input_ids, attention_mask (`torch.Tensor` of shape `(n, length)`).

    Returns:
        multimodal: `(n, width)`.
        visual: `(n, width)`, of no meaning for items without <IMG_EMB>; `None` without mICL.
    """
    if config.readout == "mean":
        item, first = read_tokens(config, input_ids, attention_mask)
        return mean_of(hidden, item), mean_of(hidden, first) if config.micl else None
    multimodal = states_at(hidden, last_position(attention_mask))
    if not config.micl:
        return multimodal, None
    before = positions_of(input_ids, config.visual_embedding_token_id).int().argmax(-1) - 1
    return multimodal, states_at(hidden, before.clamp(min=0))


def mean_of(hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean of each row's chosen states: `(n, length, width)` and bool `(n, length)` to `(n, width)`; zeros of none."""
    weights = chosen.to(hidden.device, torch.float32)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    # What stands at padding may be anything, infinite too.
    states = hidden.masked_fill(~chosen.to(hidden.device).unsqueeze(-1), 0)
    return torch.einsum("nl,nlw->nw", weights, states.float()).to(hidden.dtype)


def seen_tokens(attention_mask: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Which tokens each token of an item sees with bidirectional attention: all of its part and of the one before.

    So the visual embedding, read in the first part, knows of the pictures alone, as with causal attention.

    Args:
        attention_mask (`torch.Tensor` of shape `(n, length)`): 1 for tokens, 0 for padding, which nobody sees.
        parts (`torch.LongTensor` of shape `(n, length)`): as of `item_parts`.

    Returns:
        `torch.BoolTensor` of shape `(n, 1, length, length)`: for each token (third axis) those that it sees.
    """
    seen = parts.unsqueeze(-2) <= parts.unsqueeze(-1)
    return (seen & attention_mask.bool().unsqueeze(-2)).unsqueeze(1)


__all__ = ["item_parts", "mean_of", "read_states", "read_tokens", "seen_tokens"]
