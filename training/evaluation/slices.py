"""Which queries an average hides: slices of the published protocol's queries by what query and target are.

As in the paper's tables of short and long pairs, by length of text; further by what an item has (image, text), how often
training saw it, and its category. Every query is in exactly one slice of a group. Empty slices are left out.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling_notellm2.prompts_notellm2 import FieldLimits
from training.batches.false_negatives import TEXT_FIELDS
from training.batches.sampling import item_lengths
from training.evaluation.metrics import Bootstrap, intervals, single_target_metrics
from training.evaluation.retrieval import has_label
from training.tables.items import ItemTable
from training.tables.pairs import pair_positions


QUANTILES = (0.25, 0.75)
"""Without thresholds, a text of up to the lower quartile of its side (queries, targets) is short, one above the upper
quartile is long."""


@dataclass(frozen=True)
class ItemFacts:
    """What slices ask of items, by position.

    Attributes:
        characters: (n,) integer, characters of title, topics and content, as far as the processor reads them.
        has_text, has_image: (n,) bool.
        popularity: (n,) integer, train pairs that an item is in; None: not known.
        labels: (n) category of each, missing ones as `has_label` says; None: not known.
    """

    characters: np.ndarray
    has_text: np.ndarray
    has_image: np.ndarray
    popularity: np.ndarray | None = None
    labels: Sequence[Any] | None = None


@dataclass(frozen=True)
class Slice:
    """Some queries: `members` is (queries,) bool."""

    group: str
    name: str
    members: np.ndarray


def item_facts(
    items: ItemTable,
    limits: FieldLimits,
    popularity: np.ndarray | None = None,
    labels: Sequence[Any] | None = None,
) -> ItemFacts:
    """The facts of a table's items; `limits` are those of the processor."""
    present = items.fields_present()
    nothing = np.zeros(len(items), dtype=bool)
    has_text = np.any([present.get(field, nothing) for field in TEXT_FIELDS], axis=0)
    characters = np.where(has_text, item_lengths(items, limits, image_tokens=0), 0)
    return ItemFacts(characters, has_text, present.get("image", nothing), popularity, labels)


def count_in_pairs(source: str, items: ItemTable, encoding: str | None = None) -> np.ndarray:
    """(n,) int64: in how many pairs of a table each item is; pairs of other items are no fault here.

    Raises:
        TableError: as `training.tables.pairs.pair_positions`.
    """
    queries, targets = pair_positions(source, items, encoding).T
    counts = np.zeros(len(items), dtype=np.int64)
    for positions in (queries, targets[targets != queries]):  # a pair of one item with itself counts once
        counts += np.bincount(positions[positions >= 0], minlength=len(items))
    return counts


def query_slices(
    facts: ItemFacts,
    queries: np.ndarray,
    targets: np.ndarray,
    length_thresholds: Sequence[int] = (),
    top_categories: int = 10,
) -> list[Slice]:
    """All slices of some queries.

    Args:
        queries, targets: (q,) positions of items.
        length_thresholds: most characters of a short text, and of one of medium length; none: the quartiles of what
            the queries (or the targets) have, texts that are there alone.
        top_categories: categories with a slice of their own; the others are "rest".

    Raises:
        ValueError: for thresholds that are not two ascending numbers.
    """
    if length_thresholds and (len(length_thresholds) != 2 or length_thresholds[0] > length_thresholds[1]):
        raise ValueError(f"length_thresholds are two ascending numbers of characters; got {list(length_thresholds)}.")
    slices: list[Slice] = []
    for side, positions in (("query", queries), ("target", targets)):
        slices += _by_length(f"{side} text length", facts, positions, length_thresholds)
        slices += _by_fields(f"{side} fields", facts, positions)
        if facts.popularity is not None:
            slices += _by_popularity(f"{side} popularity", facts.popularity[positions])
    if facts.popularity is not None:
        slices += _by_novelty("unseen items", facts.popularity[queries] == 0, facts.popularity[targets] == 0)
    if facts.labels is not None:
        slices += _by_category("query category", [facts.labels[row] for row in queries.tolist()], top_categories)
    return [part for part in slices if part.members.any()]


def measure_slices(
    slices: Sequence[Slice], ranks: np.ndarray, ks: Sequence[int], options: Bootstrap
) -> Iterator[dict[str, Any]]:
    """Size of each slice, and recall@k of its queries with intervals; `ranks` is (queries,) int64."""
    for part in slices:
        metrics = single_target_metrics(ranks[part.members], ks)
        recall = {name: values for name, values in metrics.items() if name.startswith("recall@")}
        yield {
            "group": part.group,
            "slice": part.name,
            "queries": int(part.members.sum()),
            "metrics": intervals(recall, options),
        }


def _by_length(group: str, facts: ItemFacts, positions: np.ndarray, thresholds: Sequence[int]) -> list[Slice]:
    lengths, written = facts.characters[positions], facts.has_text[positions]
    slices = [Slice(group, "no text", ~written)]
    if not written.any():
        return slices
    limits = thresholds or np.quantile(lengths[written], QUANTILES, method="inverted_cdf")
    short, long = (int(limit) for limit in limits)
    return [
        *slices,
        Slice(group, f"short (up to {short} characters)", written & (lengths <= short)),
        Slice(group, f"medium ({short + 1} to {long} characters)", written & (lengths > short) & (lengths <= long)),
        Slice(group, f"long (over {long} characters)", written & (lengths > long)),
    ]


def _by_fields(group: str, facts: ItemFacts, positions: np.ndarray) -> list[Slice]:
    text, image = facts.has_text[positions], facts.has_image[positions]
    return [
        Slice(group, "image and text", text & image),
        Slice(group, "text only", text & ~image),
        Slice(group, "image only", ~text & image),
    ]


def _by_popularity(group: str, counts: np.ndarray) -> list[Slice]:
    """Items of no train pair, and the less and the more popular half of the others."""
    slices = [Slice(group, "in no train pair", counts == 0)]
    if (counts == 0).all():
        return slices
    middle = int(np.quantile(counts[counts > 0], 0.5, method="inverted_cdf"))
    return [
        *slices,
        Slice(group, f"in 1 to {middle} train pairs", (counts > 0) & (counts <= middle)),
        Slice(group, f"in over {middle} train pairs", counts > middle),
    ]


def _by_novelty(group: str, query: np.ndarray, target: np.ndarray) -> list[Slice]:
    return [
        Slice(group, "both seen in training", ~query & ~target),
        Slice(group, "query unseen", query & ~target),
        Slice(group, "target unseen", ~query & target),
        Slice(group, "both unseen", query & target),
    ]


def _by_category(group: str, labels: Sequence[Any], top: int) -> list[Slice]:
    names = np.array([str(label) if has_label(label) else "none" for label in labels])
    common = [name for name, _ in Counter(names.tolist()).most_common(top)]
    return [
        *(Slice(group, name, names == name) for name in common),
        Slice(group, "rest (all other categories)", ~np.isin(names, common)),
    ]
