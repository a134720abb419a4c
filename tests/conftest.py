"""Fixtures of several folders of tests: tiny models, tables of coloured pictures, an encoded catalogue, the stand-in Hub."""

import io
import json
import multiprocessing
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from hub.encode import encode
from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from tests.support.catalogue import arguments, make_items, messy_rows, png, write_items
from tests.support.hub_server import HubServer
from tests.support.models import make_model


@pytest.fixture
def tiny_model() -> NoteLLM2Model:
    return make_model()[0]


@pytest.fixture
def tiny_processor() -> NoteLLM2Processor:
    return make_model()[1]


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    """A saved folder with model, processor and code. Don't write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model, processor = make_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


COLOURS = ["red", "green", "blue", "white", "black", "orange"]


def picture(colour: str, seed: int) -> bytes:
    """Left half in the colour, right half in one of many: only training tells which half counts."""
    other = tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist())
    image = Image.new("RGB", (32, 32), other)
    image.paste(Image.new("RGB", (16, 32), colour), (0, 0))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def title(colour: str, seed: int) -> str:
    letters = np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz"), 8)
    return f"{colour} {''.join(letters)}"


@pytest.fixture(scope="session")
def coloured_tables(tmp_path_factory):
    """144 items in six colours, half of them for the evaluation; one has no image, one a broken image."""
    folder = tmp_path_factory.mktemp("tables")
    items = []
    for number in range(144):
        colour = COLOURS[number % 6]
        image = {"bytes": picture(colour, number), "path": None} if number != 7 else None
        split = "train" if number < 72 else "test"
        items.append(
            {"item_id": f"i{number}", "title": title(colour, number), "image": image, "colour": colour, "split": split}
        )
    broken = {"bytes": picture("red", 0)[:50], "path": None}
    items.append({"item_id": "broken", "title": "broken", "image": broken, "colour": "red", "split": "train"})
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("item_id", "title", "colour", "split")}
        | {"image": datasets.Image(decode=False)}
    )
    datasets.Dataset.from_list(items, features=features).to_parquet(folder / "items.parquet")
    for name, start in (("train", 0), ("test", 72)):
        rows = [
            {"query_id": f"i{start + a}", "target_id": f"i{start + a + 6 * step}", "colour": COLOURS[a % 6]}
            for step in (1, 2, 3)
            for a in range(72 - 6 * step)
        ]
        if name == "train":
            rows += [{"query_id": "i0", "target_id": bad, "colour": "red"} for bad in ("broken", "nowhere", "i0")]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    """Seventy good rows of all shapes."""
    return write_items(make_items(70), tmp_path_factory.mktemp("table") / "items.parquet")


@pytest.fixture(scope="session")
def messy(tmp_path_factory) -> Path:
    """A table of JSON lines with every kind of fault."""
    folder = tmp_path_factory.mktemp("messy")
    (folder / "fine.png").write_bytes(png(1))
    (folder / "cut.png").write_bytes(png(2)[:-300])
    lines, _ = messy_rows()
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder / "items.jsonl"


@pytest.fixture(scope="session")
def messy_encoded(messy, tiny_model_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("messy_encoded") / "shards"
    encode(arguments(tiny_model_folder, messy, output))
    return output


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have all commands imported already, and nothing of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.jobs"])
    return context


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A stand-in for the Hub."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def at_hub(hub, tmp_path, monkeypatch):
    """This process and those that it starts take the stand-in for the Hub, with an empty cache."""
    for name, value in {**hub.environment, "HF_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    constants = {"ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.chdir(tmp_path)
    hub.log.clear()
    return hub
