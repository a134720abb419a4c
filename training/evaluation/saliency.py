"""How much information each layer carries from picture, text and template to the embeddings (NoteLLM-2, section 2.5).

With A the attention probabilities of a head in layer l and L the contrastive loss of a batch of pairs, the flow from token
j to token i is

    I_l(i, j) = sum over heads of |A(i, j) * dL/dA(i, j)|

(Wang et al. 2023, "Label words are anchors"). For a read-out position i (the last token for the multimodal embedding, the
one before <IMG_EMB> for the visual embedding), S_v is the mean of I_l(i, j) over all items and their visual tokens j, S_t
over the tokens of the item's own texts, S_o over all others that i sees, itself too. Means, not sums, so that sixteen
visual tokens weigh no more than one for being many. They are reported as shares: S_v + S_t + S_o = 1 in each layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_notellm2.inputs_notellm2 import last_position, positions_of
from modeling_notellm2.prompts_notellm2 import WORDINGS, build_pieces
from modeling_notellm2.readout_notellm2 import read_tokens
from training.trainer.adapters import unwrap_adapter


KINDS = ("visual", "text", "other")
VISUAL, TEXT, OTHER = range(len(KINDS))
PADDING = -1

Item = Mapping[str, Any]
Shares = dict[str, list[float]]


@dataclass(frozen=True)
class Saliency:
    """Shares of the information flow into the read-outs, by kind of token and layer.

    Attributes:
        multimodal: "visual", "text" and "other" to a share for each layer, from the first to the last.
        visual: the same into the visual embedding, which stands before the text; None without mICL or images.
    """

    multimodal: Shares
    visual: Shares | None


def measure_saliency(
    model: Any,
    processor: Any,
    collate: Callable[[Sequence[Item]], dict[str, Tensor]],
    pairs: Sequence[tuple[Item, Item]],
    batch_pairs: int = 8,
) -> Saliency:
    """The shares over some pairs, in eval mode; the model is left as it was, without gradients.

    Memory is that of one batch: its attention probabilities, `layers * 2 * batch_pairs * heads * length^2` floats, once
    more for their gradients, and the graph.

    Args:
        model: NoteLLM-2, or one with LoRA around it.
        processor: the model's, with a fast tokenizer.
        collate: items to the model's inputs, one row each (`training.batches.collators.ItemCollator`).
        pairs: of related items; the loss of a batch takes the other pairs as negatives.

    Raises:
        ValueError: for a single pair, whose loss has no negatives, or a tokenizer without offsets.
    """
    if min(len(pairs), batch_pairs) < 2:
        raise ValueError(f"{len(pairs)} pair(s), {batch_pairs} in a batch, have no negatives; at least two are needed.")
    base = unwrap_adapter(model)
    totals = {name: _Means() for name in ("multimodal", "visual")}
    with _explaining(model, base):
        for batch in _batches(pairs, batch_pairs):
            items = [pair[0] for pair in batch] + [pair[1] for pair in batch]
            inputs = {name: value.to(base.device) for name, value in collate(items).items()}
            kinds = token_kinds(processor, items, inputs).to(base.device)
            flows = attention_flows(model, inputs)
            item, first = read_tokens(base.config, inputs["input_ids"], inputs["attention_mask"])
            totals["multimodal"].add(flows, kinds, torch.arange(len(items), device=base.device), item)
            if base.config.micl:
                slots = positions_of(inputs["input_ids"], base.config.visual_embedding_token_id)
                shown = slots.any(-1).nonzero().flatten()
                totals["visual"].add(flows, kinds, shown, first[shown])
    return Saliency(totals["multimodal"].shares(), totals["visual"].shares() if totals["visual"].any() else None)


def attention_flows(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """I_l of a batch that is read as pairs: for each layer `(n, length, length)`, from column to row, float32.

    The model must use eager attention, which alone gives probabilities.
    """
    output = model(**inputs, return_loss=True, output_attentions=True)
    gradients = torch.autograd.grad(output.loss, output.attentions)
    return [
        (attention.detach() * gradient).abs().sum(1).float()
        for attention, gradient in zip(output.attentions, gradients, strict=True)
    ]


def token_kinds(processor: Any, items: Sequence[Item], inputs: Mapping[str, Tensor]) -> Tensor:
    """What each token is: `(n, length)` int64 of VISUAL, TEXT (the item's own title, topics, content), OTHER, PADDING.

    Args:
        processor: made the inputs.
        inputs: `input_ids` and `attention_mask`, `(n, length)`.

    Raises:
        ValueError: for a tokenizer without offsets.
    """
    if not processor.tokenizer.is_fast:
        raise ValueError(
            f"{type(processor.tokenizer).__name__} gives no offsets of tokens; a fast tokenizer is needed."
        )
    kinds = torch.full(inputs["input_ids"].shape, PADDING)
    kinds[inputs["attention_mask"].bool().cpu()] = OTHER
    kinds[positions_of(inputs["input_ids"], processor.image_token_id).cpu()] = VISUAL
    ends = last_position(inputs["attention_mask"]).tolist()
    for row, (item, end) in enumerate(zip(items, ends, strict=True)):
        own = _own_text(processor, item, bool((kinds[row] == VISUAL).any()))
        kinds[row, end + 1 - len(own) : end + 1][own] = TEXT
    return kinds


def _own_text(processor: Any, item: Item, with_image: bool) -> Tensor:
    """Of the prompt's last stretch of text, which holds all fields: bool for each token, whether it is the item's own."""
    wording, text = WORDINGS[processor.prompt_language], processor.item_text(item)
    stretch = str(build_pieces(text, int(with_image), processor.prompt_mode, wording)[-1])
    spans, cursor = [], 0
    for label, value in ((wording.title, text.title), (wording.topics, text.topics), (wording.content, text.content)):
        start = stretch.index(label, cursor) + len(label)
        cursor = start + len(value)
        if value:  # a token of the template's alone, such as `""`, may reach over the place of an empty one
            spans.append((start, cursor))
    encoded = processor.tokenizer(
        stretch, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    return torch.tensor(
        [any(first < stop and start < last for start, stop in spans) for first, last in encoded["offset_mapping"]],
        dtype=torch.bool,
    )


def _batches(pairs: Sequence[tuple[Item, Item]], size: int) -> list[list[tuple[Item, Item]]]:
    """In order; a last one of a single pair goes with the one before."""
    batches = [list(pairs[start : start + size]) for start in range(0, len(pairs), size)]
    if len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


class _Means:
    """Running means of flows by layer and kind of source."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.counts = torch.zeros(len(KINDS), dtype=torch.float64)

    def any(self) -> bool:
        return self.sums is not None

    def add(self, flows: Sequence[Tensor], kinds: Tensor, rows: Tensor, read: Tensor) -> None:
        """Flows into the tokens that are `read` (bool) of each of some rows, from all tokens up to the last of them."""
        if not len(rows):
            return
        seen = torch.arange(kinds.shape[1], device=kinds.device) <= last_position(read).unsqueeze(-1)
        chosen = torch.stack([(kinds[rows] == kind) & seen for kind in range(len(KINDS))])
        weights = read.to(flows[0].dtype)
        into = torch.stack([torch.einsum("rij,ri->rj", flow[rows], weights) for flow in flows]).double()
        sums = torch.einsum("lrj,krj->lk", into, chosen.double()).cpu()
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts += chosen.sum((1, 2)).cpu()

    def shares(self) -> Shares:
        """A kind that no item has gets the share 0."""
        assert self.sums is not None
        means = self.sums / self.counts.clamp(min=1)
        shares = means / means.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        return {kind: shares[:, number].tolist() for number, kind in enumerate(KINDS)}


@contextmanager
def _explaining(model: Any, base: Any) -> Iterator[None]:
    """Eager attention, eval mode, and gradients that reach the attention of a frozen LLM too; all put back after."""
    llm = base.language_model
    was_training, implementation = model.training, llm.config._attn_implementation
    embeddings = base.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    try:
        llm.set_attn_implementation("eager")
        model.eval()
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        llm.set_attn_implementation(implementation)
        model.train(was_training)
