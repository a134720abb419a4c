"""Models of others, loaded by sentence-transformers, as embedders of items: of texts, of pictures, or of both.

sentence-transformers runs dual encoders such as CLIP and SigLIP too, whether their folder has its modules.json or not. An
item's text is one line (`training.tables.one_line`), never cut: the model reads as much as it can.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_notellm2.images_notellm2 import image_sources, load_image
from modeling_notellm2.prompts_notellm2 import ItemError
from training.batches.collators import UnreadableImages
from training.evaluation.embed import Embedded, Item
from training.tables.one_line import UNLIMITED, one_line


TEXTS_AT_ONCE = 32
"""Batches of texts that are sorted by length together; pictures, which take memory, are opened a batch at a time."""
PADDED_MODELS = ("siglip", "siglip2")
"""Types of models that were trained on texts padded to the greatest length, and read no others."""
READS = {
    "text": "text",
    "image": "picture",
    "joined": "picture and text apart, joined as the mean of both unit vectors",
    "together": "picture and text in one input",
}


class SentenceEmbedder:
    """A model that sentence-transformers loads, as an `Embedder` (`training.evaluation.embed`).

    An item with several pictures has the mean of their unit vectors. One whose pictures can't be read, and without a text, has
    zeros, which are close to nothing.

    Args:
        model: in eval mode.
        name: folder or id.
        kind: of model, for people.
        prompt_name: of the model's prompts, put before each text; None: its default prompt, if it has one.
        batch_size: inputs embedded at once.
        num_workers: processes that open images.
        unreadable: lists images that can't be read.
    """

    limits = UNLIMITED

    def __init__(
        self,
        model: SentenceTransformer,
        name: str,
        kind: str,
        prompt_name: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        unreadable: UnreadableImages | None = None,
    ):
        self.model, self.name, self.kind = model, name, kind
        self.prompt_name = prompt_name or model.default_prompt_name
        self.batch_size, self.num_workers = batch_size, num_workers
        self.unreadable = unreadable or UnreadableImages()
        self.together = model.supports(("image", "text"))
        has = tuple(modality for modality in ("image", "text") if model.supports(modality))
        self.modalities = ("both", *has) if len(has) == 2 else has
        config = getattr(model, "config", None)
        self.padded = config is not None and config.model_type in PADDED_MODELS

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def reads(self) -> str:
        """What it reads of an item, and behind which prompt."""
        if "both" not in self.modalities:
            how = READS[self.modalities[0]] + " alone"
        else:
            how = READS["together" if self.together else "joined"]
        if "text" not in self.modalities:
            return how
        others = [name for name, prompt in self.model.prompts.items() if prompt and name != self.prompt_name]
        prompt = self.model.prompts.get(self.prompt_name, "") if self.prompt_name else ""
        if prompt:
            return f"{how}, prompt '{self.prompt_name}' ({prompt.strip()})"
        return f"{how}, no prompt (it has {', '.join(others)})" if others else how

    def embed(self, items: Sequence[Item], modality: str) -> Embedded:
        """See `Embedder`."""
        if not len(items):
            raise ValueError(f"There are no {modality} to embed.")
        texts_only = "image" not in self.modalities or modality == "text"
        size = self.batch_size * (TEXTS_AT_ONCE if texts_only else 1)
        loader: Any = DataLoader(cast(Any, items), size, collate_fn=self._open, num_workers=self.num_workers)
        parts: list[tuple[Tensor, Tensor]] = []
        has_image: list[bool] = []
        with tqdm(desc=f"Embedding {modality} by {self.name}", total=len(items), unit="item") as progress:
            for opened in loader:
                parts += [(rows + len(has_image), vectors) for rows, vectors in self._vectors(opened)]
                has_image += [bool(pictures) for _, pictures in opened]
                progress.update(len(opened))
        if not parts:
            raise ValueError(f"{self.name}: none of {len(items)} items has a text or picture that can be read.")
        total = torch.zeros(len(items), parts[0][1].shape[1])
        for rows, vectors in parts:
            total.index_add_(0, rows, vectors)
        return Embedded(F.normalize(total, dim=-1), None, torch.tensor(has_image))

    def _open(self, items: Sequence[Item]) -> list[tuple[str, list[Any]]]:
        """Text and pictures of each item, as far as the model has a use for them."""
        return [
            (
                one_line(item) if "text" in self.modalities else "",
                list(self._pictures(item)) if "image" in self.modalities else [],
            )
            for item in items
        ]

    def _pictures(self, item: Item) -> Iterator[Any]:
        for source in image_sources(item.get("image")):
            try:
                picture = load_image(source)
            except ItemError as error:
                self.unreadable.add(item, str(error))
            else:
                yield picture

    def _vectors(self, opened: Sequence[tuple[str, list[Any]]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each kind of input that a batch has: rows, ascending, and the unit vector of each, (m, d) float32."""
        inputs: dict[str, list[tuple[int, Any]]] = {"text": [], "image": [], "together": []}
        for row, (text, pictures) in enumerate(opened):
            if text and pictures and self.together:
                inputs["together"] += [(row, {"text": text, "image": picture}) for picture in pictures]
                continue
            if text:  # as a string, one with the name of a picture would be opened
                inputs["text"].append((row, {"text": text} if "image" in self.modalities else text))
            inputs["image"] += [(row, picture) for picture in pictures]
        for numbered in filter(None, inputs.values()):
            numbers, values = zip(*numbered, strict=True)
            rows, place = torch.unique_consecutive(torch.tensor(numbers), return_inverse=True)
            vectors = self._encode(list(values))
            sums = torch.zeros(len(rows), vectors.shape[1]).index_add_(0, place, vectors)
            yield rows, F.normalize(sums, dim=-1)

    def _encode(self, values: list[Any]) -> Tensor:
        """(n, d) float32 unit vectors on the CPU."""
        settings: dict[str, Any] = {"processing_kwargs": {"text": {"padding": "max_length"}}} if self.padded else {}
        vectors = self.model.encode(
            values,
            prompt_name=self.prompt_name,
            batch_size=self.batch_size,
            show_progress_bar=False,
            convert_to_tensor=True,
            **settings,
        )
        return F.normalize(vectors.float().cpu(), dim=-1)
