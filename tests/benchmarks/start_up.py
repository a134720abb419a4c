"""Start-up: what our imports add to those of the libraries, a search by id, and loading beside reading the weights.

Imports are measured in processes of their own, whose CPU seconds count.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers.utils import logging

from modeling_notellm2 import NoteLLM2Model
from tests.benchmarks.bare_parts import make, sizes
from tests.benchmarks.ratios import Ratio, compare
from tests.support.catalogue import write_index


ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = "from transformers import AutoConfig, AutoModel, AutoProcessor, Blip2QFormerModel, ProcessorMixin"


def process(*arguments: str) -> Callable[[], object]:
    """Starts Python with these arguments and waits for it."""
    return lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def imports(rounds: int) -> list[Ratio]:
    """Of the package beside transformers, and of its classes beside the classes that they are made of."""
    package, classes = "import transformers, modeling_notellm2", "from modeling_notellm2 import NoteLLM2Model"
    bare = process("-c", "import transformers")
    return [
        compare("import of the package, transformers", process("-c", package), "transformers", bare, rounds),
        compare(
            "import of our classes", process("-c", classes), "torch, transformers", process("-c", LIBRARIES), rounds
        ),
    ]


def search(rounds: int) -> Ratio:
    """A search by id among 100,000 items, in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        vectors = np.random.default_rng(0).normal(size=(100_000, 64))
        index = write_index(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), Path(folder))
        ours = process("hub/index.py", "search", "--index", str(index), "--id", "n1")
        return compare(
            "index.py search --id", ours, "import transformers", process("-c", "import transformers"), rounds
        )


def loading(rounds: int) -> Ratio:
    """`from_pretrained` and a sum of each weight, beside reading the file's bytes."""
    model, _ = make(sizes()[1])
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = list(Path(folder).glob("*.safetensors"))

        def load() -> None:
            """Weights are mapped, so the sums are what reads them."""
            for parameter in NoteLLM2Model.from_pretrained(folder).parameters():
                parameter.detach().sum()

        return compare(
            "from_pretrained", load, "reading the bytes", lambda: [file.read_bytes() for file in files], rounds, 1.3
        )


def ratios(rounds: int) -> list[Ratio]:
    """All of these."""
    return [*imports(rounds), search(rounds), loading(rounds)]
