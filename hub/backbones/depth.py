"""How many layers of an LLM an item's embedding needs, before anything is trained: `--text_layers auto`.

The items of the train pairs are read once through the frozen LLM. At each depth a closed-form linear map is fitted to the pairs
of one half of the items (whitening by the differences of partners, as within-class covariance normalisation does), and the
pairs of the other half say how well related items find each other. The last token gathers an item only in a deep layer; the
mean of the tokens is often as good after a third of them.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_notellm2 import NoteLLM2Processor
from modeling_notellm2.inputs_notellm2 import last_position, states_at
from modeling_notellm2.language_notellm2 import understood
from modeling_notellm2.readout_notellm2 import mean_of
from training.tables.items import ItemTable


MOST_ITEMS = 4000
"""Items that are read; more tell no more."""
LEAST_PAIRS = 50
BATCH = 32
NEAREST = 10
RIDGE = 0.1
"""Share of the mean variance that is added to each direction's."""


@dataclass(frozen=True)
class Depths:
    """How well related items find each other at each depth, from no layer to all of them.

    Attributes:
        recall: recall@10 among the held-out half of the items, for each number of layers.
        error: standard error of each over the queries.
    """

    recall: list[float]
    error: list[float]

    @property
    def chosen(self) -> int:
        """The fewest layers, one at least, that are not worse than the best number by more than a standard error."""
        best = int(np.argmax(self.recall[1:])) + 1
        enough = self.recall[best] - self.error[best]
        return next(number for number, recall in enumerate(self.recall) if number and recall >= enough)

    def __str__(self) -> str:
        total, chosen = len(self.recall) - 1, self.chosen
        best = max(self.recall[1:])
        return (
            f"text_layers auto: the first {chosen} of {total} layers. Recall@{NEAREST} of held-out train pairs by a linear map "
            f"of the frozen texts: {self.recall[chosen]:.3f}; best {best:.3f}, all layers {self.recall[-1]:.3f}."
        )


def measure_depths(
    model: PreTrainedModel, processor: NoteLLM2Processor, items: ItemTable, pairs: np.ndarray, readout: str, seed: int
) -> Depths:
    """Measure each depth of a frozen LLM by the texts of related items.

    Args:
        model: a headless decoder.
        processor: makes the prompts.
        pairs: `(n, 2)` integer positions in `items`.
        readout: "last" or "mean", as `NoteLLM2Config.readout`.
        seed: of the items that are read and of the two halves.

    Raises:
        ValueError: when a half has too few pairs.
    """
    generator = np.random.default_rng(seed)
    read = generator.permutation(np.unique(pairs))[:MOST_ITEMS]
    place = np.full(len(items), -1)
    place[read] = np.arange(len(read))
    pairs = place[pairs]
    pairs = pairs[(pairs >= 0).all(1)]
    fitted, held_out = (torch.from_numpy(pairs[(pairs % 2 == half).all(1)]) for half in (0, 1))  # `read` is in no order
    if min(len(fitted), len(held_out)) < LEAST_PAIRS:
        raise ValueError(
            f"--text_layers auto needs {LEAST_PAIRS} pairs within each half of the items, and --train_pairs has "
            f"{len(fitted)} and {len(held_out)}. Name the layers yourself, as in --text_layers 0-7."
        )
    states = frozen_states(model, processor, [items[int(number)] for number in read], readout)
    measured = [recall_of(whitened(layer, fitted), held_out) for layer in states]
    recalls, errors = zip(*measured, strict=True)
    return Depths(list(recalls), list(errors))


@torch.no_grad()
def frozen_states(
    model: PreTrainedModel, processor: NoteLLM2Processor, items: list[dict], readout: str
) -> torch.Tensor:
    """What the read-out gives of each item's texts after each number of layers: `(layers + 1, n, width)` float32.

    Each token's state has unit length, as a final norm would scale it.
    """
    parts = []
    for start in tqdm(range(0, len(items), BATCH), desc="Reading texts", unit="batch"):
        texts = [{key: value for key, value in item.items() if key != "image"} for item in items[start : start + BATCH]]
        inputs = processor(texts, return_tensors="pt").to(model.device)
        mask = inputs["attention_mask"]
        wanted = understood(model, {"use_cache": False, "return_dict": True, "output_hidden_states": True})
        layers = model(input_ids=inputs["input_ids"], attention_mask=mask, **wanted).hidden_states
        last = last_position(mask)
        units = (F.normalize(layer.float(), dim=-1) for layer in layers)
        read = [mean_of(unit, mask.bool()) if readout == "mean" else states_at(unit, last) for unit in units]
        parts.append(torch.stack(read).cpu())
    return torch.cat(parts, dim=1)


def whitened(states: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """States `(n, width)` in directions in which partners differ alike, unit length: what differs little counts more."""
    centred = F.normalize(states - states.mean(0), dim=-1)
    difference = centred[pairs[:, 0]] - centred[pairs[:, 1]]
    covariance = difference.T @ difference / len(pairs)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    values, vectors = torch.linalg.eigh(covariance)
    scale = values.clamp(min=torch.finfo(values.dtype).eps).rsqrt()
    return F.normalize(centred @ (vectors * scale), dim=-1)


def recall_of(vectors: torch.Tensor, pairs: torch.Tensor) -> tuple[float, float]:
    """Share of the pairs whose target is among the ten nearest of the query, the mean over queries, and its standard error.

    Candidates are all members of the pairs but the query. A tie counts against the target.
    """
    queries, of_query = pairs[:, 0].unique(return_inverse=True)
    pool, member = pairs.unique(return_inverse=True)
    similarity = vectors[queries] @ vectors[pool].T
    similarity[queries.unsqueeze(1) == pool] = -torch.inf
    target = member[:, 1]
    at_target = similarity[of_query, target].unsqueeze(1)
    before = (similarity[of_query] >= at_target).sum(1) - 1
    reached = torch.zeros(len(queries)).index_add(0, of_query, (before < NEAREST).float())
    share = reached / torch.bincount(of_query)
    return float(share.mean()), float(share.std() / len(queries) ** 0.5)
