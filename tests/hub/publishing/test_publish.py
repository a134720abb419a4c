"""The round trip: published by the command to a stand-in for the Hub, loaded by name where nobody knows the project."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from rich.console import Console
from transformers import AutoModel, AutoProcessor

from hub.cards.writing import MARKER
from hub.publish import PublishArguments, publish
from hub.publishing.checks import RefusedError
from hub.publishing.model import ModelDetails, prepare_model
from hub.publishing.sending import Destination, Publication, push
from tests.support.hub_client import PREAMBLE, ROOT, environment, run_fresh
from tests.support.hub_server import Handler


pytestmark = pytest.mark.slow


def embeddings_of(folder: Path, picture_file: Path) -> list[list[float]]:
    model = AutoModel.from_pretrained(folder).eval()
    items = [{"title": "a", "image": Image.open(picture_file)}, "a text alone"]
    with torch.no_grad():
        return model(**AutoProcessor.from_pretrained(folder)(items, return_tensors="pt")).embeddings.tolist()


@pytest.fixture(scope="module")
def published(hub, tiny_model_folder, tmp_path_factory) -> str:
    """Commit of org/notellm2, published by the command."""
    folder = tmp_path_factory.mktemp("publish")
    command = [sys.executable, "hub/publish.py", "--model", tiny_model_folder, "--repo", "org/notellm2"]
    run = subprocess.run(
        [*command, "--license", "apache-2.0"], cwd=ROOT, env=environment(hub, folder), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    commit = hub.repo("org/notellm2").find("main").oid
    assert f"{hub.url}/org/notellm2/commit/{commit}" in run.stdout
    return commit


ROUND_TRIP = (
    PREAMBLE
    + """
from sentence_transformers import SentenceTransformer

name, good, newest = sys.argv[3:6]
found["untrusted"] = error_of(lambda: AutoModel.from_pretrained(name))
found["untrusted processor"] = error_of(lambda: AutoProcessor.from_pretrained(name, trust_remote_code=False))
found["newest code"] = error_of(lambda: AutoModel.from_pretrained(name, trust_remote_code=True))
trusted = {"trust_remote_code": True, "revision": good, "code_revision": good}
model = AutoModel.from_pretrained(name, **trusted)
processor = AutoProcessor.from_pretrained(name, **trusted)
found["pinned"] = embed(model, processor)
other = AutoModel.from_pretrained(name, trust_remote_code=True, revision=newest, code_revision=good)
found["newest weights, pinned code"] = embed(other, processor)
encoder = SentenceTransformer(name, trust_remote_code=True, revision=good, device="cpu")
found["sentence-transformers"] = encoder.encode(items, batch_size=2).tolist()

model.push_to_hub("org/pushed", max_shard_size="200KB")
processor.push_to_hub("org/pushed")
again = AutoModel.from_pretrained("org/pushed", trust_remote_code=True)
found["pushed"] = embed(again, AutoProcessor.from_pretrained("org/pushed", trust_remote_code=True))
encoder = SentenceTransformer("org/pushed", trust_remote_code=True, device="cpu")
found["pushed, sentence-transformers"] = encoder.encode(items, batch_size=2).tolist()
print("\\n" + json.dumps(found))  # transformers' question stands before it, without an end of line
"""
)


def test_what_is_published_loads_by_name_anywhere(hub, published, tiny_model_folder, tmp_path):
    """In one commit, pinned by revision and code_revision, after main has moved to code that fails."""
    repo = hub.repo("org/notellm2")
    assert [commit.title for commit in repo.history()] == [Destination.message, "initial commit"]
    files = repo.find(published).files
    assert {"LICENSE", "README.md", "config.json", "model.safetensors", "modules.json", "modeling_notellm2.py"} <= set(
        files
    )
    assert files["model.safetensors"].sha256

    broken = hub.store.add(b"raise RuntimeError('the newest code')")
    newest = hub.store.commit(repo, "refs/heads/main", "worse", {**files, "modeling_notellm2.py": broken}).oid
    try:
        result = run_fresh(ROUND_TRIP, hub, tmp_path, "org/notellm2", published, newest)
    finally:
        hub.store.commit(repo, "refs/heads/main", "mended", files)

    pushed = hub.repo("org/pushed").find("main").files
    shards = [name for name in pushed if name.endswith(".safetensors")]
    assert len(shards) > 1 and "model.safetensors.index.json" in pushed
    assert set(pushed) - {*shards, "model.safetensors.index.json"} == set(files) - {"LICENSE", "model.safetensors"}

    expected = embeddings_of(tiny_model_folder, tmp_path / "picture.png")
    assert "trust_remote_code=True" in result["untrusted"]
    assert "trust_remote_code=True" in result["untrusted processor"]
    assert "the newest code" in result["newest code"]
    for way in (
        "pinned",
        "newest weights, pinned code",
        "sentence-transformers",
        "pushed",
        "pushed, sentence-transformers",
    ):
        assert result[way] == expected, way


FAULTS = (
    PREAMBLE
    + """
import huggingface_hub.constants
from huggingface_hub import HfApi
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 50_000  # else small files are written at once, and never in part

def load(cache):
    return AutoModel.from_pretrained("org/notellm2", trust_remote_code=True, revision=sys.argv[3], cache_dir=cache)

def fault(name):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/fault/{name}")

def damaged_files(cache):
    checked = HfApi().verify_repo_checksums("org/notellm2", revision=sys.argv[3], cache_dir=cache)
    return checked.checked_count, [file["path"] for file in checked.mismatches]

for name in ("truncated", "breaks"):
    fault(name)
    found[name] = error_of(lambda: load(name))
fault("tampered")
load("tampered")
fault("flickers")
flickered = load("flickers")
fault("none")
processor = AutoProcessor.from_pretrained("org/notellm2", trust_remote_code=True, revision=sys.argv[3])
found["truncated, later"] = embed(load("truncated"), processor)
found["breaks, later"] = embed(load("breaks"), processor)
found["flickers"] = embed(flickered, processor)
found["damaged"] = {cache: damaged_files(cache) for cache in ("tampered", "truncated", "breaks", "flickers")}
print("\\n" + json.dumps(found))
"""
)


class Faults:
    """Serves large files wrongly, as the last request for /fault/NAME asked."""

    def __init__(self) -> None:
        self.name = "none"
        self.ranges: list[str] = []

    def __call__(self, on: Handler) -> bool:
        if on.path.startswith("/fault/"):
            self.name = on.path.removeprefix("/fault/")
            on.send({})
            return True
        if self.name == "none" or on.command != "GET" or not on.path.startswith("/cdn/"):
            return False
        content = on.hub.store.path(on.path.removeprefix("/cdn/")).read_bytes()
        if self.name == "tampered":
            on.send(content[:-400] + b"\1" * 400)
        elif self.name == "truncated":
            on.send(content[:-400])
        elif "Range" in on.headers:
            self.ranges.append(on.headers["Range"])
            if self.name == "flickers":
                return False
            on.send({"error": "out of order"}, 500)
        else:  # the connection breaks after a half
            on.send(content[: len(content) // 2], headers={"Content-Length": str(len(content))})
            on.close_connection = True
        return True


def test_a_damaged_download_is_an_error_or_found_by_its_checksum(hub, published, tiny_model_folder, tmp_path):
    """Loading compares sizes; who was sent other content of the same size learns it from `verify_repo_checksums`."""
    hub.intercept = faults = Faults()
    try:
        result = run_fresh(FAULTS, hub, tmp_path, published)
    finally:
        hub.intercept = None
    damaged = {name: files for name, (_, files) in result["damaged"].items()}
    assert damaged == {"tampered": ["model.safetensors"], "truncated": [], "breaks": [], "flickers": []}
    assert min(count for count, _ in result["damaged"].values()) > 2  # weights, config and code
    assert "should be of size" in result["truncated"]
    assert "500 Internal Server Error" in result["breaks"]
    expected = embeddings_of(tiny_model_folder, tmp_path / "picture.png")
    assert result["truncated, later"] == result["breaks, later"] == result["flickers"] == expected
    kept = (tiny_model_folder / "model.safetensors").stat().st_size // 2 // 50_000 * 50_000
    assert faults.ranges == [f"bytes={kept}-"] * 2  # it went on where it broke


UPLOAD = """
import sys
from pathlib import Path
from hub.publishing.model import ModelDetails, prepare_model
from hub.publishing.sending import Destination, Publication, push
files = {path.name: path for path in Path(sys.argv[1]).iterdir()}
push(Publication("model", files), Destination("org/large"))
"""


def test_a_killed_upload_goes_on_with_what_is_missing(hub, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for number in range(4):
        (folder / f"model-{number}.safetensors").write_bytes(os.urandom(50_000))
    (folder / "config.json").write_text("{}")
    command = [sys.executable, "-c", UPLOAD, folder]
    seen: list[str] = []

    def arrived() -> set[str]:
        return {path.name for path in hub.store.folder.iterdir()} & {path.removeprefix("/cdn/") for path in seen}

    def kill_at_the_third(on: Handler) -> bool:
        if on.command != "PUT":
            return False
        seen.append(on.path)
        if len(seen) < 3:
            return False
        while len(arrived()) < 2:
            time.sleep(0.01)
        process.kill()
        on.close_connection = True
        return True

    hub.intercept = kill_at_the_third
    process = subprocess.Popen(command, cwd=ROOT, env=environment(hub, tmp_path), stderr=subprocess.DEVNULL)
    assert process.wait(60) == -9
    hub.intercept = None
    there = arrived()
    assert len(there) == 2
    assert len(hub.repo("org/large").commits) == 1  # nothing but the first, empty one

    hub.log.clear()
    subprocess.run(command, cwd=ROOT, env=environment(hub, tmp_path), check=True)
    sent = [path.removeprefix("/cdn/") for method, path in hub.log if method == "PUT"]
    assert len(sent) == 2 and not there & set(sent)
    assert len(hub.repo("org/large").commits) == 2
    assert len(hub.repo("org/large").find("main").files) == 6


def test_a_dry_run_lists_everything_and_sends_nothing(at_hub, tiny_model_folder, monkeypatch):
    console = Console(record=True, width=100)
    publish(PublishArguments("org/dry", model=str(tiny_model_folder), dry_run=True), console)
    shown = console.export_text()
    for path in tiny_model_folder.iterdir():
        assert re.search(rf"{path.name} +│ +{path.stat().st_size:,} ", shown), path.name
    assert "LICENSE" in shown and "README.md" in shown and "nothing was sent" in shown
    assert at_hub.log == []


def test_a_runs_plots_go_into_the_card(tiny_model_folder, tmp_path):
    run, staging = tmp_path / "run", tmp_path / "staging"
    shutil.copytree(tiny_model_folder, run / "model")
    (run / "plots").mkdir()
    Image.new("RGB", (8, 8)).save(run / "plots" / "curves.png")
    shutil.copy(ROOT / "hub" / "pages" / "gallery.png", run / "plots" / "other.png")
    figures = {"both/recall@10": 0.5}
    stages = {"random": {"random/recall@10": 0.1, "queries": 4, "candidates": 9}, "before": figures, "after": figures}
    (run / "metrics.json").write_text(json.dumps({**stages, "baselines": {}, "counts": {}, "settings": {}, "log": []}))
    staging.mkdir()
    publication = prepare_model(run / "model", staging, ModelDetails("org/name"))
    assert {name for name in publication.files if name.endswith(".png")} == {"assets/curves.png"}
    assert "(assets/curves.png)" in (staging / "README.md").read_text()


def test_the_users_folder_stays_as_it_is(tiny_model_folder, tmp_path):
    """What is made for the Hub is put together beside it: links in the way are never written through."""
    model, staging = tmp_path / "run" / "model", tmp_path / "staging"
    shutil.copytree(tiny_model_folder, model)
    (tmp_path / "run" / "plots").mkdir()
    (model / "assets").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "run" / "plots" / "curves.png")
    Image.new("RGB", (9, 9)).save(model / "assets" / "curves.png")
    (model / "README.md").write_text(f"# Mine\n{MARKER}\n")
    stages = {"before": {}, "after": {}, "baselines": {}, "random": {}, "counts": {}, "settings": {}, "log": []}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(stages))
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    staging.mkdir()
    publication = prepare_model(model, staging, ModelDetails("org/name"))
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    assert publication.files["README.md"].read_bytes() != before[model / "README.md"]
    assert Image.open(publication.files["assets/curves.png"]).size == (8, 8)


def test_metrics_of_another_model_are_not_published(tiny_model_folder, tmp_path):
    run, staging = tmp_path / "run", tmp_path / "staging"
    shutil.copytree(tiny_model_folder, run / "model")
    (run / "metrics.json").write_text(json.dumps({"after": {}, "weights": {"model.safetensors": "of another"}}))
    staging.mkdir()
    with pytest.raises(RefusedError, match=r"metrics\.json: .*its figures are of other weights"):
        prepare_model(run / "model", staging, ModelDetails("org/name"))


def test_branches_pull_requests_private_repositories_and_stale_weights(at_hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"old")
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"new")
    config = {"config.json": tmp_path / "config.json"}
    kept = {"other/model.safetensors": tmp_path / "model.safetensors"}
    old = {**config, **kept, "model.safetensors": tmp_path / "model.safetensors"}
    new = {**config, "model-00001-of-00001.safetensors": tmp_path / "model-00001-of-00001.safetensors"}
    patterns = ("*.safetensors",)
    push(Publication("model", old, patterns), Destination("org/many", private=True))
    push(Publication("model", new, patterns), Destination("org/many", private=True, revision="next/try"))
    pull_request = push(Publication("model", new, patterns), Destination("org/many", create_pr=True, message="Better"))

    repo = at_hub.repo("org/many")
    assert repo.private
    assert set(repo.find("main").files) == {".gitattributes", *old}
    assert set(repo.find("next/try").files) == {
        ".gitattributes",
        *kept,
        *new,
    }  # the old weights would be loaded in their place
    assert repo.find("refs/pr/1").title == "Better"
    assert pull_request.pr_url.endswith("/discussions/1")
    assert HfApi().list_repo_refs("org/many", include_pull_requests=True).pull_requests[0].ref == "refs/pr/1"

    push(Publication("model", old), Destination("org/public"))
    with pytest.raises(ValueError, match="org/public is public"):
        push(Publication("model", new), Destination("org/public", private=True))


def test_an_upload_that_the_hub_refuses_says_how_to_go_on(at_hub, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("HF_TOKEN", "another-token")
    with pytest.raises(OSError, match="upload to org/refused broke: .*401(.|\n)*Run the same command again"):
        push(Publication("model", {"config.json": tmp_path / "config.json"}), Destination("org/refused"))
    assert ("model", "org/refused") not in at_hub.store.repos
