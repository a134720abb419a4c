"""Whether a folder loads where nobody knows this project: in a new process, by its own code, without a network."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from hub.publishing.checks import Fault
from training.tables.commands.files import scratch_folder


PROBE = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

def check(step, function):
    try:
        return function()
    except Exception as error:
        print(json.dumps({"step": step, "error": f"{type(error).__name__}: {error}"}))
        sys.exit()

def load_model():
    model, info = AutoModel.from_pretrained(
        folder, trust_remote_code=True, use_safetensors=True, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    assert not wrong, f"weights don't fit the code: {wrong}"
    return model.eval()

@torch.no_grad()
def embed():
    embeddings = model(**processor(items, return_tensors="pt")).embeddings
    assert embeddings.isfinite().all(), "embeddings are no numbers (NaN or infinite)"
    return embeddings.float()

def encode():
    from sentence_transformers import SentenceTransformer

    from_st = SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode(items, convert_to_tensor=True)
    assert torch.allclose(from_st.float(), embeddings, atol=1e-2), "sentence-transformers gives other embeddings"

folder, with_sentence_transformers = sys.argv[1], sys.argv[2] == "True"
items = [{"title": "red", "image": Image.new("RGB", (64, 48), "red")}, "a text alone"]
model = check("AutoModel", load_model)
processor = check("AutoProcessor", lambda: AutoProcessor.from_pretrained(folder, trust_remote_code=True))
embeddings = check("embedding an item", embed)
if with_sentence_transformers:
    check("SentenceTransformer", encode)
print(json.dumps({}))
"""


def load_faults(folder: Path, needs_network: bool = False) -> list[Fault]:
    """Loads a folder with AutoModel, AutoProcessor and, if it is installed, sentence-transformers, and embeds two items.

    Args:
        folder: of a model or an adapter. Its code is run.
        needs_network: an adapter's base is loaded from the Hub.
    """
    # An adapter has no config of its own, so sentence-transformers can't tell what it is.
    with_sentence_transformers = find_spec("sentence_transformers") is not None and not needs_network
    with scratch_folder(Path(tempfile.gettempdir()), "publish") as cache:
        environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"}
        if not needs_network:
            environment["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, "-I", "-c", PROBE, str(folder.resolve()), str(with_sentence_transformers)]
        run = subprocess.run(command, cwd=cache, env=environment, capture_output=True, text=True)
    try:
        result = json.loads(run.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        result = {"step": "loading", "error": f"the process ended with {run.returncode}: {run.stderr[-2000:]}"}
    if not result:
        return []
    remedy = "Save model and processor anew with save_pretrained, both into this folder."
    return [Fault("(the folder)", f"{result['step']} fails in a new process: {result['error']}", remedy)]
