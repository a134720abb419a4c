"""One checkpoint of pictures and text as --text and --vision: assembled, trained, encoded, in sentence-transformers."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from hub import assemble, encode
from hub.cards.model import connector, read_model
from tests.support.catalogue import read_shards, vectors
from tests.support.native_models import saved_checkpoint
from training.run import run
from training.trainer.arguments import parse


@pytest.fixture(scope="module", params=["qwen3_vl", "smolvlm"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    saved_checkpoint(request.param, folder / "checkpoint")
    options = ["--embedding_dim", "16", "--prompt_language", "en", "--output", str(folder / "base")]
    assert assemble.main(["--text", str(folder / "checkpoint"), "--vision", str(folder / "checkpoint"), *options]) == 0
    return folder / "base"


def test_trained_encoded_and_in_sentence_transformers(base, coloured_tables, tmp_path):
    lora_r = "4" if "qwen" in str(base) else "0"
    options = f"""
        --model {base} --items {coloured_tables}/items.parquet --train_pairs {coloured_tables}/train.jsonl
        --output_dir {tmp_path}/run --cache_vision_features true
        --vision_cache_dir {tmp_path}/vision --max_steps 2 --per_device_train_batch_size 2 --chunk_size 3
        --learning_rate 2e-3 --use_cpu --dtype float32 --report_to none --lora_r {lora_r} --merge_adapter {lora_r != "0"}
    """.split()
    run(*parse(options))
    trained = tmp_path / "run" / "model"
    assert json.loads((trained / "config.json").read_text())["connector"] == "native"
    model = AutoModel.from_pretrained(trained, trust_remote_code=True).eval()
    before = AutoModel.from_pretrained(base, trust_remote_code=True).eval()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    llm = next(name for name, part in model.named_modules() if part is model.get_decoder())
    assert any(name.startswith(llm) for name in changed) and "late_fusion.gate.weight" in changed
    assert not any(name.startswith("language_model.") and not name.startswith(llm) for name in changed)

    items = [{"title": "red", "image": np.full((60, 90, 3), 200, np.uint8)}, {"title": "text alone"}]
    processor = AutoProcessor.from_pretrained(trained, trust_remote_code=True)
    with torch.no_grad():
        expected = model(**processor(items, return_tensors="pt")).embeddings.numpy()
    given = SentenceTransformer(str(trained), trust_remote_code=True).encode(items)
    assert np.abs(given - expected).max() < 2e-5
    table = pq.read_table(coloured_tables / "items.parquet").slice(0, 3)
    pq.write_table(table, tmp_path / "items.parquet")
    options = f"--model {trained} --items {tmp_path}/items.parquet --output {tmp_path}/vectors --dtype float32"
    assert encode.main(options.split()) == 0
    rows = table.to_pylist()
    with torch.no_grad():
        expected = model(**processor(rows, return_tensors="pt")).embeddings.numpy()
    encoded = read_shards(tmp_path / "vectors")
    assert encoded["item_id"].to_pylist() == [row["item_id"] for row in rows]
    assert np.abs(vectors(encoded) - expected).max() < 2e-5


def test_the_card_names_the_merger(base):
    assert connector(read_model(base).config).startswith("the checkpoint's own merger")


def test_options_that_contradict_it(base, tmp_path):
    checkpoint = str(base.parent / "checkpoint")
    both = ["--text", checkpoint, "--vision", checkpoint, "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--text_layers goes with --connector qformer"):
        assemble.main([*both, "--text_layers", "2"])
    with pytest.raises(SystemExit, match="needs one checkpoint of pictures and text"):
        assemble.main(["--text", checkpoint, "--output", str(tmp_path / "out"), "--connector", "native"])
    assert (
        assemble.main(
            [
                *both,
                "--connector",
                "qformer",
                "--qformer_layers",
                "1",
                "--qformer_hidden_size",
                "24",
                "--qformer_heads",
                "2",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["connector"] == "qformer"
    assert assemble.main([*both, "--connector", "mlp"]) == 0
    assert connector(read_model(tmp_path / "out").config).startswith("MLP on pooled patches, 16 visual tokens")
