"""The demo app as a Gradio Space: its code, index and items, and which model of the Hub it loads."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from hub.cards.model import check_id, is_hub_id
from hub.neighbours.index import RECORD
from hub.publishing.checks import RefusedError, file_faults
from hub.publishing.dataset import RejectsFile, write_items
from hub.publishing.model import portable
from hub.publishing.sending import Publication
from training.tables.items import load_items


ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("hub", "modeling_notellm2", "training/tables")
"""What of this project goes along: hub uses no more of training than its tables."""
CODE = (".py", ".jinja")
GROUP = "encode"
"""Dependency group of pyproject.toml that the app needs; Gradio comes with the Space."""
START = """# Starts the app with this Space's model, indexes and items.
from hub.app import main

if __name__ == "__main__":
    main({options})
"""
README = """# Related items

Pick an item or bring a picture and a text of your own, and see its neighbours by
[{model}](https://huggingface.co/{model}): by both, by the picture or by the text alone.
"""


@dataclass(frozen=True)
class SpaceDetails:
    """What the app shows.

    Attributes:
        repo: ORG/NAME of the Space.
        model: Hub id of the model.
        index, visual_index: folders that `hub/index.py` wrote, the second with `--visual`; None: there is none.
        items: item table that was indexed; a file's or folder's items are put into the Space with their pictures, a Hub
            dataset is named.
    """

    repo: str
    model: str
    index: str
    items: str
    visual_index: str | None = None
    split: str | None = None
    encoding: str | None = None
    allow_remote: str | None = None


def prepare_space(details: SpaceDetails, staging: Path, rejects: Path) -> Publication:
    """Puts together what the Space holds.

    Args:
        staging: an empty folder.
        rejects: file that lists items left out.

    Raises:
        ValueError: for a model that is no Hub id, or an index that isn't there.
        TableError: for items that can't be read.
        RefusedError: naming every reason against publishing.
    """
    check_model_id(details.model)
    check_id(details.repo)
    files: dict[str, Path] = {}
    options = {"model": details.model, "items": details.items, "host": "0.0.0.0"}
    for name, folder in (("index", details.index), ("visual_index", details.visual_index)):
        if folder is not None:
            files |= index_files(Path(folder), name, staging)
            options[name] = name
    files |= code_files()
    if Path(details.items).exists():
        options["items"] = "items"
        with RejectsFile(rejects) as listed:
            loaded = load_items(
                details.items, details.split, False, encoding=details.encoding, allow_remote=details.allow_remote
            )
            write_items(*loaded, staging / "items", listed, every_column=False)
        files |= {f"items/{path.name}": path for path in sorted((staging / "items" / "data").iterdir())}
    files |= write_texts(texts(details, options), staging)
    if faults := file_faults(files):
        raise RefusedError(faults)
    return Publication("space", files, ("index/*", "visual_index/*", "items/*"), sdk="gradio")


def write_texts(texts: Mapping[str, str], staging: Path) -> dict[str, Path]:
    """Texts made for a Space, written into `staging`, by their path in it."""
    for name, text in texts.items():
        (staging / name).write_text(text, encoding="utf-8")
    return {name: staging / name for name in texts}


def check_model_id(model: str) -> None:
    """Refuse what is no Hub id.

    Raises:
        ValueError: for a folder, or a name without an owner.
    """
    if Path(model).exists() or not is_hub_id(model):
        raise ValueError(f"{model}: a Space loads its model from the Hub. Publish it first, and name it ORG/NAME.")


def index_files(folder: Path, name: str, staging: Path) -> dict[str, Path]:
    """Files of an index by their path in the Space; their JSON without paths of this machine.

    Raises:
        ValueError: for a folder that is no index.
    """
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder}: no index; pass a folder that hub/index.py wrote.")
    record = staging / name / RECORD
    record.parent.mkdir()
    record.write_text(json.dumps(portable(json.loads((folder / RECORD).read_text(encoding="utf-8")))), encoding="utf-8")
    return {f"{name}/{path.name}": path for path in sorted(folder.iterdir())} | {f"{name}/{RECORD}": record}


def texts(details: SpaceDetails, options: dict[str, str]) -> dict[str, str]:
    """The Space's own files: entry point, requirements and README with the settings that the Hub reads."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = content["project"]
    requirements = [*project["dependencies"], *content["dependency-groups"][GROUP], "huggingface_hub"]
    settings = {
        "title": "Related items",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": project["requires-python"].strip(">=~"),
        "app_file": "app.py",
        "models": [details.model],
        "license": "apache-2.0",
        "tags": ["notellm2"],
    }
    head = yaml.safe_dump(settings, sort_keys=False)
    return {
        "app.py": START.format(options=[part for name, value in options.items() for part in (f"--{name}", value)]),
        "requirements.txt": "\n".join(requirements) + "\n",
        "README.md": f"---\n{head}---\n\n{README.format(model=details.model)}",
    }


def code_files() -> dict[str, Path]:
    """The project's code that the app needs, by its path in the Space."""
    paths = [ROOT / "training" / "__init__.py"]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in CODE]
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(paths)}
