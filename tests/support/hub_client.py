"""Processes that know nothing but the stand-in for the Hub."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.support.catalogue import png
from tests.support.hub_server import HubServer


ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import sys
sys.path.append(sys.argv[1])
import json, os, urllib.request
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
try:
    import modeling_notellm2
except ImportError:
    pass
else:
    raise SystemExit("the package is importable: this tests nothing")

items = [{"title": "a", "image": Image.open(sys.argv[2])}, "a text alone"]
found = {}

def embed(model, processor):
    with torch.no_grad():
        return model.eval()(**processor(items, return_tensors="pt")).embeddings.tolist()

def error_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error} {error.__cause__ or ''}"
"""


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    """Of a process that knows nothing but the Hub."""
    own = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    return {**own, **hub.environment, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def run_fresh(script: str, hub: HubServer, folder: Path, *arguments: str) -> dict:
    """What a script prints last, run where this project can't be imported, with an empty cache."""
    picture_file = folder / "picture.png"
    picture_file.write_bytes(png(3))
    # -S leaves out site-packages' .pth files, and with them the editable install.
    command = [sys.executable, "-I", "-S", "-c", script, sysconfig.get_paths()["purelib"], picture_file, *arguments]
    run = subprocess.run(
        command,
        cwd=folder,
        env=environment(hub, folder / "home"),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])
