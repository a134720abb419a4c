"""Servers in processes of their own, and what AutoModel gives of items."""

from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from hub.encode import encode
from hub.index import BuildArguments, build
from tests.support.catalogue import arguments, write_items
from tests.support.server import serving
from tests.support.serving import SERVED_ITEMS


@pytest.fixture(scope="module")
def index(tiny_model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    items = write_items(SERVED_ITEMS, folder / "items.parquet")
    encode(arguments(tiny_model_folder, items, folder / "vectors"))
    build(BuildArguments(str(folder / "vectors"), str(folder / "index"), items=str(items)))
    return folder / "index"


@pytest.fixture(scope="module")
def server(tiny_model_folder, index):
    with serving(tiny_model_folder, "--index", index, "--name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def tight(tiny_model_folder):
    """Items wait 300 ms, four may wait, and little may be sent."""
    options = ["--wait_ms", 300, "--queue_items", 4, "--max_items", 4, "--max_body_mb", 1, "--max_pixels", 2000]
    with serving(tiny_model_folder, *options, "--max_characters", 100, "--body_seconds", 1) as running:
        yield running


@pytest.fixture(scope="module")
def by_auto_model(tiny_model_folder):
    """What AutoModel gives of items, each alone."""
    model = AutoModel.from_pretrained(tiny_model_folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tiny_model_folder, trust_remote_code=True)

    def embed(*items):
        with torch.inference_mode():
            outputs = [model(**processor([item], return_tensors="pt")) for item in items]
        return np.concatenate([output.embeddings.numpy() for output in outputs])

    return embed


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
