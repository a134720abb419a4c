"""The Dockerfile of the server: what it copies is there and enough, what it installs is a group, what it starts answers."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest
import yaml
from rich.console import Console

from hub.encode import encode
from hub.index import BuildArguments, build
from hub.publish import PublishArguments, publish
from hub.publishing.sending import Destination, Publication, push
from tests.support.catalogue import arguments
from tests.support.server import ROOT, started


DOCKERFILE = "hub/serving/Dockerfile"


def instructions(context: Path, dockerfile: str) -> list[tuple[str, str]]:
    """Word and rest of each line of a Dockerfile."""
    text = (context / dockerfile).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def built(context: Path, dockerfile: str, folder: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """Does what a Dockerfile does to its working folder; its entry point, variables and health check."""
    variables: dict[str, str] = {}
    entry, health = [], []
    for word, rest in instructions(context, dockerfile):
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy(context / source, folder / target, target.endswith("/"))
        elif word == "ENV":
            variables |= dict(part.split("=", 1) for part in shlex.split(rest))
        elif word == "ENTRYPOINT":
            entry = json.loads(rest)
        elif word == "HEALTHCHECK":
            health = json.loads(rest.partition("CMD ")[2])
    return entry, variables, health


def copy(source: Path, target: Path, into: bool) -> None:
    """As COPY does: a folder's content, or a file into a folder."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        (target if into else target.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def ask(folder: Path, entry: list[str], variables: dict[str, str], health: list[str]) -> dict:
    """Starts a container's command on a free port, checks its health in its way, and gives what /health says."""
    assert entry[0] == health[0] == "python"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), **variables}
    with started([sys.executable, *entry[1:], "--port", "0"], environment, folder) as running:
        port = str(running.address[1])
        subprocess.run([sys.executable, *(part.replace("8000", port) for part in health[1:])], check=True)
        return httpx.get(f"http://127.0.0.1:{port}/health").json()


def test_what_the_container_installs_is_there():
    (install,) = [
        part
        for word, rest in instructions(ROOT, DOCKERFILE)
        if word == "RUN"
        for part in rest.split("&&")
        if "-e ." in part
    ]
    words = shlex.split(install)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert words[words.index("--group") + 1] in groups
    copied = " ".join(rest for word, rest in instructions(ROOT, DOCKERFILE) if word == "COPY").split()
    assert {words[words.index("-c") + 1], "pyproject.toml", "modeling_notellm2"} <= set(copied)


def test_the_containers_command_starts_and_is_healthy(tiny_model_folder, tmp_path):
    entry, variables, health = built(ROOT, DOCKERFILE, tmp_path)
    told = ask(tmp_path, entry, {**variables, "NOTELLM2_MODEL": str(tiny_model_folder)}, health)
    assert told == {"status": "ok", "model": tiny_model_folder.name, "dimensions": 24, "indexed_items": None}


@pytest.mark.slow
def test_the_docker_space_is_a_context_that_builds_and_serves(at_hub, table, tiny_model_folder, tmp_path):
    files = {path.name: path for path in tiny_model_folder.iterdir()}
    push(Publication("model", files), Destination("org/base"))
    encode(arguments(tiny_model_folder, table, tmp_path / "vectors"))
    build(BuildArguments(str(tmp_path / "vectors"), str(tmp_path / "index")))
    wanted = {"server": True, "index": str(tmp_path / "index")}
    with pytest.raises(ValueError, match="Publish it first"):
        publish(PublishArguments("org/server", model=str(tiny_model_folder), **wanted), Console(quiet=True))
    publish(PublishArguments("org/server", model="org/base", **wanted), Console(quiet=True))
    space = at_hub.repo("org/server", "space")
    context = tmp_path / "space"
    for path, stored in space.find("main").files.items():
        (context / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(at_hub.store.path(stored.key), context / path)
    assert space.sdk == "docker"
    head = yaml.safe_load((context / "README.md").read_text().split("---")[1])
    exposed = [rest for word, rest in instructions(context, "Dockerfile") if word == "EXPOSE"]
    assert (head["sdk"], head["models"], [str(head["app_port"])]) == ("docker", ["org/base"], exposed)
    assert not re.search(r"/tmp|/home/(?!server)", (context / "index" / "index.json").read_text())
    (tmp_path / "app").mkdir()
    entry, variables, health = built(context, "Dockerfile", tmp_path / "app")
    told = ask(tmp_path / "app", entry, variables, health)
    assert told == {"status": "ok", "model": "org/base", "dimensions": 24, "indexed_items": 70}
