"""What makes a saved folder a sentence-transformers model as well: which module class reads it, what, and how it compares.

Needs the standard library alone, so that models are saved alike where sentence-transformers is not installed.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    # For transformers, which copies the files that are imported by a relative import beside the weights.
    from .sentence_transformers_notellm2 import NoteLLM2ItemEncoder  # noqa: F401

ITEM_ENCODER = "sentence_transformers_notellm2.NoteLLM2ItemEncoder"
OUTPUT = {"method": "forward", "method_output_name": "sentence_embedding"}
FILES: dict[str, Any] = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": ITEM_ENCODER}],
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
    # sentence-transformers reads it for its own Transformer module alone. By it mteb knows that a model of the Hub reads
    # pictures: without, it drops them and scores the texts.
    "sentence_bert_config.json": {
        "modality_config": {"text": OUTPUT, "image": OUTPUT},
        "module_output_name": "sentence_embedding",
    },
}


def write_sentence_transformers_files(folder: str | os.PathLike) -> None:
    """Writes modules.json and the two configs where they are missing.

    Those that sentence-transformers wrote stay: they may hold prompts, a `truncate_dim` or further modules.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        path = Path(folder) / name
        if not path.exists():
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
