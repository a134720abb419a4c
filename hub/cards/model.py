"""What a card says of the model itself, read from its folder: its halves, where they come from, how much it reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from training.tables.commands.markdown import as_text


@dataclass(frozen=True)
class DescribedModel:
    """A model's or adapter's folder.

    Attributes:
        config: config.json of the model, or of an adapter's base where that is a folder here; else empty.
        bases: what the parts ("vision encoder", "language model", or "base" of an adapter) were, as far as it is recorded:
            Hub ids or other names.
        is_adapter: only an adapter's weights are here.
        sentence_transformers: sentence-transformers loads the folder.
        limits: characters read of title and content, from the processor; empty without one.
        prompt_language: of the prompt around an item, "zh" or "en".
    """

    config: dict[str, Any]
    bases: dict[str, str]
    is_adapter: bool
    sentence_transformers: bool
    limits: dict[str, int]
    prompt_language: str | None

    @property
    def width(self) -> int | str:
        """Of the embeddings."""
        return self.config.get("embedding_dim") or self.config.get("text_config", {}).get("hidden_size", "the base's")

    @property
    def parts(self) -> list[dict[str, str]]:
        """Rows of the card's table of parts."""
        if not self.config:
            return [{"name": "adapter", "kind": "peft", "source": link(self.bases.get("base"))}]
        text, vision = self.config["text_config"], self.config["vision_config"]
        layers = text.get("num_hidden_layers", "?")
        return [
            {
                "name": "language model",
                "kind": f"{text['model_type']}, {layers} layers of width {text.get('hidden_size', '?')}",
                "source": link(self.bases.get("language model")),
            },
            {
                "name": "vision encoder",
                "kind": f"{vision['model_type']}, {'frozen' if self.config.get('freeze_vision', True) else 'trained'}",
                "source": link(self.bases.get("vision encoder")),
            },
            {"name": "between them", "kind": connector(self.config), "source": "new, from random weights"},
        ]


def read_model(folder: Path) -> DescribedModel:
    """Reads the JSON files of a folder; none of its code is run.

    Raises:
        ValueError: when it holds neither a NoteLLM-2 model nor an adapter of one.
    """
    adapter = read_json(folder / "adapter_config.json")
    base = str(adapter.get("base_model_name_or_path") or "")
    config = read_json((Path(base) if adapter and Path(base).is_dir() else folder) / "config.json")
    if not adapter and config.get("model_type") != "notellm2":
        raise ValueError(f"{folder} holds no NoteLLM-2 model: no config.json of model_type notellm2, and no adapter.")
    processor = read_json(folder / "processor_config.json")
    recorded = {name.replace("_", " "): source for name, source in (config.get("base_models") or {}).items()}
    bases = {"base": base} if adapter else recorded
    return DescribedModel(
        config,
        {name: source for name, source in bases.items() if source and not Path(source).exists()},
        bool(adapter),
        (folder / "modules.json").is_file(),
        {name: processor[f"max_{name}_length"] for name in ("title", "content") if f"max_{name}_length" in processor},
        processor.get("prompt_language"),
    )


def connector(config: dict[str, Any]) -> str:
    """How picture and language model are joined, in a few words."""
    ways = []
    if config.get("connector") == "native":
        ways.append("the checkpoint's own merger of pictures and text")
    elif config.get("early_fusion", True):
        way = f"Q-Former of {config['qformer_config']['num_hidden_layers']} layers"
        if config.get("connector") == "mlp":
            way = "MLP on pooled patches"
        ways.append(f"{way}, {config.get('num_query_tokens', 16)} visual tokens a picture")
    if config.get("micl", True):
        ways.append("multimodal in-context learning")
    if config.get("late_fusion", True):
        ways.append("late fusion")
    return ", ".join(ways)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file.

    Raises:
        ValueError: for a file that holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object.")
    return content


def check_id(name: str) -> None:
    """Raises ValueError unless `name` has the form of a Hub id."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no id of the Hub such as ORG/NAME: {error}") from error


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of an id with its owner."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def link(base: str | None) -> str:
    """A base model as Markdown."""
    if not base:
        return "not recorded"
    return f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else as_text(base)
