"""The experiments on the paper's findings: which runs a config asks for, resuming, tables, and tiny runs to the end."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoModel, set_seed

from training.experiments import findings, findings_table
from training.experiments.findings import Experiment, FindingsConfig, plan, read_config, read_results, run_all
from training.experiments.findings_runs import ITEM_TRANSFORMS, blanked, build, telling
from training.experiments.findings_table import estimate, group, render


ROOT = Path(__file__).parents[3]
PARTS = ["Base", "+ mICL", "+ late fusion", "late fusion only", "NoteLLM-2"]


@pytest.fixture(scope="module")
def shipped():
    return read_config(ROOT / "training" / "experiments" / "findings.yaml")


def test_the_shipped_config_asks_for_the_papers_comparisons(shipped):
    runs = plan(shipped)
    asked = Counter((run.data, run.variant) for run in runs if run.items == "as they are")
    for data in ("emoji", "openmoji"):
        assert all(asked[data, variant] >= 5 for variant in [*PARTS, "text only"])
    seeds = Counter(run.seed for run in runs if run.variant == "Base" and run.experiment == runs[0].experiment)
    assert seeds == dict.fromkeys(range(5), 2)
    assert {"linear map", "MiniLM", "MiniLM, trained", "frozen vision"} <= {run.variant for run in runs}
    assert {run.variant for run in runs if run.items == "blanked"} >= {"Base", "NoteLLM-2", "text only"}

    settings = {run.variant: run.settings for run in runs}
    fields = ("early_fusion", "micl", "late_fusion")
    assert {name: tuple(settings[name][field] for field in fields) for name in PARTS} == {
        "Base": (True, False, False),
        "+ mICL": (True, True, False),
        "+ late fusion": (True, False, True),
        "late fusion only": (False, False, True),
        "NoteLLM-2": (True, True, True),
    }
    assert {s["multimodal_loss_weight"] for s in settings.values() if "multimodal_loss_weight" in s} == {1, 3}
    assert {s["num_query_tokens"] for s in settings.values() if "num_query_tokens" in s} == {1, 4, 32}


def test_every_run_is_named_once_by_all_that_it_depends_on(shipped):
    runs = plan(shipped)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len({(run.experiment, run.key) for run in runs}) == len(runs)
    of = {}
    for run in runs:
        of.setdefault(run.key, set()).add((run.data, run.variant, run.seed, run.items))
    assert all(len(what) == 1 for what in of.values())
    longer = replace(shipped, training={**shipped.training, "max_steps": 7})
    assert not {run.key for run in plan(longer)} & set(of)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("experiments: [{name: a, sets: [x], seeds: 1, variants: [Bse]}]", "names unknown Bse"),
        ("experiments: [{name: a, sets: [y], seeds: 1, variants: [Base]}]", "names unknown y"),
        ("experiments: [{name: a, sets: [x], seeds: 1, variants: [Base], items: short}]", "names unknown short"),
        ("experiments: [{name: a, sets: [x], seed: 1, variants: [Base]}]", "seed"),
        ("steps: 3", "experiments"),
        ("experiments: []\nsteps: 3", "steps"),
    ],
)
def test_mistakes_in_a_config_are_named(tmp_path, line, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"base: b\nresults: r\nsets: {{x: folder}}\nvariants: {{Base: {{}}}}\n{line}\n")
    with pytest.raises(ValueError, match=f"wrong.yaml.*{message}"):
        read_config(path)


def config_of(tmp_path, **changes):
    fields = {
        "base": "base",
        "results": str(tmp_path / "runs" / "results.jsonl"),
        "sets": {"x": "folder of x", "y": "folder of y"},
        "variants": {"Base": {"micl": False}, "NoteLLM-2": {}},
        "experiments": [
            Experiment("parts", ["x", "y"], 2, ["Base", "NoteLLM-2"]),
            Experiment("sweep", ["x"], 1, ["NoteLLM-2"]),
        ],
    }
    return FindingsConfig(**{**fields, **changes})


def test_a_restarted_script_does_what_is_missing(tmp_path, monkeypatch):
    """Killed in its fourth run, it goes on with it; a run of two experiments is carried out once."""
    carried_out = []

    def measure(base, folder, variant, settings, form, seed, training):
        carried_out.append((folder, variant, seed))
        if len(carried_out) == 4:
            raise KeyboardInterrupt
        return {"both/recall@10": 0.5}

    monkeypatch.setattr(findings, "measure_run", measure)
    config = config_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_all(config, plan(config))
    path = Path(config.results)
    before = path.read_text()
    assert len(read_results(path)) == 3
    run_all(config, plan(config))
    assert path.read_text().startswith(before)
    everything = {(f"folder of {data}", v, seed) for data in "xy" for v in ("Base", "NoteLLM-2") for seed in (0, 1)}
    assert set(carried_out) == everything and len(carried_out) == 9
    lines = read_results(path)
    assert Counter(line["experiment"] for line in lines) == {"parts": 8, "sweep": 1}
    assert {line["key"] for line in lines} == {run.key for run in plan(config)}
    assert [file.name for file in path.parent.iterdir()] == ["results.jsonl"]

    run_all(config, plan(config))
    assert len(carried_out) == 9
    run_all(replace(config, training={"max_steps": 3}), plan(replace(config, training={"max_steps": 3})))
    assert len(carried_out) == 17


def line(variant, seed, experiment="parts", **metrics):
    named = {name.replace("_", "/", 1).replace("_at_", "@"): value for name, value in metrics.items()}
    return {
        "experiment": experiment, "data": "x", "variant": variant, "seed": seed, "items": "as they are",
        "key": f"{variant}{seed}", "metrics": named, "seconds": 1.0,
    }  # fmt: skip


LINES = [
    line("Base", 0, both_recall_at_100=0.1, image_recall_at_100=0.01),
    line("NoteLLM-2", 0, both_recall_at_100=0.25, image_recall_at_100=0.3),
    line("Base", 1, both_recall_at_100=0.2, image_recall_at_100=0.02),
    line("NoteLLM-2", 1, both_recall_at_100=0.3, image_recall_at_100=0.4),
    line("Base", 2, both_recall_at_100=0.3, image_recall_at_100=0.03),
    line("MiniLM", 0, text_recall_at_100=0.7),
    line("Base", 0, experiment="sweep", both_recall_at_100=0.1),
]


def test_means_and_intervals():
    """Student's t by hand: 4.303 for three seeds, 12.706 for two."""
    three = estimate([0.1, 0.2, 0.3])
    assert (three.value, three.count) == (pytest.approx(0.2), 3)
    assert three.margin == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    parts, sweep = group(LINES)
    assert (parts.experiment, sweep.experiment, list(parts.variants)) == (
        "parts",
        "sweep",
        ["Base", "NoteLLM-2", "MiniLM"],
    )
    gain = parts.difference("NoteLLM-2", "Base", "both/recall@100")  # 0.15 and 0.1: of the seeds that both have
    assert (gain.value, gain.count) == (pytest.approx(0.125), 2)
    assert gain.margin == pytest.approx(12.7062 * 0.025, rel=1e-5)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def test_tables_and_plots(tmp_path, monkeypatch, capsys):
    def run(*paths):
        monkeypatch.setattr(sys, "argv", ["findings_table", *map(str, paths)])
        findings_table.main()
        return capsys.readouterr().out

    path = write_lines(tmp_path / "results.jsonl", LINES)
    printed = run(path)
    assert "| Base | 3 | 0.200 ± 0.248 | 0.020 ± 0.025 | – |" in printed
    assert "| MiniLM | 1 | – | – | 0.700 |" in printed
    assert "| NoteLLM-2 − Base | 2 | +0.125 ± 0.318 | – | +0.335 ± 0.572 | – | – |" in printed
    assert "MiniLM − Base" not in printed
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"parts_x.png", "sweep_x.png"}
    assert all(Image.open(file).width > 500 for file in (tmp_path / "plots").iterdir())

    more = write_lines(tmp_path / "more.jsonl", LINES[2:])
    assert run(write_lines(path, LINES[:2]), more) == printed
    with pytest.raises(SystemExit, match="parts, x: Base has several runs of seed 1"):
        run(write_lines(path, LINES[:3]), more)
    with pytest.raises(SystemExit, match="none.jsonl has no finished run yet"):
        run(tmp_path / "none.jsonl")
    path.write_text('{"experiment": ')
    with pytest.raises(SystemExit, match="results.jsonl: "):
        run(path)


def test_a_difference_that_leaves_out_zero_is_bold():
    lines = [
        line(name, seed, both_precision_at_10=at + seed / 100)
        for name, at in (("A", 0.1), ("B", 0.2))
        for seed in range(3)
    ]
    lines[-1]["metrics"]["both/precision@10"] += 0.01
    assert "| B − A | 3 | – | **+0.103 ± 0.014** | – | – | – |" in render(group(lines))
    lines[-1]["metrics"]["both/precision@10"] += 0.5
    assert "**+" not in render(group(lines))


def test_forms_of_the_items():
    rows = [
        {"title": f"t{n}", "topics": ["a"], "content": None, "image": n, "subcategory": "animal-bird"}
        for n in range(400)
    ]
    assert ITEM_TRANSFORMS["as they are"](rows) == rows
    short = blanked(rows)
    assert short == blanked(rows)
    bare = [row for row in short if row["title"] is None]
    assert 160 < len(bare) < 240
    assert all(row["topics"] is None and row["content"] is None and row["image"] is not None for row in bare)
    assert all(row in rows for row in short if row["title"])
    assert {row["content"] for row in telling(rows)} == {"animal bird"}


@pytest.fixture(scope="module")
def coloured(coloured_tables, tmp_path_factory):
    """The coloured items as a data set of the experiments: the colour is the subcategory."""
    folder = tmp_path_factory.mktemp("coloured")
    table = pq.read_table(coloured_tables / "items.parquet")
    rows = [
        {**row, "subcategory": row.pop("colour"), "topics": [], "content": None}
        for row in table.to_pylist()
        if row["item_id"] != "broken"
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    known = {row["item_id"] for row in rows}
    for name in ("train", "test"):
        lines = (coloured_tables / f"{name}.jsonl").read_text().splitlines()
        pairs = [{**pair, "subcategory": pair.pop("colour")} for pair in map(json.loads, lines)]
        kept = [p for p in pairs if {p["query_id"], p["target_id"]} <= known and p["query_id"] != p["target_id"]]
        pq.write_table(pa.Table.from_pylist(kept), folder / f"{name}_pairs.parquet")
    return folder


def test_variants_start_from_the_same_halves(tiny_model_folder):
    """All variants have the base's pretrained weights, whatever their new parts; one seed gives one start."""
    base = AutoModel.from_pretrained(tiny_model_folder, trust_remote_code=True).state_dict()
    halves = {name for name in base if name.startswith(("vision_model.", "language_model."))}
    started = []
    for settings in ({"micl": False, "late_fusion": False}, {"num_query_tokens": 1}, {"num_query_tokens": 1}):
        set_seed(3)
        model, processor = build(str(tiny_model_folder), settings)
        weights = model.state_dict()
        assert len(halves) > 40 and all(weights[name].equal(base[name]) for name in halves)
        assert processor.micl == settings.get("micl", True)
        assert processor.num_query_tokens == settings.get("num_query_tokens", 4)
        started.append(weights)
    assert all(started[1][name].equal(started[2][name]) for name in started[1])


@pytest.mark.slow
def test_tiny_runs_to_the_end(coloured, tiny_model_folder, tmp_path):
    training = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "dtype": "float32",
    }
    training |= {"cache_vision_features": True, "vision_cache_dir": str(tmp_path / "vision"), "lora_r": 2}
    config = config_of(
        tmp_path,
        base=str(tiny_model_folder),
        sets={"x": str(coloured)},
        variants={"Base": {"micl": False, "late_fusion": False}, "NoteLLM-2": {}, "text only": {"images": False}},
        experiments=[
            Experiment("parts", ["x"], 1, ["Base", "NoteLLM-2", "text only"]),
            Experiment("baselines", ["x"], 1, ["linear map", "MiniLM, trained"]),
            Experiment("short", ["x"], 1, ["NoteLLM-2"], items="blanked"),
        ],
        training=training,
    )
    run_all(config, plan(config))
    found = {(one["experiment"], one["variant"]): one["metrics"] for one in read_results(Path(config.results))}
    views = {place: {metric.split("/")[0] for metric in metrics} for place, metrics in found.items()}
    assert views == {
        ("parts", "Base"): {"both", "image", "text"},
        ("parts", "NoteLLM-2"): {"both", "image", "text", "visual"},
        ("parts", "text only"): {"both", "text"},
        ("baselines", "linear map"): {"both"},
        ("baselines", "MiniLM, trained"): {"text"},
        ("short", "NoteLLM-2"): {"both", "image", "text", "visual"},
    }
    assert all(0 <= value <= 1 for metrics in found.values() for value in metrics.values())
    assert found["baselines", "MiniLM, trained"]["text/precision@10"] > 0.5  # the titles name the colours
    only = found["parts", "text only"]
    assert {name: only[f"text/{name}"] for name in ("recall@10", "precision@10")} == {
        name: only[f"both/{name}"] for name in ("recall@10", "precision@10")
    }
    assert len(list((tmp_path / "vision").iterdir())) == 1  # one encoder, read by all runs
    first = found["parts", "NoteLLM-2"]
    Path(config.results).unlink()
    run_all(config, [run for run in plan(config) if run.variant == "NoteLLM-2" and run.experiment == "parts"])
    assert read_results(Path(config.results))[0]["metrics"] == first
