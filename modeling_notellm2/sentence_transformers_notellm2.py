"""NoteLLM-2 inside sentence-transformers: `SentenceTransformer(path, trust_remote_code=True).encode(items)`.

Only sentence-transformers imports this file, which a saved model carries in its folder and names in modules.json.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .sentence_transformers_card_notellm2 import fill_model_card


try:  # transformers requires every import that stands outside a try, also of those who use AutoModel alone
    from sentence_transformers.base.model import BaseModel
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError("This file is for sentence-transformers: pip install 'sentence-transformers>=6'.") from error


logger = logging.get_logger(__name__)

OUTPUTS = ("multimodal", "visual")
MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")


class NoteLLM2ItemEncoder(InputModule):
    """
    The one module of a sentence-transformers model: items in, L2-normalised embeddings out.

    Items are those of the processor: dicts of `title`, `topics`, `content`, `image`; strings (always a content, a path or
    not); PIL images, `pathlib.Path`s and numpy arrays `(h, w, 3)` (a picture). They may be mixed in one call. The dicts of
    sentence-transformers, `{"text": ..., "image": ...}`, are read too.

    `encode(items, output="visual")` gives the visual embedding: zeros for an item without an image.

    A prompt (`encode(items, prompt=...)`, `prompts=`) is text before the item's own prompt. It can't hold slots, both
    embeddings see it, and by default there is none: the published prompt of an item already is an instruction.

    Args:
        model: a [`NoteLLM2Model`].
        processor: its [`NoteLLM2Processor`].
    """

    forward_kwargs = {"output"}
    save_in_root = True
    # "message" is how sentence-transformers names a batch of mixed kinds.
    modalities = ["text", "image", ("image", "text"), "message"]

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        super().__init__()
        self.model: Any = model
        self.processor: Any = processor

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        *,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> "NoteLLM2ItemEncoder":
        """As sentence-transformers calls it; the three `_kwargs` go to the `from_pretrained` that they name.

        `init_defaults` and other keywords, which modules with settings of their own are given, have no effect.

        Raises:
            ValueError: for another backend than torch.
        """
        if backend != "torch":
            raise ValueError(f"NoteLLM-2 runs with backend='torch'; got {backend!r}.")
        shared = {
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        config = AutoConfig.from_pretrained(model_name_or_path, **{**shared, **(config_kwargs or {})})
        model = AutoModel.from_pretrained(model_name_or_path, config=config, **{**shared, **(model_kwargs or {})})
        processor = AutoProcessor.from_pretrained(model_name_or_path, **{**shared, **(processor_kwargs or {})})
        return cls(model, processor)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Weights, processor and code; AutoModel and AutoProcessor load the folder as well."""
        if not safe_serialization:
            logger.warning_once("Weights are always saved as safetensors; safe_serialization=False has no effect.")
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    def preprocess(  # type: ignore[override]  # keywords of no effect are errors here
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        task: str | None = None,
        output: str = "multimodal",
        processing_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the processor makes of a batch of items.

        Args:
            inputs: n items of any accepted kind.
            prompt: text before each item's prompt.
            task, output: of no effect here; sentence-transformers passes on what `encode` was called with.
            processing_kwargs: for this call of the processor, e.g. `{"pad_to_multiple_of": 8}`.

        Returns:
            The model's inputs. `num_images` is named `num_images_per_sample`, by which the losses with a gradient cache
            divide `pixel_values` and `image_sizes` among the items of their mini-batches.

        Raises:
            ValueError: for an item that can't be used, naming its item_id and its row in the batch (`encode` sorts by length).
        """
        items = [_read(number, raw) for number, raw in enumerate(inputs)]
        features = self.processor(items, prefix=prompt, return_tensors="pt", **(processing_kwargs or {}))
        features["num_images_per_sample"] = features.pop("num_images")
        return dict(features)

    def forward(self, features: dict[str, Any], output: str = "multimodal", **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` `(n, d)` and `has_image` `(n,)`.

        Args:
            output: "multimodal", or "visual" for the embedding of the images alone.

        Raises:
            ValueError: for another output, or "visual" of a model without mICL.
        """
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}.")
        inputs = {name: features[name] for name in MODEL_INPUTS if name in features}
        result = self.model(**inputs, num_images=features["num_images_per_sample"])
        embeddings = result.embeddings if output == "multimodal" else result.visual_embeddings
        if embeddings is None:
            raise ValueError('output="visual" needs a model with mICL; this one has micl=False.')
        return {**features, "sentence_embedding": embeddings, "has_image": result.has_image}

    def get_embedding_dimension(self) -> int:
        """Width of both embeddings."""
        return self.model.config.embedding_dim or self.model.config.text_width

    @property
    def max_seq_length(self) -> int | None:
        """Positions that the LLM has. Read-only: the processor's limits on an item's fields decide what is cut."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        raise AttributeError(
            "An item isn't cut as a whole: its slots for the picture must stay. Limit its fields instead, for instance "
            "SentenceTransformer(..., processor_kwargs={'max_title_length': 40, 'max_content_length': 100})."
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:  # type: ignore[override]
        """The LLM's tokenizer; read-only, as the processor has put its tokens into it."""
        return self.processor.tokenizer

    def on_model_ready(self, model: BaseModel) -> None:
        """Has the model card speak of items."""
        fill_model_card(model)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card and `print(model)` show of this module; its settings are in config.json."""
        config = self.model.config
        return {
            "vision": config.vision_config.model_type,
            "text": config.text_config.model_type,
            "prompt": self.processor.prompt_mode,
        }


def _read(number: int, raw: Any) -> Any:
    """One input as the processor takes it."""
    if isinstance(raw, Mapping) and "text" in raw:
        if raw.get("content"):
            raise ValueError(f"row {number}: an item has `text` and `content`; one of them is expected.")
        return {**{key: value for key, value in raw.items() if key != "text"}, "content": raw["text"]}
    if isinstance(raw, str) and raw.lower().endswith(IMAGE_ENDINGS) and os.path.isfile(raw):
        logger.warning_once(
            f"A string is read as an item's text, also {raw!r}. For the picture pass pathlib.Path({raw!r})."
        )
    return raw


__all__ = ["NoteLLM2ItemEncoder"]
