"""The comparison of heads on a frozen LLM: what standardized states are worth where items differ little, and a run to the end."""

import numpy as np
import torch

from modeling_notellm2 import NoteLLM2Config
from training.batches.data import RunData
from training.experiments.frozen_heads import Head, interval, table, train_head
from training.tables.pairs import PairTable


GROUPS, MEMBERS, WIDTH = 24, 6, 32


def related():
    """States of items in groups, nearly all of which is alike in all; and pairs within groups."""
    generator = torch.Generator().manual_seed(0)
    code = torch.randn(GROUPS, WIDTH, generator=generator).repeat_interleave(MEMBERS, 0)
    states = 20 + 0.1 * code + 0.1 * torch.randn(GROUPS * MEMBERS, WIDTH, generator=generator)
    pairs = [(g * MEMBERS + a, g * MEMBERS + b) for g in range(GROUPS) for a in range(MEMBERS) for b in range(a)]
    groups = np.repeat(np.arange(GROUPS), len(pairs) // GROUPS).astype(np.int32)
    return states, PairTable(np.array(pairs, dtype=np.int32), groups)


def test_standardized_states_are_told_apart_sooner():
    states, pairs = related()
    config = NoteLLM2Config(vision_hidden_size=8, embedding_dim=16)
    data = RunData(None, pairs, None, None, None, None, None)
    summary = torch.zeros(len(states), 8)
    precision = []
    for standardize in (False, True):
        torch.manual_seed(0)
        head = Head(config, states, standardize)
        train_head(head, states, summary, data, steps=30, seed=0)
        vectors = head(states, None).detach()
        nearest = (vectors @ vectors.T).fill_diagonal_(-1).topk(MEMBERS - 1).indices // MEMBERS
        precision.append(float((nearest == torch.arange(len(states)).unsqueeze(1) // MEMBERS).float().mean()))
    assert precision[1] > precision[0] + 0.1


def test_the_table_gives_means_with_students_interval():
    lines = [
        {"model": "m", "readout": "mean", "standardized": True, "seed": seed, "text/recall@10": value}
        for seed, value in enumerate([0.1, 0.2, 0.3])
    ]
    assert interval([0.1, 0.2, 0.3]) == "0.200 ±0.248"
    assert "| m | mean | yes |  |  | 0.200 ±0.248 |  |" in table(lines)
