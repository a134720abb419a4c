"""The page about a training run: what is read from the run's folder, how pictures come in, and how it is written."""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from training.reporting.evaluation_tables import label_rows, metric_rows, short_slice_rows
from training.reporting.run_plots import draw_report_plots
from training.reporting.summary import result_rows
from training.tables.commands.files import write_text
from training.tables.commands.hashes import check_weights
from training.tables.images import first_picture
from training.tables.items import ItemTable


PAGE = "report.html"
SIDE = 96
"""Pixels of the longer side of a picture on the page."""
SAMPLED = 10
PLOT_TITLES = {
    "curves": "Training",
    "saliency": "Where the embeddings take their information from",
    "recall": "Recall with intervals",
    "ranks": "Ranks of the targets",
}


def write_report(run: Path, items: ItemTable | None, weights: Mapping[str, str] | None = None) -> Path:
    """The page of a run.

    Args:
        run: folder with metrics.json, perhaps evaluation.json.
        items: for the pictures and names; None: ids alone.
        weights: of the run's model, as `weights_of` gives them; None: those that metrics.json names.

    Raises:
        FileNotFoundError: where there is no metrics.json.
        FileError: where metrics.json or evaluation.json is of another model.
    """
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    evaluated = run / "evaluation.json"
    evaluation = json.loads(evaluated.read_text(encoding="utf-8")) if evaluated.exists() else None
    weights = weights or metrics.get("weights")
    for name, result in ((run / "metrics.json", metrics), (evaluated, evaluation or {})):
        check_weights(name, result, weights)
    plots = draw_report_plots(metrics, run / "plots")
    if evaluation:
        plots |= {name: run / place for name, place in evaluation["plots"].items() if (run / place).exists()}
    pictures = _Pictures(items)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja").render(
        run=run.name,
        headline=headline(metrics),
        metrics=metrics,
        results=result_rows(metrics),
        evaluation=evaluation,
        tables=_tables(evaluation) if evaluation else [],
        plots={name: _embedded(path) for name, path in plots.items()},
        plot_titles=PLOT_TITLES,
        sample=pictures.sample(),
        examples=_examples(evaluation, pictures) if evaluation else None,
        settings={name: value for name, value in metrics.get("settings", {}).items() if value not in (None, "", [])},
    )
    write_text(page, run / PAGE)
    return run / PAGE


def headline(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures to see first: recall@10 before and after training, by modality, and what chance and the best baseline
    reach; each with its name."""
    after, before, random = (metrics.get(stage) or {} for stage in ("after", "before", "random"))
    baselines = {key: value for key, value in (metrics.get("baselines") or {}).items() if key.endswith("/recall@10")}
    figures = [
        ("both", after.get("both/recall@10")),
        ("image alone", after.get("image/recall@10")),
        ("text alone", after.get("text/recall@10")),
        ("before training", before.get("both/recall@10")),
        ("best baseline", max(baselines.values(), default=None)),
        ("by chance", random.get("random/recall@10")),
    ]
    return [(name, f"{value:.3f}") for name, value in figures if value is not None]


def _tables(evaluation: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of the evaluation's tables."""
    report = dict(evaluation)
    first = next(iter(report["metrics"]))
    tables = [
        (
            "Published protocol: one target for each query, among all items that are no query",
            *metric_rows(report, "published"),
        ),
        ("All known targets of a query, among all items but itself", *metric_rows(report, "multi_positive")),
    ]
    if any(parts["labels"] for parts in report["metrics"].values()):
        tables.append(("Neighbours with the same label", *label_rows(report)))
    return [*tables, (f"Slices of the queries, '{first}'", *short_slice_rows(report, first))]


def _examples(evaluation: Mapping[str, Any], pictures: "_Pictures") -> dict[str, list[dict[str, Any]]] | None:
    """Best and worst queries with their target and neighbours as the page shows them."""
    examples = evaluation.get("examples")
    if not examples:
        return None
    return {
        side: [
            {
                "query": pictures.card(example["query_id"]),
                "target": pictures.card(example["target_id"]),
                "rank": example["rank"],
                "score": example["score"],
                "neighbours": [
                    {
                        **pictures.card(near["item_id"]),
                        "score": near["score"],
                        "hit": near["item_id"] == example["target_id"],
                    }
                    for near in example["neighbours"]
                ],
            }
            for example in examples[side]
        ]
        for side in ("best", "worst")
    }


class _Pictures:
    """Names and small pictures of items, by id."""

    def __init__(self, items: ItemTable | None):
        self.items = items
        self.position_of = {} if items is None else {item_id: row for row, item_id in enumerate(items.item_ids)}

    def card(self, item_id: str) -> dict[str, Any]:
        """What the page shows of an item: id, name, and a picture where one can be read."""
        position = self.position_of.get(item_id)
        if self.items is None or position is None:
            return {"id": item_id, "name": item_id, "picture": None}
        item = self.items[position]
        name = item.get("title") or item.get("content") or ", ".join(item.get("topics") or []) or item_id
        return {"id": item_id, "name": str(name), "picture": self._picture(item)}

    def sample(self) -> list[dict[str, Any]]:
        """Some items, evenly spread over the table."""
        if self.items is None or not len(self.items):
            return []
        rows = np.linspace(0, len(self.items) - 1, min(SAMPLED, len(self.items))).astype(int)
        return [self.card(self.items.item_ids[row]) for row in rows.tolist()]

    @staticmethod
    def _picture(item: Mapping[str, Any]) -> str | None:
        image = first_picture(item)
        if image is None:
            return None
        image.thumbnail((SIDE, SIDE))
        stream = io.BytesIO()
        image.save(stream, "PNG", optimize=True)
        return _data_uri(stream.getvalue())


def _embedded(path: Path) -> str:
    return _data_uri(path.read_bytes())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
