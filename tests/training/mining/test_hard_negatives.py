"""Mined negatives are near, below the ceiling, and never a known positive, the same item, picture or text."""

import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.tables.test_items import SCHEMA, png
from training.batches.false_negatives import KnownPositives
from training.hard_negatives import HardNegativesArguments, main
from training.mining.hard_negatives import Exclusions, mine_negatives
from training.tables.items import load_items
from training.tables.pairs import load_pairs


def test_negatives_are_those_of_a_look_at_each_candidate():
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(80, 4)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    pairs = generator.integers(0, 70, (200, 2)).astype(np.int32)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    images, texts = generator.integers(-1, 20, 80), generator.integers(-1, 40, 80)
    exclusions = Exclusions(KnownPositives(pairs, 80), images, texts)

    found = np.concatenate(list(mine_negatives(embeddings, pairs, exclusions, 3, ceiling=0.9, neighbours=80)))

    known = {tuple(pair) for pair in pairs.tolist()}
    similarity = embeddings @ embeddings.T
    for (query, target), negatives in zip(pairs.tolist(), found.tolist(), strict=True):
        limit = similarity[query, target] - 0.1 * abs(similarity[query, target])
        allowed = [
            candidate
            for candidate in np.argsort(-similarity[query]).tolist()
            if candidate in set(pairs.reshape(-1).tolist()) - {query, target}
            and not {(query, candidate), (candidate, query)} & known
            and similarity[query, candidate] <= limit
            and all(
                hashes[candidate] == -1 or hashes[candidate] not in hashes[[query, target]]
                for hashes in (images, texts)
            )
        ]
        assert negatives == (allowed + [-1] * 3)[:3]
    assert (found < 0).any()
    with pytest.raises(ValueError, match="ceiling"):
        HardNegativesArguments("m", "i", "p", "o", ceiling=1.2)


@pytest.mark.slow
def test_the_command_writes_pairs_that_training_reads(tmp_path, tiny_model_folder, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    colours = ["red", "green", "blue", "white", "black", "orange", "pink", "gold"]
    rows = [
        {"item_id": f"i{n}", "title": f"title {n}", "image": {"bytes": png(colour, 8 + n // 8), "path": None}}
        for n, colour in enumerate(colours * 4)
    ]
    rows.append({"item_id": "cut", "title": "title 3", "image": {"bytes": png("red", 9)[:40], "path": None}})
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "items.parquet")
    lines = [*(f"i{n},i{n + 1},{n}" for n in range(20)), "i1,cut,1", "cut,i2,1"]
    (tmp_path / "pairs.csv").write_text("query_id,target_id,score\n" + "\n".join([*lines, "i0,lost,1"]) + "\n")
    command = [sys.executable, "training/hard_negatives.py", "--model", tiny_model_folder, "--negatives", "2"]
    command += ["--items", tmp_path / "items.parquet", "--pairs", tmp_path / "pairs.csv"]

    done = subprocess.run(
        [*map(str, command), "--ceiling", "1", "--output", str(tmp_path / "hard.parquet")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )

    assert done.returncode == 0, done.stderr
    assert "20 pairs" in done.stdout
    assert "left out: 3" in done.stdout, "one with an unknown item, two with an item whose only picture can't be read"
    table = pq.read_table(tmp_path / "hard.parquet")
    assert table.column_names == ["query_id", "target_id", "score", "negative_1", "negative_2"]
    assert table["score"].to_pylist() == [str(n) for n in range(20)]
    items, _ = load_items(str(tmp_path / "items.parquet"))
    pairs, rejects = load_pairs(str(tmp_path / "hard.parquet"), items)
    assert pairs.negatives.shape == (20, 2)
    assert not rejects
    found = set(table["negative_1"].drop_null().to_pylist())
    assert found <= {f"i{n}" for n in range(21)}
    assert found
    monkeypatch.setattr(sys, "argv", [*map(str, command[1:]), "--output", "x", "--negatives", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "at least 1" in capsys.readouterr().err
