"""The server of hub/serve.py as a Docker Space: its Dockerfile, code and index, and which model of the Hub it loads."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from hub.cards.model import check_id
from hub.publishing.checks import RefusedError, file_faults
from hub.publishing.sending import Publication
from hub.publishing.space import ROOT, check_model_id, code_files, index_files, write_texts


DOCKERFILE = ROOT / "hub" / "serving" / "Dockerfile"
BUILD = ("pyproject.toml", "constraints.txt", "LICENSE")
"""What the Dockerfile copies beside code and README."""
PORT = 8000
README = """# Embeddings of items over HTTP

By [{model}](https://huggingface.co/{model}), in OpenAI's form at `/v1/embeddings`, for items with title, text and picture at
`/embed`{search}. `/docs` describes all. A secret `NOTELLM2_API_KEY` of this Space makes a key necessary; a private model
needs a secret `HF_TOKEN`.
"""


@dataclass(frozen=True)
class ServerDetails:
    """What is served.

    Attributes:
        repo: ORG/NAME of the Space.
        model: Hub id of the model.
        index: folder that `hub/index.py` wrote, for `/search`; None: there is none.
    """

    repo: str
    model: str
    index: str | None = None


def prepare_server(details: ServerDetails, staging: Path) -> Publication:
    """Puts together what the Space holds.

    Args:
        staging: an empty folder.

    Raises:
        ValueError: for a model that is no Hub id, or an index that isn't there.
        RefusedError: naming every reason against publishing.
    """
    check_model_id(details.model)
    check_id(details.repo)
    files = code_files() | {name: ROOT / name for name in BUILD}
    lines = [f"ENV NOTELLM2_MODEL={details.model}"]
    if details.index is not None:
        files |= index_files(Path(details.index), "index", staging)
        lines += ["COPY index index", "ENV NOTELLM2_INDEX=index"]
    texts = {
        "Dockerfile": "\n".join([DOCKERFILE.read_text(encoding="utf-8"), "# This Space's own.", *lines, ""]),
        "README.md": _readme(details),
    }
    files |= write_texts(texts, staging)
    if faults := file_faults(files):
        raise RefusedError(faults)
    return Publication("space", files, ("index/*",), sdk="docker")


def _readme(details: ServerDetails) -> str:
    settings = {
        "title": "Embeddings of items",
        "sdk": "docker",
        "app_port": PORT,
        "models": [details.model],
        "license": "apache-2.0",
        "tags": ["notellm2"],
    }
    search = "" if details.index is None else ", and the nearest items at `/search`"
    return f"---\n{yaml.safe_dump(settings, sort_keys=False)}---\n\n{README.format(model=details.model, search=search)}"
