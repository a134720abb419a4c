"""Many threads with one model, one processor and one table, as a server has them: each gets what it would get alone."""

from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tests.conftest import picture
from tests.support.models import make_model
from training.tables.items import load_items


ROWS = [
    {"item_id": f"i{n}", "title": f"thing number {n} " + "x " * (n % 13), "content": "long text " * (n % 7)}
    | ({"image": picture("red", n)} if n % 3 else {})
    for n in range(60)
]


def in_threads(work, count=8):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def shuffled(seed):
    return np.random.default_rng(seed).permutation(len(ROWS))


def test_threads_embed_as_one_does():
    model, processor = make_model()
    model.eval()

    @torch.inference_mode()
    def embedded(places):
        parts = [[ROWS[place] for place in places[start : start + 3]] for start in range(0, len(places), 3)]
        return torch.cat([model(**processor(part, return_tensors="pt")).embeddings for part in parts])

    alone = embedded(range(len(ROWS)))
    for seed, embeddings in enumerate(in_threads(lambda seed: embedded(shuffled(seed)))):
        torch.testing.assert_close(embeddings, alone[shuffled(seed)], atol=2e-5, rtol=0)


def test_threads_encode_through_sentence_transformers(tiny_model_folder):
    encoder = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True, device="cpu")
    items = [{name: value for name, value in row.items() if name != "item_id"} for row in ROWS]
    alone = encoder.encode(items)
    encoded = in_threads(lambda seed: encoder.encode([items[place] for place in shuffled(seed)], batch_size=5), 4)
    for seed, embeddings in enumerate(encoded):
        np.testing.assert_allclose(embeddings, alone[shuffled(seed)], atol=2e-5, rtol=0)


@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_threads_read_one_table(end, tmp_path):
    rows = [{name: value for name, value in row.items() if end == "parquet" or name != "image"} for row in ROWS * 20]
    rows = [{**row, "item_id": f"{row['item_id']}-{number}"} for number, row in enumerate(rows)]
    table = datasets.Dataset.from_list(rows)
    getattr(table, {"parquet": "to_parquet", "jsonl": "to_json"}[end])(tmp_path / f"items.{end}")
    items, rejects = load_items(str(tmp_path / f"items.{end}"))
    assert len(items) == 1200 and not rejects

    def wrong(seed):
        places = np.random.default_rng(seed).permutation(len(items))[:300].tolist()
        return [place for place in places if items[place]["item_id"] != rows[place]["item_id"]]

    assert in_threads(wrong) == [[]] * 8
