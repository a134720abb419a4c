"""The page about a run: whole and self-contained, hostile texts harmless, honest about what a run doesn't have."""

import base64
import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import datasets
import pytest
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.support.browser import open_page
from training.batches.collators import ItemCollator
from training.evaluation.embed import embed, evaluate
from training.evaluation.run_figures import write_evaluation
from training.report import ReportArguments, report
from training.reporting.page import headline, write_report
from training.run import run
from training.tables.commands.files import write_json
from training.tables.commands.handler import FileError
from training.tables.commands.hashes import weights_of
from training.tables.commands.outputs import GENERATOR
from training.tables.items import load_items
from training.tables.pairs import load_pairs
from training.trainer.arguments import parse


HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & {{ 7 * 7 }}'


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words += data

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]


def page_of(run_folder: Path) -> Page:
    return Page((run_folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tables(coloured_tables, tmp_path_factory):
    """The coloured items, one in the evaluation with a hostile title."""
    folder = tmp_path_factory.mktemp("hostile")
    items = datasets.Dataset.from_parquet(str(coloured_tables / "items.parquet"))
    titles = list(items["title"])
    titles[80] = HOSTILE
    features = items.features
    items = (
        items.remove_columns("title")
        .add_column("title", titles)
        .cast(datasets.Features({name: features[name] for name in [*(n for n in features if n != "title"), "title"]}))
    )
    items.to_parquet(folder / "items.parquet")
    for name in ("train", "test"):
        shutil.copy(coloured_tables / f"{name}.jsonl", folder)
    return folder


def train(model: Path, tables: Path, folder: Path, **more: object) -> None:
    """A run of a few steps with everything that a report shows."""
    options = {
        "model": model,
        "items": tables / "items.parquet",
        "train_pairs": tables / "train.jsonl",
        "eval_pairs": tables / "test.jsonl",
        "eval_split": "test",
        "label_column": "colour",
        "distinct_column": "colour",
        "output_dir": folder,
        "report": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": True,
        "report_to": "none",
        "lora_r": 2,
        "merge_adapter": True,
        **more,
    }
    run(*parse([word for name, value in options.items() for word in (f"--{name}", str(value))]))


@pytest.fixture(scope="module")
def finished(tables, tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_model_folder, tables, folder)
    return folder


def test_a_run_writes_its_page(finished):
    page, metrics = page_of(finished), json.loads((finished / "metrics.json").read_text())
    evaluation = json.loads((finished / "evaluation.json").read_text())
    for name, value in headline(metrics):
        assert value in page.words and name in page.words
    assert {"before training", "after training"} == set(metrics["saliency"])
    assert len(metrics["saliency"]["after training"]["multimodal"]["visual"]) == 2
    # the evaluation is of the trained model: as metrics.json has it
    found = evaluation["metrics"]["both"]["published"]["metrics"]["recall@10"]["value"]
    assert found == pytest.approx(metrics["after"]["both/recall@10"])
    pictures = page.images()
    assert len(pictures) > len(evaluation["plots"]) + 2 + 12 * 7
    assert {"curves.png", "saliency.png", "recall.png"} <= {path.name for path in (finished / "plots").iterdir()}
    for words in ("Training report: run", "Slices of the queries", "answers worst", "per_device_train_batch_size"):
        assert words in page.words


def test_what_is_measured_is_what_is_saved(finished, tables):
    """Training ran in bfloat16 autocast; the figures are the saved model's own, to the last digit that it prints."""
    metrics = json.loads((finished / "metrics.json").read_text())
    items, _ = load_items(str(tables / "items.parquet"))
    items = items.select(items.where("split", "test"))
    table, _ = load_pairs(str(tables / "test.jsonl"), items)
    model = AutoModel.from_pretrained(finished / "model").eval()
    processor = AutoProcessor.from_pretrained(finished / "model")
    again = evaluate(model, ItemCollator(processor), items, table.pairs, items.column("colour"))
    assert again == pytest.approx(metrics["after"])


def test_a_report_that_fails_costs_no_model(tables, tiny_model_folder, tmp_path, monkeypatch):
    """Nor do an older page and metrics stand beside the new model; a picture that can't be read is listed once for all passes."""
    items = datasets.Dataset.from_parquet(str(tables / "items.parquet"))
    unreadable = {"bytes": b"no picture", "path": None}
    spoiled = items.map(
        lambda item: {**item, "image": unreadable} if item["item_id"] == "i90" else item, features=items.features
    )
    shutil.copytree(tables, tmp_path / "tables")
    spoiled.to_parquet(tmp_path / "tables" / "items.parquet")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("report.html", "metrics.json", "plots/curves.png"):
        write_json(GENERATOR, folder / name)

    def fail(*arguments):
        write_evaluation(*arguments)
        raise MemoryError

    passes = []
    monkeypatch.setattr("training.evaluation.embed.embed", lambda *given: (passes.append(given[4]), embed(*given))[1])
    monkeypatch.setattr("training.evaluation.run_figures.write_evaluation", fail)
    with pytest.raises(MemoryError):
        train(tiny_model_folder, tmp_path / "tables", folder, check_images=False)
    assert AutoModel.from_pretrained(folder / "model", trust_remote_code=True)
    assert not (folder / "report.html").exists()
    assert not (folder / "metrics.json").exists()
    assert not (folder / "plots" / "curves.png").exists()
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["ids"] == ["i90"] for line in lines) == 1
    assert passes == ["both", "both", "image", "text"]  # before, and after: once for metrics.json and the page alike


def test_nothing_from_outside_and_no_text_is_markup(finished):
    page = page_of(finished)
    assert HOSTILE in page.words
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "://" not in text and "url(" not in text and "srcset" not in text
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 420])
def test_it_comes_out_in_a_browser(finished, tmp_path, width):
    picture = tmp_path / "page.png"
    with open_page(width, 3000) as page:
        page.goto((finished / "report.html").as_uri())
        page.screenshot(path=picture)
    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert len(colours) > 1000
    assert max(count for count, _ in colours) < 0.9 * width * 3000


def test_metrics_and_evaluation_name_the_weights_and_a_page_of_others_is_refused(finished, tables, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    metrics, evaluation = (json.loads((finished / f"{name}.json").read_text()) for name in ("metrics", "evaluation"))
    assert metrics["weights"] == evaluation["weights"] == weights_of(finished / "model")
    arguments = ReportArguments(str(tmp_path / "run"), str(tables / "items.parquet"))
    report(arguments)
    write_json({**evaluation, "weights": {"model.safetensors": "of another"}}, tmp_path / "run" / "evaluation.json")
    with pytest.raises(FileError, match=r"evaluation\.json: its figures are of other weights"):
        report(arguments)
    (tmp_path / "run" / "evaluation.json").unlink()
    with (tmp_path / "run" / "model" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    with pytest.raises(FileError, match=r"metrics\.json: its figures are of other weights"):
        report(arguments)


def test_a_second_run_in_the_same_folder_replaces_the_first(finished, tables, tiny_model_folder, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    train(tiny_model_folder, tables, tmp_path / "run", max_steps=1, report=False)
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert list((tmp_path / "run" / "plots").iterdir()) == []
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["weights"] == weights_of(tmp_path / "run" / "model") != weights_of(finished / "model")


def test_what_a_run_does_not_have_is_said(finished, tmp_path):
    metrics = json.loads((finished / "metrics.json").read_text())
    metrics |= {"after": {}, "before": {}, "random": {}, "baselines": {}, "saliency": {}, "log": []}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    write_report(tmp_path, None)
    page = page_of(tmp_path)
    assert page.images() == []
    for words in ("no pairs to evaluate on", "no evaluation.json", "no pictures", "logged nothing", "was not measured"):
        assert words in page.words


def test_the_command_and_a_picture_that_has_gone(finished, tables, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    items, _ = load_items(str(tables / "items.parquet"))
    command = [
        sys.executable,
        "training/report.py",
        "--run",
        str(tmp_path / "run"),
        "--items",
        str(tables / "items.parquet"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in done.stdout
    assert write_report(tmp_path / "run", items.select([0, 1])).exists()  # ids alone for items that are not there
    done = subprocess.run([*command[:3], str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no folder of a finished run" in done.stderr
