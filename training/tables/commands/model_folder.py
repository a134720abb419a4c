"""Whether a folder holds a NoteLLM-2 model, and errors of loading a model that name its folder."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PretrainedConfig
from transformers.utils import find_adapter_config_file

from training.tables.commands.handler import FileError, about


MODEL_TYPE = "notellm2"
ADAPTER_CONFIG = "adapter_config.json"


@contextmanager
def loading(source: str | os.PathLike[str]) -> Iterator[None]:
    """Load a NoteLLM-2 model within the block.

    Args:
        source: folder of a model or an adapter, or id of one on the Hub.

    Raises:
        FileError: before the block, for a folder that is missing or holds something else; instead of any error within it.
    """
    if Path(source).is_dir():
        _check(Path(source))
    with loading_any(source):
        yield


@contextmanager
def loading_any(source: str | os.PathLike[str]) -> Iterator[None]:
    """Load a model of any kind within the block.

    Raises:
        FileError: before the block, for a folder that is missing; instead of any error within it.
    """
    if Path(source).is_file() or not (Path(source).is_dir() or _may_be_id(str(source))):
        raise FileError(
            f"{source}: there is no such folder; pass one that training/run.py wrote, or ORG/NAME of the Hub."
        )
    with about(source, "Is the folder complete? Copy or write it again; a model of the Hub needs its exact ORG/NAME."):
        yield


def holds_notellm2(source: str) -> bool:
    """Whether a folder, or an id of the Hub, holds a NoteLLM-2 model or an adapter of one.

    Raises:
        OSError: for a config.json that can't be read.
    """
    if model_type_of(source) == MODEL_TYPE:
        return True
    if Path(source).is_dir():
        return all((Path(source) / name).is_file() for name in (ADAPTER_CONFIG, "processor_config.json"))
    return find_adapter_config_file(source) is not None


def model_type_of(source: str) -> str | None:
    """What a model's config.json calls its architecture; None without that file.

    Raises:
        OSError: for one that can't be read.
    """
    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except OSError:
        if (Path(source) / "config.json").is_file():  # it is damaged
            raise
        return None
    return config.get("model_type")


def _check(folder: Path) -> None:
    if (folder / ADAPTER_CONFIG).is_file():
        return
    path = folder / "config.json"
    if not path.is_file():
        raise FileError(f"{folder}: there is no config.json in it; pass the model/ folder that training/run.py wrote.")
    with about(path, "Copy or write the folder again."):
        config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != MODEL_TYPE:
        raise FileError(
            f"{folder} is no NoteLLM-2 model but {kind or 'one of unknown type'}; hub/assemble.py joins an LLM with a "
            "vision encoder."
        )


def _may_be_id(source: str) -> bool:
    """Ids are NAME or ORG/NAME."""
    return source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not source.endswith("/")
