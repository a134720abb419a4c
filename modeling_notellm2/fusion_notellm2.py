"""What is new behind the LLM: the scale of its states, and the gate that fuses the picture into an embedding."""

import torch
from torch import nn

from .configuration_notellm2 import NoteLLM2Config


class NoteLLM2Standardization(nn.Module):
    """Centres and scales states `(n, width)`, each direction by itself; as they are until `fit` has measured them.

    What was measured is never trained: where states are small, a step of the new parts' rate would leave them.
    """

    def __init__(self, config: NoteLLM2Config):
        super().__init__()
        self.mean: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("mean", torch.zeros(config.text_width))
        self.register_buffer("scale", torch.ones(config.text_width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden.to(self.mean.device, self.mean.dtype) - self.mean) * self.scale

    @property
    def is_fitted(self) -> bool:
        """Whether it has been fitted."""
        return bool(self.mean.any()) or not bool(torch.eq(self.scale, 1).all())

    @torch.no_grad()
    def fit(self, hidden: torch.Tensor) -> None:
        """Takes mean and deviation from states of items, `(n, width)`; a direction that doesn't vary is only centred.

        What varies less than bfloat16 can tell beside the mean is rounding, and is not scaled up further.
        """
        mean, deviation = hidden.float().mean(0), hidden.float().std(0)
        deviation = torch.maximum(deviation, torch.finfo(torch.bfloat16).eps * mean.abs())
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > 0, deviation, 1).reciprocal())


class NoteLLM2LateFusion(nn.Module):
    """Gates the vision encoder's summary feature into an embedding (paper, section 3.4).

    `v = W_v s`; `g = sigmoid(W_g [h ; v])`; `h' = g * h + (1 - g) * v`, element by element, without biases. One gate and
    one projection serve both embeddings.
    """

    def __init__(self, config: NoteLLM2Config):
        super().__init__()
        assert config.vision_hidden_size is not None
        width = config.text_width
        self.projection = nn.Linear(config.vision_hidden_size, width, bias=False)
        self.gate = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        visual = self.projection(summary)
        gate = torch.sigmoid(self.gate(torch.cat([hidden, visual], dim=-1)))
        return gate * hidden + (1 - gate) * visual


def mean_of_images(pooled: torch.Tensor, num_images: torch.Tensor) -> torch.Tensor:
    """Mean of the summary features `(images, vision width)` of each item's images, `(n, vision width)`; zeros without one."""
    num_images = num_images.to(pooled.device)
    owner = torch.arange(len(num_images), device=pooled.device).repeat_interleave(num_images)
    total = pooled.new_zeros(len(num_images), pooled.shape[-1]).index_add(0, owner, pooled[: len(owner)])
    return total / num_images.clamp(min=1).unsqueeze(-1).to(pooled.dtype)


__all__ = ["NoteLLM2LateFusion", "NoteLLM2Standardization", "mean_of_images"]
