"""Adapters, data sets and the app by way of the stand-in for the Hub."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from transformers import AutoModel, AutoProcessor

from hub.encode import encode
from hub.index import BuildArguments, build
from hub.publish import PublishArguments, publish
from hub.publishing.checks import RefusedError
from hub.publishing.sending import Destination, Publication, push
from tests.conftest import picture
from tests.support.catalogue import arguments
from tests.support.hub_client import PREAMBLE, ROOT, environment, run_fresh
from tests.support.hub_server import Handler
from training.run import run
from training.trainer.arguments import parse


pytestmark = pytest.mark.slow
QUIET = Console(quiet=True)


@pytest.fixture
def base(at_hub, tiny_model_folder) -> str:
    """The tiny model under a name."""
    files = {path.name: path for path in tiny_model_folder.iterdir()}
    push(Publication("model", files), Destination("org/base"))
    return "org/base"


ADAPTER = (
    PREAMBLE
    + """
from huggingface_hub import HfApi

found["adapter"] = embed(
    AutoModel.from_pretrained("org/adapter", trust_remote_code=True),
    AutoProcessor.from_pretrained("org/adapter", trust_remote_code=True),
)
other = {"cache_dir": "other", "adapter_kwargs": {"cache_dir": "other"}}
AutoModel.from_pretrained("org/adapter", trust_remote_code=True, **other)
for name, cache in (("good", None), ("tampered", "other")):
    checked = [HfApi().verify_repo_checksums(repo, cache_dir=cache) for repo in ("org/adapter", "org/base")]
    found[name] = [[file["path"] for file in repo.mismatches] for repo in checked]
print(json.dumps(found))
"""
)


def test_an_adapter_alone_finds_its_base_by_name(at_hub, base, coloured_tables, tiny_model_folder, tmp_path):
    options = [
        "--model",
        str(tiny_model_folder),
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
        "--max_steps",
        "3",
    ]
    options += ["--items", f"{coloured_tables}/items.parquet", "--train_pairs", f"{coloured_tables}/train.jsonl"]
    options += ["--lora_r", "4", "--learning_rate", "0.05", "--connector_learning_rate", "0.05"]
    run(*parse(options))
    adapter = tmp_path / "run" / "model"
    with pytest.raises(RefusedError, match="found on this machine alone. Publish the base and name it with --base"):
        publish(PublishArguments("org/adapter", model=str(adapter)), QUIET)
    assert ("model", "org/adapter") not in at_hub.store.repos

    publish(PublishArguments("org/adapter", model=str(adapter), base=base), QUIET)
    files = at_hub.repo("org/adapter").find("main").files
    assert "model.safetensors" not in files and "adapter_model.safetensors" in files
    card = at_hub.store.path(files["README.md"].key).read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] in (base, [base])
    assert str(tmp_path) not in card

    weights, asked = files["adapter_model.safetensors"].sha256, []

    def tamper_the_second(on: Handler) -> bool:
        if on.path != f"/cdn/{weights}" or on.command != "GET":
            return False
        asked.append(on.path)
        content = on.hub.store.path(weights).read_bytes()
        if len(asked) > 1:
            on.send(content[:-400] + b"\1" * 400)
        return len(asked) > 1

    at_hub.intercept = tamper_the_second
    try:
        result = run_fresh(ADAPTER, at_hub, tmp_path)
    finally:
        at_hub.intercept = None
    merged = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model_folder), adapter).merge_and_unload().eval()
    plain = AutoModel.from_pretrained(tiny_model_folder).eval()
    items = [{"title": "a", "image": Image.open(tmp_path / "picture.png")}, "a text alone"]
    inputs = AutoProcessor.from_pretrained(tiny_model_folder)(items, return_tensors="pt")
    with torch.no_grad():
        expected, untrained = merged(**inputs).embeddings, plain(**inputs).embeddings
    torch.testing.assert_close(torch.tensor(result["adapter"]), expected, atol=1e-5, rtol=0)
    assert (expected - untrained).abs().max() > 1e-2
    assert result["good"] == [[], []]
    assert result["tampered"] == [["adapter_model.safetensors"], []]


TRAIN = """
import sys
from dataclasses import replace
from pathlib import Path
from datasets import load_dataset
from training.run import main
from training.tables.items import load_items

items = load_dataset("org/data", "items", split="train")
assert items[0]["image"].size == (32, 32), items[0]
assert len(load_items("org/data:items")[0]) == len(items) == 144
main()
"""


def test_a_data_set_is_read_by_name_and_trains(at_hub, coloured_tables, tiny_model_folder, tmp_path):
    """144 of 145 items are usable; the pairs with the other one and with an unknown item are left out."""
    tables = {"items": f"{coloured_tables}/items.parquet", "pairs": f"{coloured_tables}/train.jsonl"}
    tables["test_pairs"] = f"{coloured_tables}/test.jsonl"
    publish(PublishArguments("org/data", dataset=True, license="cc0-1.0", made_by="Drawn.", **tables), QUIET)
    files = at_hub.repo("org/data", "dataset").find("main").files
    assert set(files) == {
        ".gitattributes",
        "README.md",
        *(f"data/{name}-00000.parquet" for name in ("items", "train_pairs", "test_pairs")),
    }
    rejects = [json.loads(line) for line in (tmp_path / "publish_rejects.jsonl").read_text().splitlines()]
    assert [(one["ids"], one["reason"].split("(")[0]) for one in rejects] == [
        (["broken"], "image can't be read "),
        (["i0", "broken"], "no published item 'broken'"),
        (["i0", "nowhere"], "no published item 'nowhere'"),
    ]
    card = at_hub.store.path(files["README.md"].key).read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert [config["config_name"] for config in head["configs"]] == ["items", "train_pairs", "test_pairs"]
    assert head["license"] == "cc0-1.0"
    assert "| items | train | 144 | 1 |" in card and "| image | " in card and "Drawn." in card
    published = pq.read_table(at_hub.store.path(files["data/items-00000.parquet"].key)).to_pylist()
    source = pq.read_table(tables["items"]).to_pylist()[:-1]
    assert [(row["item_id"], row["colour"], row["image"]) for row in published] == [
        (row["item_id"], row["colour"], row["image"] if row["image"] and row["image"]["bytes"] else None)
        for row in source
    ]

    command = [sys.executable, "-c", TRAIN, "--model", tiny_model_folder, "--items", "org/data:items"]
    command += ["--train_pairs", "org/data:train_pairs", "--eval_pairs", "org/data:test_pairs", "--eval_split", "test"]
    command += ["--label_column", "colour", "--output_dir", tmp_path / "run", "--use_cpu", "--max_steps", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(at_hub, tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads((tmp_path / "run" / "metrics.json").read_text())["counts"]
    assert (counts["items"], counts["eval_items"], counts["rejected_rows"]) == (144, 72, 1)  # i0 with itself
    assert (
        counts["train_pairs"] == len(pq.read_table(at_hub.store.path(files["data/train_pairs-00000.parquet"].key))) - 1
    )


def test_text_tables_become_a_data_set_with_their_pictures(at_hub, tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red", 1))
    rows = [
        {"item_id": "a", "title": "A", "topics": "x, y", "image": ["red.png", "red.png"], "price": 3},
        {"item_id": "b", "content": "B", "image": "gone.png"},
        {"item_id": "c", "content": "C", "shop": "s"},
        {"title": "no id"},
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (tmp_path / "pairs.csv").write_text("query_id,target_id,score\na,c,0.5\nc,a,1\nc,b,1\nc,a,much\n")
    shown = Console(record=True, width=120)
    publish(PublishArguments("org/text", dataset=True, items="items.jsonl", pairs="pairs.csv", dry_run=True), shown)
    text = shown.export_text()
    assert at_hub.log == [] and "data/items-00000.parquet" in text
    assert "the first 2 rows" in text and "red.png (" in text, "a sample of what goes is shown"
    publish(PublishArguments("org/text", dataset=True, items="items.jsonl", pairs="pairs.csv"), QUIET)
    files = at_hub.repo("org/text", "dataset").find("main").files
    items, pairs = (
        pq.read_table(at_hub.store.path(files[f"data/{name}-00000.parquet"].key)).to_pylist()
        for name in ("items", "train_pairs")
    )
    image = {"bytes": picture("red", 1), "path": "red.png"}
    assert items == [
        {
            "item_id": "a",
            "title": "A",
            "topics": ["x", "y"],
            "content": None,
            "image": [image, image],
            "price": "3",
            "shop": None,
        },
        {"item_id": "c", "title": None, "topics": None, "content": "C", "image": [], "price": None, "shop": "s"},
    ]
    assert pairs == [
        {"query_id": "a", "target_id": "c", "score": 0.5},
        {"query_id": "c", "target_id": "a", "score": 1.0},
    ]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "publish_rejects.jsonl").read_text().splitlines()]
    assert len(reasons) == 5 and "gone.png does not exist" in reasons[0] and "item_id is missing" in reasons[1]
    assert not (
        set(files) - {".gitattributes", "README.md", "data/items-00000.parquet", "data/train_pairs-00000.parquet"}
    )


SPACE = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.append(sys.argv[1])
import json, os, runpy
import gradio
from huggingface_hub import snapshot_download

started = {}
gradio.Blocks.launch = lambda page, **options: started.update(options, page=page)
os.chdir(snapshot_download("org/app", repo_type="space"))
sys.path.insert(0, os.getcwd())
runpy.run_path("app.py", run_name="__main__")
import hub.app
assert hub.app.__file__.startswith(os.getcwd()), hub.app.__file__
find = next(function.fn for function in started["page"].fns.values() if function.api_name == "find")
gallery, rows, status = find("n3", None, "river", "", "", True, True, 1.0, 5)
print("\\n" + json.dumps({"host": started["server_name"], "rows": rows, "status": status}))
"""


def test_the_space_starts_with_what_was_published(at_hub, base, table, tiny_model_folder, tmp_path):
    encode(arguments(tiny_model_folder, table, tmp_path / "vectors"))
    build(BuildArguments(str(tmp_path / "vectors"), str(tmp_path / "index")))
    wanted = {"space": True, "index": str(tmp_path / "index"), "items": str(table)}
    with pytest.raises(ValueError, match="Publish it first"):
        publish(PublishArguments("org/app", model=str(tiny_model_folder), **wanted), QUIET)
    publish(PublishArguments("org/app", model=base, **wanted), QUIET)
    space = at_hub.repo("org/app", "space")
    files = space.find("main").files
    assert space.sdk == "gradio"
    assert {
        "app.py",
        "README.md",
        "requirements.txt",
        "hub/app.py",
        "index/index.json",
        "items/items-00000.parquet",
    } <= set(files)
    assert {path.rpartition("/")[0] for path in files if path.startswith("training/")} == {
        "training",
        "training/tables",
        "training/tables/commands",
        "training/tables/remote",
    }
    assert not any(path.startswith("tests/") for path in files)
    head = yaml.safe_load(at_hub.store.path(files["README.md"].key).read_text().split("---")[1])
    assert (head["sdk"], head["app_file"], head["models"]) == ("gradio", "app.py", [base])
    assert re.search("^transformers", at_hub.store.path(files["requirements.txt"].key).read_text(), re.MULTILINE)

    result = run_fresh(SPACE, at_hub, tmp_path)
    assert result["host"] == "0.0.0.0"
    assert len(result["rows"]) == 5 and "70 items" in result["status"]


def test_a_data_set_carries_no_metadata_no_secrets_and_no_files_from_elsewhere(at_hub, tmp_path, tmp_path_factory):
    exif = Image.Exif()
    exif[0x013B], exif[0x8825] = "an artist", {1: "N", 2: (52.0, 30.0, 0.0)}
    notes = PngInfo()
    notes.add_text("Comment", "a token")
    colours = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.jpg", exif=exif, comment=b"a comment", quality=95)
    Image.fromarray(colours).save(tmp_path / "b.png", pnginfo=notes, exif=exif)
    outside = tmp_path_factory.mktemp("elsewhere") / "c.png"
    Image.fromarray(colours).save(outside)
    rows = [
        {"item_id": "a", "title": "A", "image": "a.jpg"},
        {"item_id": "b", "title": "B", "image": "b.png"},
        {"item_id": "c", "title": "C", "image": str(outside)},
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pairs.csv").write_text("query_id,target_id\na,b\n")
    wanted = PublishArguments("org/clean", dataset=True, items="items.jsonl", pairs="pairs.csv")
    publish(wanted, QUIET)
    files = at_hub.repo("org/clean", "dataset").find("main").files
    items = pq.read_table(at_hub.store.path(files["data/items-00000.parquet"].key)).to_pylist()
    assert [(item["item_id"], item["image"]["path"]) for item in items] == [("a", "a.jpg"), ("b", "b.png")]
    for item in items:
        picture_alone = Image.open(io.BytesIO(item["image"]["bytes"]))
        assert not picture_alone.getexif() and not {"comment", "Comment", "exif"} & picture_alone.info.keys()
        assert not any(word in item["image"]["bytes"] for word in (b"artist", b"comment", b"Comment"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(items[1]["image"]["bytes"]))), colours)
    assert "lies outside the table's folder" in (tmp_path / "publish_rejects.jsonl").read_text()
    publish(replace(wanted, repo="org/all", pictures_anywhere=True), QUIET)
    files = at_hub.repo("org/all", "dataset").find("main").files
    assert len(pq.read_table(at_hub.store.path(files["data/items-00000.parquet"].key))) == 3

    rows[1]["topics"] = ["x", "hf_" + "a" * 34]
    rows[0]["shop"] = f"see {Path.home()}/notes.txt"
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RefusedError) as refused:
        publish(replace(wanted, repo="org/leaky"), QUIET)
    assert [(fault.file, fault.what.split(",")[0]) for fault in refused.value.faults] == [
        ("items, 'a', column shop", "a path of this machine"),
        ("items, 'b', column topics", "what looks like a Hugging Face token"),
    ]
    assert "leaky" not in str(at_hub.log)
