"""The model card that sentence-transformers writes, filled for items: their usage, pictures, modalities, base models."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .images_notellm2 import image_sources, load_image


try:  # transformers requires every import that stands outside a try, also of those who use AutoModel alone
    from sentence_transformers.base.model import BaseModel
    from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
except ImportError as error:
    raise ImportError("This file is for sentence-transformers: pip install 'sentence-transformers>=6'.") from error


TASK = "item-to-item recommendation and multimodal retrieval"
TAGS = ["notellm2", "multimodal", "item-to-item", "custom_code"]
EXAMPLES = [
    {"title": "Red panda", "topics": ["animals", "forest"], "content": "Sleeps in trees, eats bamboo."},
    {"title": "Giant panda", "topics": ["animals"], "content": "Black and white, eats bamboo."},
    "Coffee grinder with a ceramic burr",
]
ITEM_FIELDS = ("title", "topics", "content", "image")
PLACEHOLDER = "sentence_transformers_model_id"  # which sentence-transformers replaces when it knows the id
USAGE = """```python
from pathlib import Path

from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{model_id}", trust_remote_code=True)
# An item: a dict of any of title, topics, content and image; a string (its content); a PIL image or a Path (its picture).
items = [
{items}
]
embeddings = model.encode(items)
print(embeddings.shape)
# ({count}, {width})
print(model.similarity(embeddings, embeddings))
{similarities}
```

In a dict, `image` is a PIL image, a path, bytes, a numpy array, or a list of them. {visual}

{bases}"""
VISUAL = 'With `encode(items, output="visual")` the embedding is that of the pictures alone.'


class NoteLLM2CardData(SentenceTransformerModelCardData):
    """sentence-transformers' card data with items in the usage example, in place of texts.

    The example shows the first items of the evaluation or training data, with their pictures in `assets/`; without data,
    made-up items. Nothing is shown that was not run.
    """

    model: Any
    # Ids of the Hub. Not a field of the dataclass: `fill_model_card` turns ready objects into this class.
    base_models: Sequence[str] = ()

    def set_widget_examples(self, dataset: Any) -> None:
        """Takes the usage example's items from the first column of a dataset, or of the first of several."""
        first = next(iter(dataset.values())) if isinstance(dataset, Mapping) else dataset
        if hasattr(first, "__len__") and len(first):  # a stream is left alone
            rows = [first[number] for number in range(min(3, len(first)))]
            column = next(name for name in rows[0] if name != "dataset_name")
            self.usage_examples = [_filled(row[column]) for row in rows]

    def run_usage_snippet(self) -> None:
        """Encodes the example, for the similarities that the card shows."""
        self.usage_examples = self.usage_examples or EXAMPLES
        embeddings = self.model.encode(self.usage_examples, show_progress_bar=False)
        lines = str(self.model.similarity(embeddings, embeddings)).splitlines()
        self.similarities = "\n".join(f"# {line}" for line in lines)

    def save_usage_example_assets(self) -> None:
        """Writes the example's pictures into `assets/` of the folder that is being saved."""
        self.usage_examples_display = [
            self._display(item, number) for number, item in enumerate(self.usage_examples or EXAMPLES)
        ]

    def generate_usage_snippet(self) -> str:
        """Code for items, and what the two halves of the model come from."""
        shown = self.usage_examples_display or EXAMPLES
        return USAGE.format(
            model_id=self.model_id or PLACEHOLDER,
            items="\n".join(f"    {item if isinstance(item, _Code) else repr(item)}," for item in shown),
            count=len(shown),
            width=self.model.get_embedding_dimension(),
            similarities=self.similarities or "",
            visual=VISUAL if self.model[0].model.config.micl else "",
            bases=self._bases(),
        ).rstrip()

    def get_default_model_name(self) -> str:
        """The card's title, unless the user chose one."""
        return "NoteLLM-2 item embeddings"

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """As for any model, without the kind "message", which here only stands for batches of mixed items."""
        metadata = super().get_model_specific_metadata()
        kinds = [kind for kind in metadata.get("supported_modalities", []) if kind != "Message"]
        return {**metadata, "supported_modalities": kinds}

    def try_to_set_base_model(self) -> None:
        """Both halves, where the config names ids that the Hub knows."""
        names = [name for _, name in self._halves().values()]
        self.base_models = [name for name in names if name and self.set_base_model(name)]
        self.base_model = self.base_model_revision = None  # the template has room for one

    def to_dict(self) -> dict[str, Any]:
        """For the template; the YAML at the card's head has both base models."""
        data = super().to_dict()
        self._cached_dict = {**data, "base_model": data["base_model"] or self.base_models}
        return data

    def _halves(self) -> dict[str, tuple[Any, str | None]]:
        """Config and id of both; ids of halves that were joined in this process stand in their own configs."""
        config = self.model[0].model.config
        known = config.base_models or {}
        halves = {
            "Vision encoder": (config.vision_config, "vision_encoder"),
            "Language model": (config.text_config, "language_model"),
        }
        return {part: (half, known.get(key) or half.name_or_path) for part, (half, key) in halves.items()}

    def _bases(self) -> str:
        lines = []
        for part, (config, name) in self._halves().items():
            link = f", from [{name}](https://huggingface.co/{name})" if name in self.base_models else ""
            lines.append(f"- **{part}:** {config.model_type}{link}")
        return "\n".join(lines)

    def _display(self, item: Any, number: int) -> Any:
        """An example as it stands in the code: pictures as paths of the files that were written for them."""
        if isinstance(item, str):
            return item
        picture = item.get("image") if isinstance(item, Mapping) else item
        paths = [self._write(source, f"item_{number}_{at}.png") for at, source in enumerate(image_sources(picture))]
        if not isinstance(item, Mapping):
            return _Code(f"Path({paths[0]!r})")
        return {**item, "image": paths if len(paths) > 1 else paths[0]} if paths else item

    def _write(self, source: Any, name: str) -> str:
        assets = os.path.join(self.save_dir or ".", "assets")
        os.makedirs(assets, exist_ok=True)
        load_image(source).save(os.path.join(assets, name))
        return f"assets/{name}"

    @staticmethod
    def _format_example_value(value: Any) -> str:
        """A cell of the table of training examples; of a dict's picture only that there is one."""
        if not isinstance(value, Mapping):
            return SentenceTransformerModelCardData._format_example_value(value)
        fields = {key: "(picture)" if key == "image" else field for key, field in _filled(value).items()}
        text = str(fields)[:1000].replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
        return text.replace("\n", " ")


class _Code(str):
    """Source code, which is shown as it is and not quoted."""


def fill_model_card(model: BaseModel) -> None:
    """Turns the model's card data into `NoteLLM2CardData`, unless the user brought a class of their own."""
    card = model.model_card_data
    if type(card) is not SentenceTransformerModelCardData:
        return
    card.__class__ = NoteLLM2CardData  # keeps all that the user set
    if card.task_name == SentenceTransformerModelCardData.task_name:
        card.task_name = TASK
    card.add_tags(TAGS)


def _filled(item: Any) -> Any:
    """An item of a dataset without the fields that only other rows have."""
    if not isinstance(item, Mapping):
        return item
    return {key: item[key] for key in ITEM_FIELDS if item.get(key) not in (None, "", [])}
