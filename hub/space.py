"""The demo app as a Gradio Space: its code, index and items, and which model of the Hub it loads.

Of this project only the files that `hub/app.py` imports go along.
"""

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from hub.card_model import check_id, is_hub_id
from hub.dataset_publishing import RejectsFile, write_items
from hub.item_tables import open_items
from hub.publish_checks import RefusedError, file_faults, folder_files
from hub.publishing import Publication


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hub", "modeling_notellm2")
EXTRA = "encode"
"""Optional dependencies of pyproject.toml that the app needs; Gradio comes with the Space."""
START = '''"""Starts the app with this Space's model, index and items."""

import sys

from hub.app import main


if __name__ == "__main__":
    sys.argv[1:] = ["--model", "{model}", "--index", "index", "--items", "{items}"]
    sys.exit(main())
'''
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
        index: folder that `hub/index.py` wrote.
        items: item table that was indexed; a file's or folder's items are put into the Space with their pictures, a Hub
            dataset is named.
    """

    repo: str
    model: str
    index: str
    items: str


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
    if Path(details.model).exists() or not is_hub_id(details.model):
        raise ValueError(
            f"{details.model}: a Space loads its model from the Hub. Publish it first, and name it ORG/NAME."
        )
    check_id(details.repo)
    index, faults = folder_files(Path(details.index)) if Path(details.index).is_dir() else ({}, [])
    if not index:
        raise ValueError(f"{details.index}: no index; pass a folder that hub/index.py wrote.")
    files = {f"index/{name}": path for name, path in index.items()}
    files |= {path.relative_to(ROOT).as_posix(): path for path in code_files("hub.app")}
    items = details.items
    if Path(items).exists():
        items = "items"
        with RejectsFile(rejects) as listed:
            write_items(open_items(details.items), staging / "items", listed, set())
        files |= {f"items/{path.name}": path for path in sorted((staging / "items" / "data").iterdir())}
    for name, text in texts(details, items).items():
        (staging / name).write_text(text, encoding="utf-8")
        files[name] = staging / name
    faults += file_faults(files)
    if faults:
        raise RefusedError(faults)
    return Publication("space", files, ("index/*", "items/*"), sdk="gradio")


def texts(details: SpaceDetails, items: str) -> dict[str, str]:
    """The Space's own files: entry point, requirements and README with the settings that the Hub reads."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"][EXTRA], "huggingface_hub"]
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
        "app.py": START.format(model=details.model, items=items),
        "requirements.txt": "\n".join(requirements) + "\n",
        "README.md": f"---\n{head}---\n\n{README.format(model=details.model)}",
    }


def code_files(module: str) -> list[Path]:
    """Files of this project that a module needs: those it imports, and theirs, with the templates they name."""
    found: dict[Path, None] = {}
    pending = [module]
    while pending:
        path = ROOT.joinpath(*pending.pop().split(".")).with_suffix(".py")
        path = path if path.is_file() else path.with_suffix("") / "__init__.py"
        if path.is_file() and path not in found:
            found[path] = None
            found[path.with_name("__init__.py")] = None
            pending += imports_of(path)
            text = path.read_text(encoding="utf-8")
            found |= {
                other: None
                for other in path.parent.iterdir()
                if other.suffix in (".jinja", ".css") and other.name in text
            }
    return sorted(found)


def imports_of(path: Path) -> Iterator[str]:
    """Modules of this project that a file imports, in functions too."""
    package = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module}" if node.level else node.module or ""
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)
