"""The one form in which features of pictures are handed on, stored and joined, whatever made them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class VisionFeatures:
    """What a vision encoder makes of pictures.

    Attributes:
        last_hidden_state: `(images, tokens, width)`, class token first where there is one.
        pooler_output: `(images, width)`, the summary feature.
        attention_mask: `(images, tokens)` int64, 1 for tokens, 0 for padding behind them; None where all pictures have as
            many.
        grids: `(images, 3)` int64, patches of each picture in time, height and width, for LLMs that give visual tokens
            places in the plane (M-RoPE); else None.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    attention_mask: torch.Tensor | None = None
    grids: torch.Tensor | None = None

    def row(self, number: int) -> "VisionFeatures":
        """Those of one picture, `(1, ...)` each."""
        return self.rows(torch.tensor([number]))

    def rows(self, numbers: torch.Tensor) -> "VisionFeatures":
        """Those of some pictures, in the order given."""
        numbers = numbers.to(self.pooler_output.device)
        parts = (self.last_hidden_state, self.pooler_output, self.attention_mask, self.grids)
        return VisionFeatures(*(None if part is None else part[numbers] for part in parts))  # type: ignore[arg-type]


def join_features(parts: list[VisionFeatures]) -> VisionFeatures:
    """Features of several batches as one, padded to the most tokens; each part's rows stay together and in order."""
    hidden = [part.last_hidden_state for part in parts]
    longest = max(states.shape[1] for states in hidden)
    mask = None
    if any(part.attention_mask is not None or part.last_hidden_state.shape[1] < longest for part in parts):
        masks = [
            states.new_ones(states.shape[:2], dtype=torch.long) if part.attention_mask is None else part.attention_mask
            for part, states in zip(parts, hidden, strict=True)
        ]
        mask = torch.cat([F.pad(of_part, (0, longest - of_part.shape[1])) for of_part in masks])
    grids = [part.grids for part in parts if part.grids is not None]
    return VisionFeatures(
        last_hidden_state=torch.cat([F.pad(states, (0, 0, 0, longest - states.shape[1])) for states in hidden]),
        pooler_output=torch.cat([part.pooler_output for part in parts]),
        attention_mask=mask,
        grids=torch.cat(grids) if grids else None,
    )


def merge_features(
    computed: VisionFeatures, given: VisionFeatures | None, is_given: torch.Tensor | None
) -> VisionFeatures:
    """Features of all images in order, from those that were computed now and those that were given, `is_given` `(images,)`."""
    if given is None or is_given is None:
        return computed
    given = VisionFeatures(
        given.last_hidden_state.to(computed.last_hidden_state),
        given.pooler_output.to(computed.pooler_output),
        given.attention_mask,
        given.grids,
    )
    order = torch.cat([is_given.nonzero().flatten(), (~is_given).nonzero().flatten()]).argsort()
    return join_features([given, computed]).rows(order)


def features_of(
    compute: Callable[[torch.Tensor, torch.Tensor | None], VisionFeatures],
    pixel_values: torch.Tensor | None = None,
    image_sizes: torch.Tensor | None = None,
    vision_hidden_states: torch.Tensor | None = None,
    vision_pooler_output: torch.Tensor | None = None,
    vision_attention_mask: torch.Tensor | None = None,
    vision_grids: torch.Tensor | None = None,
    cached_images: torch.Tensor | None = None,
    **_: Any,
) -> VisionFeatures | None:
    """Features of a batch's pictures: given, computed now, or some of each; None without pictures.

    Args:
        compute: the model's `get_vision_features`.
        pixel_values, ..., cached_images: as the model's `forward` takes them; its other inputs are not looked at.
    """
    given = None
    if vision_hidden_states is not None and vision_pooler_output is not None:
        given = VisionFeatures(vision_hidden_states, vision_pooler_output, vision_attention_mask, vision_grids)
    if pixel_values is None or (given is not None and cached_images is None):
        return given
    return merge_features(compute(pixel_values, image_sizes), given, cached_images)


__all__ = ["VisionFeatures", "features_of", "join_features", "merge_features"]
