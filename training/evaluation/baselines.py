"""What a trained model must beat: frozen features, and one linear map on them, under the same protocol as the model.

No LLM is used. The picture is the vision encoder's summary feature, the text is tf-idf over the character n-grams of the
title. The linear map is trained on the training pairs alone, with the model's own contrastive loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from tqdm.auto import tqdm

from modeling_notellm2 import contrastive_pair_loss


NGRAMS = (2, 4)
MAP_DIM = 64
MAP_STEPS = 400
MAP_PAIRS = 64
MAP_LEARNING_RATE = 1e-3


def baseline_embeddings(
    items: Sequence[Mapping[str, Any]], summary: Tensor, train_pairs: np.ndarray, seed: int
) -> dict[str, Tensor]:
    """Embeddings of all items by each baseline.

    Args:
        items: n items; a missing title is an empty one.
        summary: (n, width) floating, the frozen vision encoder's summary feature of each item.
        train_pairs: (m, 2) integer positions in `items`: query and target of the pairs to train on.
        seed: of the linear map.

    Returns:
        Name to (n, d) float32 of unit length: "frozen vision", "frozen text", "frozen both", "linear map".
        A row without any feature (an empty title) is zero.

    Raises:
        ValueError: when rows differ in number or no title has a character.
    """
    if len(summary) != len(items):
        raise ValueError(f"{len(items)} items need as many vision features; got {len(summary)}.")
    vision = F.normalize(summary.float(), dim=-1)
    text = title_features([item.get("title") or "" for item in items])
    both = F.normalize(torch.cat([vision, text], dim=1), dim=-1)
    return {
        "frozen vision": vision,
        "frozen text": text,
        "frozen both": both,
        "linear map": contrastive_linear_map(both, torch.from_numpy(train_pairs).long(), seed),
    }


def title_features(titles: Sequence[str]) -> Tensor:
    """Tf-idf of the character n-grams within words: (n, vocabulary) float32 of unit length.

    Document frequencies are those of all titles, held-out ones too: it favours the baseline.
    """
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=NGRAMS, sublinear_tf=True)
    return torch.from_numpy(vectorizer.fit_transform(titles).toarray()).float()


def contrastive_linear_map(
    features: Tensor,
    pairs: Tensor,
    seed: int,
    dim: int = MAP_DIM,
    steps: int = MAP_STEPS,
    batch_size: int = MAP_PAIRS,
    learning_rate: float = MAP_LEARNING_RATE,
) -> Tensor:
    """One linear map of the features, trained with the symmetric in-batch loss of `contrastive_pair_loss`.

    Args:
        features: (n, width) float32.
        pairs: (m, 2) int64 rows of `features`; only these rows are trained on.
        seed: of initialisation and of the batches, drawn at random from all pairs.

    Returns:
        (n, dim) float32 of unit length, for all n rows.

    Raises:
        ValueError: when there is no pair.
    """
    if not len(pairs):
        raise ValueError("The linear map needs pairs to train on.")
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(features.shape[1], dim, generator=generator) * features.shape[1] ** -0.5)
    logit_scale = nn.Parameter(torch.tensor(3.0))
    optimizer = torch.optim.AdamW([weight, logit_scale], lr=learning_rate)
    for _ in tqdm(range(steps), desc="Linear map", unit="step"):
        batch = pairs[torch.randint(len(pairs), (batch_size,), generator=generator)]
        embeddings = F.normalize(features[batch.T.reshape(-1)] @ weight, dim=-1)
        loss = contrastive_pair_loss(embeddings, logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(features @ weight.detach(), dim=-1)
