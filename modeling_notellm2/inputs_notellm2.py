"""Where the slots of a batch are, and that they match its images: a mismatch is an error that names the row."""

import torch
from transformers import PreTrainedConfig

from .configuration_notellm2 import NoteLLM2Config


BATCHWISE_SCALINGS = ("dynamic", "longrope")
"""Kinds of rotary positions that follow the longest row of a batch."""


def positions_of(input_ids: torch.Tensor, token_id: int | None) -> torch.Tensor:
    """Where a token stands: bool, shaped as `input_ids`; nowhere for an id that is not set."""
    return torch.eq(input_ids, -1 if token_id is None else token_id)


def last_position(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of each row's last token, whichever side the padding is on: `(n, length)` to `(n,)`."""
    return (attention_mask.bool() * torch.arange(attention_mask.shape[1], device=attention_mask.device)).argmax(-1)


def states_at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hidden state of each row at its position: `(n, length, width)`, `(n,)` to `(n, width)`."""
    return hidden[torch.arange(len(hidden), device=hidden.device), positions.to(hidden.device)]


def check_padding(attention_mask: torch.Tensor, padding_side: str | None) -> None:
    """Raises ValueError, naming the row, if a batch is padded on the side that its LLM can't be padded on."""
    if padding_side is None or torch.compiler.is_compiling():
        return
    outer = attention_mask[:, -1] if padding_side == "left" else attention_mask[:, 0]
    wrong = (outer == 0).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"Row {wrong[0]} is padded on the other side than the {padding_side}, where alone this model's LLM reads padding "
            f'rightly. Pass padding_side="{padding_side}" to the processor, or leave it out.'
        )


def check_lengths(attention_mask: torch.Tensor, text_config: PreTrainedConfig) -> None:
    """Raises ValueError, naming the row, for a text beyond the length up to which an LLM's positions stay what they are.

    Some scalings of rotary positions ("dynamic", "longrope") change all of a batch's where its longest row passes that
    length, so that an item's embedding would depend on its neighbours.
    """
    if torch.compiler.is_compiling():
        return
    rope = getattr(text_config, "rope_parameters", None) or {}
    scalings = [scaling for scaling in (rope, *rope.values()) if isinstance(scaling, dict)]
    limits = [
        scaling.get("original_max_position_embeddings") or text_config.max_position_embeddings
        for scaling in scalings
        if scaling.get("rope_type") in BATCHWISE_SCALINGS
    ]
    lengths = attention_mask.sum(-1)
    wrong = (lengths > min(limits)).nonzero().flatten().tolist() if limits else []
    if wrong:
        raise ValueError(
            f"Row {wrong[0]} has {int(lengths[wrong[0]])} tokens; beyond {min(limits)} this LLM scales the positions of a whole "
            "batch, so that embeddings would depend on their neighbours. Lower the processor's limits on texts or max_pixels."
        )


def count_images(
    config: NoteLLM2Config,
    input_ids: torch.Tensor,
    num_images: torch.Tensor | None,
    total: int,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Images of each row, checked against placeholders, <IMG_EMB> and the images that came.

    Args:
        input_ids (`torch.LongTensor` of shape `(n, length)`).
        num_images (`torch.LongTensor` of shape `(n,)`, *optional*): as the processor counted them.
        total: images that came with the batch.
        tokens (`torch.LongTensor` of shape `(total,)`, *optional*): visual tokens of each image, where a native connector
            decides; not checked without.

    Returns:
        `torch.LongTensor` of shape `(n,)`.

    Raises:
        ValueError: naming the first row that does not match, or the config fields that are not set.
    """
    if not config.early_fusion:
        if num_images is None:
            num_images = input_ids.new_full((len(input_ids),), int(total > 0))
        _check_total(num_images, total)
        return num_images
    if config.image_token_id is None or (config.micl and config.visual_embedding_token_id is None):
        raise ValueError(
            "config.image_token_id and config.visual_embedding_token_id are not set: call "
            "`processor.prepare_model(model)` once after assembling the model."
        )
    placeholders = positions_of(input_ids, config.image_token_id).sum(-1)
    native = config.connector == "native"
    if num_images is None:
        if native:
            raise ValueError("num_images is missing: a native connector's placeholders don't say where an image ends.")
        num_images = placeholders // config.num_query_tokens
    read_outs = positions_of(input_ids, config.visual_embedding_token_id).sum(-1) if config.micl else None
    if not torch.compiler.is_compiling():
        expected = _tokens_of_rows(num_images, tokens) if native else num_images * config.num_query_tokens
        _check_placeholders(placeholders, placeholders if expected is None else expected, read_outs, num_images)
        _check_total(num_images, total)
    return num_images


def _tokens_of_rows(num_images: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor | None:
    """Visual tokens of each row's images, `(n,)`."""
    if tokens is None:
        return None
    owner = torch.arange(len(num_images)).repeat_interleave(num_images.cpu())[: len(tokens)]
    return torch.zeros(len(num_images), dtype=torch.long).index_add(0, owner, tokens.cpu()[: len(owner)])


def _check_placeholders(
    placeholders: torch.Tensor, expected: torch.Tensor, read_outs: torch.Tensor | None, num_images: torch.Tensor
) -> None:
    wrong = (placeholders != expected.to(placeholders.device)).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0]
        raise ValueError(
            f"Row {row} has {int(placeholders[row])} image placeholders but {int(num_images[row])} image(s), which need "
            f"{int(expected[row])}. Build inputs with the model's own processor, and don't truncate them."
        )
    if read_outs is None:
        return
    wrong = (read_outs != (num_images.to(read_outs.device) > 0).int()).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0]
        raise ValueError(
            f"Row {row} has {int(read_outs[row])} <IMG_EMB> token(s) and {int(num_images[row])} image(s): with mICL an "
            "item with images has exactly one and an item without has none. Use a processor with micl=True."
        )


def _check_total(num_images: torch.Tensor, total: int) -> None:
    counted = int(num_images.sum())
    if counted != total:
        last = int((num_images.cumsum(0) > total).int().argmax()) if counted > total else len(num_images) - 1
        raise ValueError(
            f"The rows ask for {counted} image(s) but {total} came; the first row without its images, or the last "
            f"row, is {last}. Pass pixel_values of all images of the batch, in order of the rows."
        )
