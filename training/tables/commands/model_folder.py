"""Whether a folder holds a NoteLLM-2 model, and errors of loading one that name it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.tables.commands.handler import FileError, about


MODEL_TYPE = "notellm2"
ADAPTER_CONFIG = "adapter_config.json"


@contextmanager
def loading(source: str | os.PathLike[str]) -> Iterator[None]:
    """Load a model within the block.

    Args:
        source: folder of a model or an adapter, or id of one on the Hub.

    Raises:
        FileError: before the block, for a folder that is missing or holds something else; instead of any error within it.
    """
    folder = Path(source)
    if folder.is_dir():
        _check(folder)
    elif folder.is_file() or not _may_be_id(str(source)):
        raise FileError(
            f"{source}: there is no such folder; pass one that training/run.py wrote, or ORG/NAME of the Hub."
        )
    with about(source, "Is the folder complete? Copy or write it again; a model of the Hub needs its exact ORG/NAME."):
        yield


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
