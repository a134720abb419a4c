"""Item-to-item recall as a module of `evaluate`: `evaluate.load("hub/metrics/i2i_recall")`, offline too.

It stands alone, as `evaluate` copies this one file, and needs numpy only. Ranks are counted in tiles, never sorted. Scores are
computed in float64; a candidate within `TIE` of a target's score counts as standing before it.
"""

import datasets
import evaluate
import numpy as np


TIE = 1e-10
TILE = 2048
CITATION = """\
@inproceedings{notellm2,
  title={NoteLLM-2: Multimodal Large Representation Models for Recommendation},
  author={Zhang, Chao and Zhang, Haoxin and Wu, Shiwei and others},
  booktitle={KDD}, year={2025}, note={arXiv:2405.16789}
}"""
DESCRIPTION = """\
How high the items that users consumed together with an item stand among all candidates, by dot product of embeddings.
Ties count against the model."""
INPUTS = """
Args:
    predictions: n embeddings of d floats, one for each item. Finite; of unit length for cosine similarity.
    references: n different item ids, in the same order.
    pairs: (query id, target id) in order; pairs of items that have no embedding are skipped and counted.
    k: cut-offs of recall@k, default [1, 10, 100].
    protocol:
        "published" (default): NoteLLM-2's. Walk the pairs in order and skip one whose member stood in an earlier kept pair.
            Queries are the first members, candidates all items that are no query; each query has one target.
        "multi_positive": every first member is a query, all its targets are right answers, candidates are all other items.
            recall@k is the share of a query's targets among its first k candidates, averaged over the queries.
    tile: queries and candidates handled at once; bounds the memory (2048: 32 MB).
Returns:
    recall@k for every k; hit_rate@k (multi_positive: share of queries with a target among the first k); mrr, of each query's
    best target; queries, candidates, unknown_pairs and repeated_pairs.
Raises:
    ValueError: for embeddings and ids that don't fit together, embeddings that are not finite, another protocol, or no usable
    pair.
Example:
    >>> metric = evaluate.load("hub/metrics/i2i_recall")
    >>> metric.compute(predictions=[[1, 0], [0.6, 0.8], [0, 1]], references=["a", "b", "c"], pairs=[("a", "b")], k=[1])
    {'recall@1': 1.0, 'mrr': 1.0, 'queries': 1, 'candidates': 2, 'unknown_pairs': 0, 'repeated_pairs': 0}
"""


class I2IRecall(evaluate.Metric):
    """`compute(predictions=embeddings, references=item_ids, pairs=pairs, k=[1, 10, 100], protocol="published")`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, pairs, k=(1, 10, 100), protocol="published", tile=TILE):
        embeddings, row_of = _check(predictions, references, k, tile)
        choose = {"published": _published, "multi_positive": _multi_positive}
        if protocol not in choose:
            raise ValueError(f"protocol is {protocol!r}; expected one of {', '.join(choose)}.")
        targets, in_pool, skipped = choose[protocol](pairs, row_of)
        ranks = _ranks(embeddings, targets, in_pool, tile)
        many = protocol == "multi_positive"
        results = {f"recall@{cut}": float(np.mean([(own <= cut).mean() for own in ranks])) for cut in k}
        if many:
            results |= {f"hit_rate@{cut}": float(np.mean([(own <= cut).any() for own in ranks])) for cut in k}
        results["mrr"] = float(np.mean([1 / own.min() for own in ranks]))
        pool = int(in_pool.sum()) - many  # a query is no candidate of its own
        return {**results, "queries": len(targets), "candidates": pool, **skipped}


def _check(predictions, references, k, tile):
    """Embeddings `(n, d)` float32 and the row of each id."""
    if any(cut < 1 for cut in k) or tile < 1:
        raise ValueError(f"k and tile must be at least 1; got {list(k)} and {tile}.")
    widths = {len(row) for row in predictions}
    if len(widths) != 1 or 0 in widths:
        raise ValueError(f"Embeddings must have one width; got {sorted(widths)}.")
    row_of = {item_id: row for row, item_id in enumerate(references)}
    if len(row_of) != len(predictions):
        raise ValueError(f"{len(predictions)} embeddings need as many different ids; got {len(row_of)}.")
    embeddings = np.asarray(predictions, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(embeddings).all(1))
    if len(bad):
        raise ValueError(f"{len(bad)} of {len(embeddings)} embeddings are not finite; the first is row {bad[0]}.")
    return embeddings, row_of


def _published(pairs, row_of):
    """The walk of the published protocol: one target of each query, and who is a candidate."""
    targets_of: dict[int, list[int]] = {}
    seen: set[str] = set()
    unknown, repeated = 0, 0
    for query, target in pairs:
        if query not in row_of or target not in row_of:
            unknown += 1
        elif query in seen or target in seen or query == target:
            repeated += 1
        else:
            seen.update((query, target))
            targets_of[row_of[query]] = [row_of[target]]
    in_pool = np.ones(len(row_of), dtype=bool)
    in_pool[list(targets_of)] = False
    return _usable(targets_of, pairs), in_pool, {"unknown_pairs": unknown, "repeated_pairs": repeated}


def _multi_positive(pairs, row_of):
    """All targets of each query, and all items as candidates."""
    targets_of: dict[int, dict[int, None]] = {}
    unknown, repeated = 0, 0
    for query, target in pairs:
        if query not in row_of or target not in row_of:
            unknown += 1
            continue
        own = targets_of.setdefault(row_of[query], {})
        if query == target or row_of[target] in own:
            repeated += 1
        else:
            own[row_of[target]] = None
    targets = {query: list(own) for query, own in targets_of.items() if own}
    in_pool = np.ones(len(row_of), dtype=bool)
    return _usable(targets, pairs), in_pool, {"unknown_pairs": unknown, "repeated_pairs": repeated}


def _usable(targets, pairs):
    if not targets:
        raise ValueError(f"None of {len(pairs)} pairs can be used: do the pairs belong to these items?")
    return targets


def _ranks(embeddings, targets, in_pool, tile):
    """1-based ranks of each query's targets, worst case among ties.

    A target's rank is one more than the candidates not below it that are no targets of its query, and than the targets of
    its query above it.
    """
    ranks = []
    for queries in _groups(targets, tile):
        rows = np.repeat(np.arange(len(queries)), [len(targets[query]) for query in queries])
        columns = np.concatenate([targets[query] for query in queries]).astype(np.int64)
        vectors = embeddings[queries].astype(np.float64)
        scores = (vectors[rows] * embeddings[columns].astype(np.float64)).sum(1)
        before = np.zeros(len(columns), dtype=np.int64)
        for start in range(0, len(embeddings), tile):
            part = embeddings[start : start + tile].astype(np.float64)
            against = vectors @ part.T
            against[:, ~in_pool[start : start + tile]] = -np.inf
            for row, column in ((rows, columns), (np.arange(len(queries)), np.array(queries))):
                here = (column >= start) & (column < start + tile)
                against[row[here], column[here] - start] = -np.inf
            for first in range(0, len(columns), tile):
                some = slice(first, first + tile)
                before[some] += (against[rows[some]] >= scores[some, None] - TIE).sum(1)
        for number in range(len(queries)):
            own = rows == number
            place = np.argsort(np.argsort(-scores[own], kind="stable"), kind="stable")
            ranks.append(before[own] + place + 1)
    return ranks


def _groups(targets, tile):
    """Queries in groups of at most `tile` targets, or of one query."""
    group: list[int] = []
    size = 0
    for query, own in targets.items():
        if group and size + len(own) > tile:
            yield group
            group, size = [], 0
        group.append(query)
        size += len(own)
    if group:
        yield group
