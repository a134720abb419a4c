"""Writes a model's card: what its folder and its figures say, filled into card.md.jinja."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hub.cards.findings import eval_results, findings, model_metrics, protocol, read_metrics, results_table
from hub.cards.model import DescribedModel, check_id, is_hub_id, read_model
from hub.cards.mteb_scores import mteb_results, read_scores
from training.tables.commands.files import atomic_write, write_text
from training.tables.commands.hashes import check_weights, weights_of
from training.tables.commands.markdown import as_text
from training.tables.commands.outputs import stranger_at


TEMPLATE = Path(__file__).with_name("card.md.jinja")
CARD = "README.md"
METRICS = "metrics.json"
PNG = b"\x89PNG\r\n\x1a\n"
MARKER = "<!-- written by hub/card.py: an edited card without this line is kept -->"
LIBRARY, TASK = "transformers", "feature-extraction"
TAGS = ["notellm2", "sentence-transformers", "multimodal", "item-to-item", "recommendation", "custom_code"]
"""`custom_code` and both libraries: AutoModel reads the folder (so the Hub's `library_name`), sentence-transformers too."""

SETTINGS = {
    "steps": "steps",
    "trained_parameters": "parameters trained",
    "all_parameters": "parameters of the whole model",
    "per_device_train_batch_size": "pairs in a batch, of each device",
    "gradient_accumulation_steps": "batches in a step",
    "learning_rate": "learning rate of the language model",
    "connector_learning_rate": "learning rate of what is new",
    "weight_decay": "weight decay",
    "warmup_steps": "warm-up (steps, or share below 1)",
    "lr_scheduler_type": "schedule",
    "lora_r": "LoRA rank",
    "use_dora": "DoRA",
    "load_in_4bit": "4-bit base (QLoRA)",
    "matryoshka_dims": "nested dimensions trained",
    "image_dropout": "share of items that lose their image",
    "text_dropout": "share of items that lose their text",
    "bf16": "bfloat16",
    "seed": "seed",
}
"""Of metrics.json's counts and settings those that say how it was trained. Never the others: they hold paths of a machine."""

COUNTS = {
    "items": "items",
    "train_pairs": "pairs trained on",
    "eval_items": "items evaluated on",
    "eval_pairs": "pairs evaluated on",
    "rejected_rows": "rows left out as unusable",
}


def write_card(
    model_folder: str | Path,
    metrics: str | Path | Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    languages: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    base_models: Sequence[str] | None = None,
    plots: Sequence[str | Path] = (),
    mteb: Sequence[str | Path] = (),
    replace: bool = False,
) -> Path:
    """Writes README.md into a model's folder; returns its path.

    Args:
        model_folder: what `save_pretrained` wrote: a whole model, or an adapter.
        metrics: metrics.json of `training/run.py` or evaluation.json of `training/evaluate.py`, or the content of one. None:
            the card says that nothing was measured.
        repo_id: ORG/NAME that the snippets load. None: they load ".", the folder itself.
        license: identifier of the Hub, e.g. "apache-2.0".
        languages: ISO 639 codes of the texts.
        datasets: Hub ids of the data.
        base_models: Hub ids of the backbones (of an adapter: of its base). None: as config.json (adapter_config.json) has
            them.
        plots: PNG files, copied into `assets/` and linked relatively.
        mteb: files with scores of mteb (`hub.cards.mteb_scores`).
        replace: also a README.md that this function didn't write.

    Raises:
        ValueError: for a folder that holds no model, metrics of another form or of other weights, an id that is none, a plot
            that is no PNG, or a README.md that is not ours.
        OSError: for a file that can't be read or written.
    """
    folder = Path(model_folder)
    path = folder / CARD
    if path.exists() and not replace and MARKER not in path.read_text(encoding="utf-8"):
        raise ValueError(f"{path} was not written by this command; pass replace (--replace) to write over it.")
    model, measured = read_model(folder), read_metrics(metrics)
    check_weights(METRICS if isinstance(metrics, Mapping) else str(metrics), measured, weights_of(folder))
    for hub_id in [*([repo_id] if repo_id else []), *(datasets or []), *(base_models or [])]:
        check_id(hub_id)
    name = (repo_id or folder.resolve().name).split("/")[-1]
    bases = list(base_models) if base_models is not None else [name for name in model.bases.values() if is_hub_id(name)]
    scores = read_scores(mteb, weights_of(folder))
    results = eval_results(measured, datasets[0] if datasets else None, ", ".join(datasets or []) or "own items")
    results += mteb_results(scores)
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=TASK,
        base_model=bases or None,
        base_model_relation=None if not bases else "adapter" if model.is_adapter else "finetune",
        datasets=list(datasets) if datasets else None,
        language=list(languages) if languages else None,
        license=license,
        tags=[*TAGS, *(["peft"] if model.is_adapter else [])],
        metrics=model_metrics(results) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=as_text(name),
        summary=summary(model),
        width=model.width,
        parts=model.parts,
        micl=model.config.get("micl", True),
        sentence_transformers=model.sentence_transformers,
        model_id=repo_id or ".",
        findings=findings(measured),
        results=results_table(measured),
        protocol=protocol(measured),
        mteb=scores,
        plots=copy_plots(plots, folder, replace),
        data=rows_of(measured.get("counts", {}), COUNTS),
        training=rows_of({**measured.get("settings", {}), **measured.get("counts", {})}, SETTINGS),
        limits=limits(model, measured, license, bool(scores)),
        marker=MARKER,
    )
    check_card(str(card))
    write_text(f"{str(card).rstrip()}\n", path)
    return path


def check_card(content: str) -> None:
    """What huggingface_hub can check without the network: the head is read back and gives the same again.

    Raises:
        ValueError: when it doesn't.
    """
    card = ModelCard(content)
    if ModelCard(str(card)).data.to_dict() != card.data.to_dict() or not card.data.to_dict():
        raise ValueError("The card's metadata don't read back as they were written.")


def summary(model: DescribedModel) -> str:
    """The card's first sentence."""
    what = "An adapter for a model that gives" if model.is_adapter else "Gives"
    return f"{what} one embedding to an item, a picture with its text, so that related items stand close together."


def rows_of(values: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, str]]:
    """The named values that are there and are not switched off, as rows to show."""
    shown_values = [(shown, values.get(name)) for name, shown in names.items()]
    return [
        (shown, f"{value:,}" if isinstance(value, int) and value is not True else _one_line(value))
        for shown, value in shown_values
        if value is not None and value is not False and value != [] and not (isinstance(value, float) and value == 0)
    ]


def limits(model: DescribedModel, metrics: Mapping[str, Any], license: str | None, has_scores: bool) -> list[str]:
    """Where the model stops, as far as its folder and figures tell; `has_scores`: of mteb."""
    sentences = []
    if model.limits:
        read = " and ".join(f"{count} characters of the {name}" for name, count in model.limits.items())
        sentences.append(f"It reads at most {read}; the rest is cut off.")
    if model.prompt_language:
        wording = {"zh": "Chinese", "en": "English"}.get(model.prompt_language, model.prompt_language)
        sentences.append(
            f"The prompt around an item is {wording}; items in other languages were not looked at separately."
        )
    counts = metrics.get("counts", {})
    if not metrics and not has_scores:
        sentences.append("Nothing was measured for this card: no metrics were given to the command that wrote it.")
    elif "train_pairs" in counts:
        sentences.append(
            f"Its figures hold for items like those it was trained on ({counts['train_pairs']:,} pairs) and measured on "
            f"({counts['eval_items']:,} items). Other catalogues need their own measurement."
        )
    for part, name in (("image", "picture"), ("text", "text")):
        if metrics and not any(key.startswith(f"{part}/") for key in metrics["after"]):
            sentences.append(f"The {name} alone was not measured.")
    if license is None:
        sentences.append("No license was stated.")
    return sentences


def copy_plots(plots: Sequence[str | Path], folder: Path, replace: bool = False) -> list[dict[str, str]]:
    """Puts PNG files into `assets/`; returns their names and relative paths.

    Raises:
        ValueError: for a file that is no PNG, or one that would be put in place of another that this program didn't make.
        OSError: for one that can't be read.
    """
    copied = []
    for plot in map(Path, plots):
        if plot.read_bytes()[:8] != PNG:
            raise ValueError(f"{plot}: a plot is a PNG file.")
        target = folder / "assets" / plot.name.replace(" ", "_")
        target.parent.mkdir(exist_ok=True)
        if plot.resolve() != target.resolve():
            if not replace and target.exists() and target.read_bytes() != plot.read_bytes() and stranger_at(target):
                raise ValueError(f"{target} is another picture; pass replace (--replace) to write over it.")
            with atomic_write(target) as place:
                shutil.copyfile(plot, place)
        copied.append({"name": as_text(plot.stem.replace("_", " ")), "path": f"assets/{target.name}"})
    return copied


def _one_line(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else "yes" if value is True else str(value)
    return as_text(text)
