"""The pair loss of NoteLLM-2: items that users consumed together attract, all others of the batch repel."""

import torch
import torch.nn.functional as F

from .configuration_notellm2 import NoteLLM2Config
from .outputs_notellm2 import NoteLLM2Output


def contrastive_pair_loss(embeddings: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """InfoNCE over a batch of pairs with both members as queries (NoteLLM-2 paper, equation 2).

    Row `i` and row `i + B` are a pair; each of the `2B` rows must find its partner among the `2B - 1` others:
    `S = E E^T * exp(logit_scale)`, the diagonal masked, cross-entropy against the partner, mean over the rows.

    Args:
        embeddings (`torch.Tensor` of shape `(2B, d)`, floating): L2-normalised; all first members, then all second
            members in the same order.
        logit_scale (`torch.Tensor` with one element): logarithm of the factor on the cosine similarities.

    Returns:
        `torch.Tensor`: scalar float32. A zero that still has a graph where there is no pair.

    Raises:
        ValueError: if the number of rows is odd.

    Example:

    ```python
    >>> import torch
    >>> from modeling_notellm2 import contrastive_pair_loss
    >>> a = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    >>> loss = contrastive_pair_loss(torch.cat([a, a]), torch.tensor(3.0))
    ```
    """
    rows = embeddings.shape[0]
    if rows % 2:
        raise ValueError(f"The pair loss needs an even number of rows (first members, then partners); got {rows}.")
    embeddings = embeddings.float()
    if rows == 0:
        return embeddings.sum() + 0 * logit_scale.float().sum()
    similarity = embeddings @ embeddings.T * logit_scale.float().exp()
    similarity = similarity.masked_fill(torch.eye(rows, dtype=torch.bool, device=similarity.device), float("-inf"))
    partner = torch.arange(rows, device=similarity.device).roll(rows // 2)
    return F.cross_entropy(similarity, partner)


def complete_pairs(present: torch.Tensor) -> torch.Tensor:
    """Rows of those pairs whose both members are present.

    Args:
        present (`torch.Tensor` of shape `(2B,)`, bool): e.g. which items have an image.

    Returns:
        `torch.Tensor` of shape `(2B',)`, int64: row indices, first members before partners, so that
        `embeddings[complete_pairs(present)]` is a batch of pairs again.
    """
    half = present.shape[0] // 2
    first = (present[:half] & present[half:]).nonzero().squeeze(-1)
    return torch.cat([first, first + half])


def add_losses(output: NoteLLM2Output, config: NoteLLM2Config, logit_scale: torch.Tensor) -> NoteLLM2Output:
    """Paper, section 3.3: (9 * multimodal + 1 * visual) / 10 with the default weights."""
    assert output.embeddings is not None
    assert output.has_image is not None
    multimodal_loss = contrastive_pair_loss(output.embeddings, logit_scale)
    output.loss = output.multimodal_loss = multimodal_loss
    if output.visual_embeddings is not None:
        rows = complete_pairs(output.has_image).to(output.visual_embeddings.device)
        visual_loss = contrastive_pair_loss(output.visual_embeddings[rows], logit_scale)
        visual, multimodal = config.visual_loss_weight, config.multimodal_loss_weight
        output.visual_loss = visual_loss
        output.loss = (multimodal * multimodal_loss + visual * visual_loss) / (visual + multimodal)
    return output


__all__ = ["add_losses", "complete_pairs", "contrastive_pair_loss"]
