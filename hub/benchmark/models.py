"""Any model for a task of mteb: ours, a folder of a Sentence Transformers model, or whatever mteb knows by its id."""

from pathlib import Path
from typing import Any

import mteb
import torch
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from hub.benchmark.encoder import notellm2_encoder
from training.tables.commands.model_folder import holds_notellm2, loading_any


MODALITIES: tuple[Any, ...] = ("image", "text")


def open_model(source: str, device: str, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load a model for `mteb.evaluate`.

    Args:
        source: folder, or id of the Hub.
        device, dtype: of the weights.
        trust_remote_code: whether code that comes with a folder of others may run; ours always does.

    Raises:
        FileError: for a model that can't be loaded.
    """
    settings: dict[str, Any] = {"device": device, "model_kwargs": {"dtype": dtype}}
    with loading_any(source):
        if holds_notellm2(source):
            return notellm2_encoder(source, **settings)
        if not Path(source).is_dir():
            return mteb.get_model_meta(source, fetch_from_hf=True).load_model(device=device)
        model = SentenceTransformer(source, trust_remote_code=trust_remote_code, **settings)
    encoder = SentenceTransformerEncoderWrapper(model)
    known = {
        "name": f"local/{Path(source).resolve().name}",
        "modalities": [modality for modality in MODALITIES if model.supports(modality)],
    }
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=known)
    return encoder
