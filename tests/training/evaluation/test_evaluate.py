"""`training/evaluate.py` as a user calls it, on a tiny model and on items drawn on the spot."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from tests.conftest import make_model
from training.batches.collators import ItemCollator
from training.evaluate import EvaluateArguments, run
from training.evaluation.embed import NoteLLM2Embedder, embed, evaluate_in_training, views
from training.evaluation.evidence import evaluate_model
from training.evaluation.measuring import MeasureOptions
from training.evaluation.metrics import multi_positive_metrics
from training.evaluation.retrieval import precision_at_k, rank_all_targets, rank_targets
from training.tables.items import load_items
from training.tables.pairs import trained_share


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """A second model: without late fusion."""
    folder = tmp_path_factory.mktemp("other")
    model, processor = make_model(late_fusion=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(coloured_tables, tiny_model_folder, other_folder, tmp_path_factory):
    """The folder of an evaluation from the command line, and what it printed."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    command = [
        *(sys.executable, "training/evaluate.py", "--model", tiny_model_folder, "--compare", other_folder),
        *("--items", coloured_tables / "items.parquet", "--pairs", coloured_tables / "test.jsonl"),
        *("--train_pairs", coloured_tables / "train.jsonl", "--eval_split", "test", "--label_column", "colour"),
        *("--output", output, "--resamples", "200", "--ks", "1", "5", "20", "--examples", "4", "--dtype", "float32"),
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr  # the tables have rejects
    return output, done.stdout


@pytest.fixture(scope="module")
def report(evaluated):
    return json.loads((evaluated[0] / "evaluation.json").read_text())


def test_figures_are_those_of_the_models_embeddings(report, coloured_tables, tiny_model_folder):
    items, _ = load_items(str(coloured_tables / "items.parquet"))
    items = items.select(items.where("split", "test"))
    pairs = [json.loads(line) for line in (coloured_tables / "test.jsonl").open()]
    pairs = [(pair["query_id"], pair["target_id"]) for pair in pairs]
    model = AutoModel.from_pretrained(tiny_model_folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tiny_model_folder, trust_remote_code=True)
    embedded = embed(model, items, ItemCollator(processor), 32, "items").embeddings
    ids = list(items.item_ids)

    published, multi_positive = rank_targets(embedded, ids, pairs), rank_all_targets(embedded, ids, pairs)

    found = report["metrics"]["both"]
    assert (found["published"]["queries"], found["published"]["candidates"]) == (
        len(published.ranks),
        published.pool_size,
    )
    for k in (1, 5, 20):
        metric = found["published"]["metrics"][f"recall@{k}"]
        assert metric["value"] == pytest.approx(published.recall(k))
        assert metric["low"] <= metric["value"] <= metric["high"]
        assert found["published"]["random"][f"recall@{k}"] == pytest.approx(published.expected_recall(k))
    expected = multi_positive_metrics(multi_positive, [1, 5, 20])
    values = {name: metric["value"] for name, metric in found["multi_positive"]["metrics"].items()}
    assert values == pytest.approx({name: value.mean() for name, value in expected.items()})
    precision = found["labels"]["metrics"]["precision@10"]["value"]
    assert precision == pytest.approx(precision_at_k(embedded, items.column("colour"), 10))
    assert set(report["metrics"]) == {"both", "image", "text", "visual"}


def test_examples_are_the_best_and_the_worst(report):
    examples = report["examples"]
    best, worst = ([one["rank"] for one in examples[name]] for name in ("best", "worst"))
    assert len(best) == len(worst) == 4
    assert best == sorted(best) and worst == sorted(worst, reverse=True) and best[-1] <= worst[-1]
    for one in examples["best"] + examples["worst"]:
        scores = [near["score"] for near in one["neighbours"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        place = [near["item_id"] for near in one["neighbours"]].index(one["target_id"]) if one["rank"] <= 5 else None
        assert place is None or place <= one["rank"] - 1


def test_slices_and_comparison_are_whole(report):
    both = [row for row in report["slices"] if row["embedding"] == "both"]
    queries = report["metrics"]["both"]["published"]["queries"]
    sums = {row["group"]: 0 for row in both}
    for row in both:
        sums[row["group"]] += row["queries"]
    assert set(sums.values()) == {queries} and len(sums) == 8
    assert {row["slice"] for row in both if row["group"] == "unseen items"} == {"both unseen"}

    found = report["comparison"][0]["embeddings"]["both"]["published"]["recall@5"]
    assert found["value"] == report["metrics"]["both"]["published"]["metrics"]["recall@5"]["value"]
    assert found["difference"] == pytest.approx(found["value"] - found["other"])
    assert 0 < found["p_value"] <= 1
    differences = report["comparison"][0]["embeddings"]
    assert any(one["difference"] for part in differences.values() for one in part["multi_positive"].values())


def test_files_are_whole_and_say_the_same(evaluated, report):
    output, printed = evaluated
    assert not list(output.rglob(".*.partial"))
    assert [json.loads(line)["ids"] for line in (output / "rejects.jsonl").open()] == [["broken"]]
    assert report["counts"]["rejected_rows"] == 1
    metric = report["metrics"]["both"]["published"]["metrics"]["recall@5"]
    shown = f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"
    text = (output / "evaluation.md").read_text()
    assert shown in text and "long (over" in text and f"{metric['value']:.3f}" in printed
    widths = {line.count("|") for line in text.split("## Slices")[1].split("## ")[0].splitlines() if line}
    assert len(widths - {0}) == 1
    assert set(report["plots"]) == {"recall", "ranks", "comparison", *(f"slices_{name}" for name in report["metrics"])}
    for place in report["plots"].values():
        with Image.open(output / place) as image:
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn


def test_a_model_does_not_differ_from_itself_and_keeps_its_mode(coloured_tables, tiny_model_folder):
    items, _ = load_items(str(coloured_tables / "items.parquet"))
    items = items.select(range(30))
    model = AutoModel.from_pretrained(tiny_model_folder, trust_remote_code=True).train()
    processor = AutoProcessor.from_pretrained(tiny_model_folder, trust_remote_code=True)
    pairs = np.array([(a, a + 6) for a in range(24)])

    embedder = NoteLLM2Embedder(model, ItemCollator(processor))
    report = evaluate_model(embedder, items, pairs, MeasureOptions(ks=[5], resamples=20), others=[embedder])

    assert model.training
    for protocols in report["comparison"][0]["embeddings"].values():
        for metrics in protocols.values():
            assert all((one["difference"], one["p_value"]) == (0, 1) for one in metrics.values())
    assert not any("popularity" in row["group"] or "category" in row["group"] for row in report["slices"])


def test_an_item_whose_only_picture_cannot_be_read_counts_nowhere_unless_by_text(coloured_tables, tiny_model_folder):
    """As in training and encoding, also where tables are too large for their pictures to be opened first."""
    items, _ = load_items(str(coloured_tables / "items.parquet"), check_images=False)
    broken = list(items.item_ids).index("broken")
    without_image = list(items.item_ids).index("i7")
    items = items.select([without_image, 1, 2, 3, broken])
    processor = AutoProcessor.from_pretrained(tiny_model_folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(tiny_model_folder, trust_remote_code=True)
    pairs = np.array([(1, 2), (1, 4), (0, 4), (2, 3)])

    embedded = {view.name: view for view in views(NoteLLM2Embedder(model, ItemCollator(processor)), items, pairs)}

    positions = {name: view.positions for name, view in embedded.items()}
    shown = [1, 2, 3]
    assert positions == {"both": [0, 1, 2, 3], "image": shown, "visual": shown, "text": [0, 1, 2, 3, 4]}
    assert all(len(view.embeddings) == len(view.positions) for view in embedded.values())
    in_training = evaluate_in_training(model, ItemCollator(processor), items, pairs)
    assert in_training["recall@1"] == rank_targets(embedded["both"].embeddings, [0, 1, 2, 3], pairs.tolist()).recall(1)


def test_mistakes_are_named(coloured_tables, tiny_model_folder, tmp_path):
    tables = {"items": f"{coloured_tables}/items.parquet", "pairs": f"{coloured_tables}/test.jsonl"}
    with pytest.raises(ValueError, match="'split' says 'nowhere'"):
        run(
            EvaluateArguments(model=str(tiny_model_folder), **tables, output=str(tmp_path), eval_split="nowhere"),
            MeasureOptions(),
        )
    with pytest.raises(ValueError, match="no column 'flavour'"):
        run(
            EvaluateArguments(model=str(tiny_model_folder), **tables, output=str(tmp_path), label_column="flavour"),
            MeasureOptions(),
        )
    with pytest.raises(ValueError, match="ks are positive"):
        MeasureOptions(ks=[0])


def test_one_query_is_measured_and_a_train_pair_is_said(coloured_tables, tiny_model_folder, tmp_path, caplog):
    line = (coloured_tables / "test.jsonl").read_text().splitlines()[0]
    pair = json.loads(line)
    (tmp_path / "one.jsonl").write_text(line + "\n")
    swapped = {"query_id": pair["target_id"], "target_id": pair["query_id"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(swapped) + '\n{"query_id": "i1", "target_id": "lost"}\n')
    items = tmp_path / "items.parquet"
    pq.write_table(pq.read_table(coloured_tables / "items.parquet").slice(70, 16), items)
    arguments = EvaluateArguments(
        str(items),
        str(tmp_path / "one.jsonl"),
        str(tmp_path / "out"),
        compare=[str(tiny_model_folder)] * 2,
        label_column="colour",
        train_pairs=str(tmp_path / "train.jsonl"),
    )
    logging.enable_propagation()
    try:
        report = run(arguments, MeasureOptions(ks=[1, 1_000_000], resamples=50))
    finally:
        logging.disable_propagation()
    assert report["trained_share"] == 1.0
    assert "100.0% of the pairs to measure on (1 of 1) are train pairs" in caplog.text
    for protocol in ("published", "multi_positive"):
        measured = report["metrics"]["both"][protocol]
        assert measured["queries"] == 1
        assert measured["metrics"]["recall@1000000"]["value"] == 1
    assert (tmp_path / "out" / "evaluation.md").exists()
    assert trained_share(np.array([[0, 1], [2, 3], [4, 5]]), np.array([[1, 0], [3, 4], [-1, 5], [2, -1]])) == 1 / 3
