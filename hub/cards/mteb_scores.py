"""Scores of mteb for a model's card: a table, and entries of the model-index as mteb makes them.

Read are scores.json of `hub/mteb_task.py`, of which the model's own entry counts, and the files that mteb keeps for each of
its tasks.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult

from training.tables.commands.handler import FileError


SOURCE = "https://github.com/embeddings-benchmark/mteb/"
MAIN_SCORE = "main_score"


@dataclass(frozen=True)
class TaskScore:
    """The main score of one split and subset of a task, between 0 and 1.

    Attributes:
        task: its name.
        kind: as the Hub calls it.
        subset, split: of the task's data.
        revision: of these.
        metric: which score the main one is, as far as the file says.
        version: of mteb.
    """

    task: str
    kind: str
    subset: str
    split: str
    revision: str
    metric: str
    value: float
    version: str


def read_scores(paths: Iterable[str | Path], weights: Mapping[str, str] | None) -> list[TaskScore]:
    """The scores in some files.

    Args:
        weights: of the model, as `weights_of` gives them; scores.json must have been made with them.

    Raises:
        FileError: for a file of another form, or of other models.
    """
    return [score for path in paths for score in _scores(Path(path), weights)]


def mteb_results(scores: Iterable[TaskScore]) -> list[EvalResult]:
    """Entries of the card's model-index. A catalogue of one's own has no id, so its name stands for it."""
    return [
        EvalResult(
            task_type=score.kind,
            task_name=score.task,
            dataset_type="mteb",
            dataset_name=f"{score.task} ({score.subset})",
            dataset_config=score.subset,
            dataset_split=score.split,
            dataset_revision=score.revision,
            metric_type=score.metric,
            metric_name=score.metric,
            metric_value=score.value,
            source_name="MTEB",
            source_url=SOURCE,
        )
        for score in scores
    ]


def _scores(path: Path, weights: Mapping[str, str] | None) -> Iterator[TaskScore]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not ("models" in content or {"task_name", "scores"} <= content.keys()):
        raise FileError(f"{path} holds no scores of mteb; pass scores.json of hub/mteb_task.py, or a result of mteb.")
    kind, metric, result = "feature-extraction", MAIN_SCORE, content
    if "models" in content:
        own = [model for model in content["models"] if model["weights"] and model["weights"] == weights]
        if not own:
            raise FileError(f"{path}: none of its scores is of this model's weights; run hub/mteb_task.py with it.")
        kind = "text-retrieval" if content["task"]["category"] == "t2t" else "visual-document-retrieval"
        metric, result = content["task"]["main_score"], own[0]["result"]
    for split, subsets in result["scores"].items():
        for scores in subsets:
            yield TaskScore(
                result["task_name"],
                kind,
                scores["hf_subset"],
                split,
                result["dataset_revision"],
                metric,
                scores[MAIN_SCORE],
                result["mteb_version"],
            )
