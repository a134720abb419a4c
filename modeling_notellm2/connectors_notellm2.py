"""What is new between vision encoder and LLM: the projector, and pooled patches for connectors without a Q-Former."""

import math

import torch
from torch import nn


MOST_PREFIX_TOKENS = 5
"""A class token and four registers, before the patches."""


class NoteLLM2Projector(nn.Module):
    """Visual tokens to the width of the LLM's token embeddings: Linear, GELU, Linear (paper, section 3.2).

    Args:
        visual_width: of the Q-Former, or of the vision encoder where the connector is "mlp".
        width: of the token embeddings.
    """

    def __init__(self, visual_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(visual_width, width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(hidden_states)))


def pooled_patches(hidden: torch.Tensor, mask: torch.Tensor | None, cells: int) -> torch.Tensor:
    """Means of a picture's patches over the cells of a grid, `(images, tokens, width)` to `(images, cells, width)`.

    Args:
        hidden: the vision encoder's tokens; class and register tokens stand first.
        mask: `(images, tokens)`, 1 for tokens and 0 for padding behind them; None: all are tokens.
        cells: visual tokens that a picture becomes.
    """
    if mask is None:
        return patch_weights(hidden.shape[1], cells).to(hidden) @ hidden
    weights = hidden.new_zeros(len(hidden), cells, hidden.shape[1])
    for number, length in enumerate(mask.sum(1).tolist()):
        weights[number, :, :length] = _stripes(length, cells)  # pictures of any form
    return weights @ hidden


def patch_weights(tokens: int, cells: int) -> torch.Tensor:
    """How much each token of a picture counts in each cell, `(cells, tokens)` float32; a row's sum is 1.

    The last square number of tokens are the patches of a square picture, if no more are left over than class and register
    tokens can be; else all are patches, row after row. With a square number of cells the plane is cut in both directions,
    else into stripes. Cells overlap where they don't fit, as in adaptive average pooling.
    """
    side, across = math.isqrt(tokens), math.isqrt(cells)
    prefix = tokens - side * side
    if prefix > MOST_PREFIX_TOKENS:
        return _stripes(tokens, cells)
    if across * across == cells:
        weights = torch.kron(_stripes(side, across), _stripes(side, across))
    else:
        weights = _stripes(side * side, cells)
    return torch.cat([torch.zeros(cells, prefix), weights], dim=1)


def _stripes(length: int, parts: int) -> torch.Tensor:
    """Means over `parts` stretches of a line, `(parts, length)`."""
    number, place = torch.arange(parts).unsqueeze(1), torch.arange(length)
    held = (place >= number * length // parts) & (place < -(-(number + 1) * length // parts))
    return held / held.sum(1, keepdim=True)


__all__ = ["NoteLLM2Projector", "patch_weights", "pooled_patches"]
