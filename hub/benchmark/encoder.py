"""NoteLLM-2 as a model of mteb, which then shows it pictures and texts of every task that has them.

Given a SentenceTransformer, mteb 2 takes it for a model of texts and drops the pictures of an item with only a log line.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from mteb.models import ModelMeta
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.similarity_functions import ScoringFunction
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm
from transformers import AutoConfig

from hub.benchmark.folder import ITEM
from training.tables.commands.hashes import weights_of
from training.tables.commands.model_folder import loading


DIGITS = 12
"""Of each weight file's hash, which together are a folder's revision."""


class NoteLLM2Encoder(SentenceTransformerEncoderWrapper):
    """Encodes the rows of a task as items: all that they have of `item`, `title`, `body`, `text` and `image`.

    Args:
        model: name in mteb, as `mteb_model_meta` has it.
        revision: of a model of the Hub.
        source: folder or id to load; None: the name.
        settings: of SentenceTransformer, e.g. `device`, `model_kwargs`.
    """

    def __init__(self, model: str, revision: str | None = None, source: str | None = None, **settings: Any):
        place = source or model
        with loading(place):
            loaded = SentenceTransformer(
                place, revision=None if Path(place).is_dir() else revision, trust_remote_code=True, **settings
            )
        super().__init__(loaded)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **settings: Any) -> np.ndarray:
        """See `mteb.models.EncoderProtocol`: (n, d) float32."""
        prompt = (self.model_prompts or {}).get(self.get_prompt_name(task_metadata, prompt_type) or "")
        options = {"batch_size": settings["batch_size"]} if "batch_size" in settings else {}
        vectors = [
            self.model.encode(items_of(batch), prompt=prompt, show_progress_bar=False, **options)
            for batch in tqdm(inputs, desc="Encoding", disable=not settings.get("show_progress_bar", True))
        ]
        return np.concatenate(vectors)


def items_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The items of a batch of mteb, which has a list for each column."""
    count = len(next(iter(batch.values())))
    return [_item({name: values[row] for name, values in batch.items()}) for row in range(count)]


def _item(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = {"title": row.get("title"), "content": row.get("body", row.get("text"))}
    return {**(json.loads(row[ITEM]) if ITEM in row else texts), "image": row.get("image")}


def notellm2_meta(source: str, revision: str | None = None) -> ModelMeta:
    """What mteb needs to know of a model: modalities, prompts, revision, size and how it is loaded.

    `mteb.evaluate(notellm2_meta(folder), tasks)` wants mteb's extra `image` installed, `notellm2_encoder` doesn't.

    Args:
        source: folder, or id of the Hub.
        revision: of the Hub; None: its newest commit. A folder's is made of its weights' hashes.

    Raises:
        FileError: for a folder that holds no NoteLLM-2 model.
    """
    folder = Path(source)
    with loading(source):
        settings = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=True)
    if folder.is_dir():
        hashes = weights_of(folder) or {}
        revision = "-".join(digest[:DIGITS] for digest in hashes.values()) or None
        name, parameters = f"local/{folder.resolve().name}", _parameters(folder)
    else:
        revision = revision or HfApi().model_info(source).sha
        name, parameters = source, None
    return ModelMeta(
        loader=NoteLLM2Encoder,
        loader_kwargs={"source": source},
        name=name,
        revision=revision,
        release_date=None,
        languages=None,
        n_parameters=parameters,
        memory_usage_mb=None,
        max_tokens=getattr(settings.text_config, "max_position_embeddings", None),
        embed_dim=settings.embedding_dim or settings.text_config.hidden_size,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["Sentence Transformers", "PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=["image", "text"],
    )


def notellm2_encoder(source: str, revision: str | None = None, **settings: Any) -> NoteLLM2Encoder:
    """The model itself for `mteb.evaluate`; `settings` are SentenceTransformer's, e.g. `device` and `model_kwargs`.

    Raises:
        FileError: as `notellm2_meta`.
    """
    meta = notellm2_meta(source, revision)
    encoder = NoteLLM2Encoder(str(meta.name), meta.revision, source, **settings)
    encoder.mteb_model_meta = meta.model_copy(update={"use_instructions": bool(encoder.model_prompts)})
    return encoder


def _parameters(folder: Path) -> int:
    """Numbers in a folder's weights, read from their heads."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as weights:
            total += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    return total
