"""A model's or adapter's folder made ready for the Hub: with card, metrics and license, and nothing that must not go there.

Everything is put together in a folder of links beside the user's, which stays as it is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub.cards.model import check_id, is_hub_id
from hub.cards.writing import CARD, MARKER, METRICS, write_card
from hub.publishing.checks import Fault, RefusedError, file_faults, folder_files
from hub.publishing.load_check import load_faults
from hub.publishing.sending import Publication
from training.tables.commands.handler import FileError
from training.tables.commands.hashes import check_weights, weights_of


LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
"""Goes with the code files, whose license it is, unless the folder has one of its own."""
ADAPTER_CONFIG = "adapter_config.json"
PEFT_CARD = "Model Card for Model ID"
"""Headline of the empty card that peft writes beside an adapter."""
CARD_PLOTS = ("curves.png", "recall.png", "saliency.png")
"""What the card shows of the plots that a run with a report left beside metrics.json."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", ADAPTER_CONFIG)


@dataclass(frozen=True)
class ModelDetails:
    """What only the model's owner knows.

    Attributes:
        repo: ORG/NAME, for the card's snippets.
        base: ORG/NAME of an adapter's base.
        base_models: Hub ids of a model's backbones; None: those that its config names.
        metrics: metrics.json; None: the one in the folder or beside it, if any.
        license: of the weights, as the Hub names it.
        languages: ISO 639 codes.
        datasets: Hub ids of the data trained on.
    """

    repo: str
    base: str | None = None
    base_models: Sequence[str] | None = None
    metrics: str | None = None
    license: str | None = None
    languages: Sequence[str] | None = None
    datasets: Sequence[str] | None = None


def prepare_model(folder: Path, staging: Path, details: ModelDetails) -> Publication:
    """Puts together and checks what goes to the Hub.

    Args:
        folder: of a model or adapter; not written to.
        staging: an empty folder.

    Raises:
        RefusedError: naming every reason against publishing.
        ValueError: for a folder that isn't there, ids that are not valid, or metrics of another form.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder.")
    files, faults = folder_files(folder)
    for name, path in files.items():
        link = staging / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    is_adapter = ADAPTER_CONFIG in files
    if is_adapter:
        faults += name_base(staging / ADAPTER_CONFIG, details.base, details.repo)
    if not faults:
        faults += add_documents(folder, staging, details, is_adapter)
    staged = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
    faults += file_faults(staged, folder)
    faults += load_faults(staging, needs_network=is_adapter) if not (is_adapter and faults) else []
    if faults:
        raise RefusedError(faults)
    return Publication("model", staged, WEIGHTS)


def name_base(config: Path, base: str | None, repo: str) -> list[Fault]:
    """Writes an adapter's base as a Hub id, by which everyone finds it."""
    content = json.loads(config.read_text(encoding="utf-8"))
    named = content.get("base_model_name_or_path") or ""
    if base is None and not is_hub_id(named):
        what = f"the base model is {named!r}, which is found on this machine alone"
        return [Fault(config.name, what, "Publish the base and name it with --base ORG/BASE.")]
    if repo == (base or named):
        return [Fault(config.name, "adapter and base are one repository", "Give the adapter a --repo of its own.")]
    if base is not None:
        check_id(base)
        config.unlink()  # a link to the user's file
        content["base_model_name_or_path"] = base
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return []


def add_documents(folder: Path, staging: Path, details: ModelDetails, is_adapter: bool) -> list[Fault]:
    """Adds LICENSE, metrics.json and the card, with the run's plots, where the folder has none. A card that someone wrote
    stays. Metrics of other weights are a fault."""
    if not (staging / "LICENSE").exists():
        (staging / "LICENSE").symlink_to(LICENSE)
    metrics = find_metrics(folder, details.metrics)
    if metrics is not None:
        published = staging / METRICS
        content = portable(json.loads(metrics.read_text(encoding="utf-8")))
        try:
            check_weights(metrics, content, weights_of(staging))
        except FileError as error:
            return [Fault(METRICS, str(error), "Name the result with --metrics, or move this one away.")]
        published.unlink(missing_ok=True)
        published.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    card = staging / CARD
    text = card.read_text(encoding="utf-8") if card.exists() else MARKER
    plots = find_plots(metrics)
    if MARKER in text or PEFT_CARD in text:
        for made_anew in (card, *(staging / "assets" / plot.name for plot in plots)):
            made_anew.unlink(missing_ok=True)  # a link to the user's file
    if details.metrics or not card.exists():
        write_card(
            staging,
            metrics,
            details.repo,
            license=details.license,
            languages=details.languages,
            datasets=details.datasets,
            base_models=[details.base] if is_adapter and details.base else details.base_models,
            plots=plots,
        )
    return []


def find_plots(metrics: Path | None) -> list[Path]:
    """Those of `CARD_PLOTS` that stand in plots/ beside metrics.json."""
    places = [] if metrics is None else [metrics.parent / "plots" / name for name in CARD_PLOTS]
    return [place for place in places if place.is_file()]


def find_metrics(folder: Path, named: str | None) -> Path | None:
    """metrics.json that was named, or that `training/run.py` left in the folder or beside it.

    Raises:
        ValueError: for a named file that isn't there.
    """
    if named is not None and not Path(named).is_file():
        raise ValueError(f"{named}: no such file.")
    candidates = [Path(named)] if named is not None else [folder / METRICS, folder.resolve().parent / METRICS]
    return next((path for path in candidates if path.is_file()), None)


def portable(content: Any) -> Any:
    """JSON with the last part of every absolute path in place of the path."""
    if isinstance(content, dict):
        return {key: portable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [portable(value) for value in content]
    return Path(content).name if isinstance(content, str) and Path(content).is_absolute() else content
