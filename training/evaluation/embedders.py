"""Which kind of model a folder or an id of the Hub holds, and that model as an embedder.

A NoteLLM-2 model or adapter; a Sentence Transformers model, which has a modules.json; or a dual encoder of transformers,
which gives text and image features in one space (CLIP, SigLIP and their like).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoProcessor

from training.batches.collators import ItemCollator, UnreadableImages
from training.evaluation.embed import Embedder, NoteLLM2Embedder
from training.tables.commands.handler import FileError, OptionError
from training.tables.commands.model_folder import holds_notellm2, loading, loading_any, model_type_of


NOTELLM2, SENTENCE_TRANSFORMERS, DUAL_ENCODER = "NoteLLM-2", "Sentence Transformers", "dual encoder"
FEATURES = ("get_text_features", "get_image_features")


@dataclass(frozen=True)
class Loading:
    """How models are loaded and run.

    Attributes:
        device, dtype: of the weights.
        batch_size: items embedded at once.
        num_workers: processes that open images.
        prompt_name: of the prompts of models of others; None: each one's default.
        trust_remote_code: whether code that comes with models of others may run; ours always does.
        rejects: JSON lines file to which images that can't be read are added.
    """

    device: str
    dtype: torch.dtype
    batch_size: int = 32
    num_workers: int = 0
    prompt_name: str | None = None
    trust_remote_code: bool = False
    rejects: Path | None = None


def kind_of(source: str, trust_remote_code: bool = False) -> str:
    """Which kind of model a folder or an id holds.

    Raises:
        FileError: for a model of another kind, and for what is no model.
    """
    with loading_any(source):
        if holds_notellm2(source):
            return NOTELLM2
        model_type = model_type_of(source)
        try:
            from sentence_transformers.util import is_sentence_transformer_model
        except ImportError as error:
            raise FileError(f"{source} needs sentence-transformers: pip install 'sentence-transformers>=6'.") from error
        if is_sentence_transformer_model(source):
            return SENTENCE_TRANSFORMERS
        if model_type is not None and _is_dual_encoder(source, trust_remote_code):
            return DUAL_ENCODER
    raise FileError(
        f"{source} is no model that embeds items but {model_type or 'one of unknown type'}: expected a NoteLLM-2 model, a "
        "Sentence Transformers model (with a modules.json), or a dual encoder such as CLIP or SigLIP."
    )


def open_embedder(source: str, how: Loading) -> Embedder:
    """Load a model of any of the kinds.

    Raises:
        FileError: for a model that can't be loaded, and for what is none.
        OptionError: for a prompt that the model doesn't have.
    """
    kind = kind_of(source, how.trust_remote_code)
    return _open_notellm2(source, how) if kind == NOTELLM2 else _open_sentence_transformer(source, kind, how)


def _open_notellm2(source: str, how: Loading) -> Embedder:
    with loading(source):
        model = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=how.dtype).to(how.device).eval()
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    collate = ItemCollator(processor, rejects=how.rejects)
    return NoteLLM2Embedder(model, collate, how.batch_size, how.num_workers, source)


def _open_sentence_transformer(source: str, kind: str, how: Loading) -> Embedder:
    from sentence_transformers import SentenceTransformer

    from training.evaluation.sentence_embedder import SentenceEmbedder

    with loading_any(source):
        model = SentenceTransformer(
            source,
            device=how.device,
            trust_remote_code=how.trust_remote_code,
            model_kwargs={"dtype": how.dtype},
        ).eval()
    if how.prompt_name is not None and how.prompt_name not in model.prompts:
        names = ", ".join(model.prompts) or "none"
        raise OptionError(f"{source} has no prompt '{how.prompt_name}'; its prompts: {names}.")
    return SentenceEmbedder(
        model, source, kind, how.prompt_name, how.batch_size, how.num_workers, UnreadableImages(how.rejects)
    )


def _is_dual_encoder(source: str, trust_remote_code: bool) -> bool:
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    model_class = MODEL_MAPPING.get(type(config), None)
    return all(hasattr(model_class, name) for name in FEATURES)
