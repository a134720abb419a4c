"""What the model returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class NoteLLM2Output(ModelOutput):
    """
    Embeddings of a batch of `n` items.

    Args:
        loss (`torch.FloatTensor`, *optional*, returned with `return_loss=True`): scalar float32, the weighted mean of
            the two losses below; without mICL the multimodal one.
        multimodal_loss (`torch.FloatTensor`, *optional*): scalar.
        visual_loss (`torch.FloatTensor`, *optional*): scalar, over the pairs whose both members have an image.
        embeddings (`torch.FloatTensor` of shape `(n, d)`): multimodal, L2-normalised, in the model's dtype.
        visual_embeddings (`torch.FloatTensor` of shape `(n, d)`, *optional*): of the images alone, with mICL only;
            zeros for items without one.
        has_image (`torch.BoolTensor` of shape `(n,)`): which rows of `visual_embeddings` are filled.
        hidden_states (`tuple` of `torch.FloatTensor` `(n, length, width)`, *optional*): of the LLM, with
            `output_hidden_states=True`.
        attentions (`tuple` of `torch.FloatTensor` `(n, heads, length, length)`, *optional*): of the LLM, with
            `output_attentions=True` (eager attention only).
        logit_scale (`torch.FloatTensor` of shape `(1,)`): logarithm of the factor on the similarities, for a loss
            outside of the model. Where weights are spread over processes, the parameter can be read in here only.
        vision_hidden_states (`torch.FloatTensor` of shape `(images, tokens, vision width)`, *optional*),
        vision_pooler_output (`torch.FloatTensor` of shape `(images, vision width)`, *optional*),
        vision_attention_mask (`torch.LongTensor` of shape `(images, tokens)`, *optional*) and
        vision_grids (`torch.LongTensor` of shape `(images, 3)`, *optional*):
            of the vision encoder, as `forward` takes them back; with `output_vision_features=True`.
        states (`torch.FloatTensor` of shape `(n, LLM width)`, *optional*),
        visual_states (`torch.FloatTensor` of shape `(n, LLM width)`, *optional*, with mICL only) and
        summary (`torch.FloatTensor` of shape `(n, vision width)`, *optional*):
            what `finish` makes the embeddings of: read-outs of the LLM, standardized where the model does that, and the mean
            summary feature of an item's images (zeros without one; None in a batch without images); with `output_states=True`.
    """

    loss: torch.Tensor | None = None
    multimodal_loss: torch.Tensor | None = None
    visual_loss: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    visual_embeddings: torch.Tensor | None = None
    has_image: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    logit_scale: torch.Tensor | None = None
    vision_hidden_states: torch.Tensor | None = None
    vision_pooler_output: torch.Tensor | None = None
    vision_attention_mask: torch.Tensor | None = None
    vision_grids: torch.Tensor | None = None
    states: torch.Tensor | None = None
    visual_states: torch.Tensor | None = None
    summary: torch.Tensor | None = None


__all__ = ["NoteLLM2Output"]
