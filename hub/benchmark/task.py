"""A folder that `hub.benchmark.folder` wrote as a task for `mteb.evaluate`."""

from pathlib import Path
from typing import Any

from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from hub.benchmark.folder import MODALITIES, SPLIT
from training.tables.commands.hashes import file_sha256


MAIN_SCORE = "ndcg_at_10"
DIGITS = 12
"""Of each table's hash, which together are the task's revision."""


def catalogue_task(folder: Path, category: str, name: str) -> AbsTaskRetrieval:
    """The task in a folder that `write_task` wrote, for `mteb.evaluate`; a query is no candidate of its own."""
    digests = [file_sha256(path)[:DIGITS] for path in sorted(folder.glob("*/*.parquet"))]
    settings: dict[str, Any] = {
        "name": name,
        "description": "Items that users consumed together with an item, among all items of a catalogue.",
        "dataset": {"path": str(folder.resolve()), "revision": "-".join(digests)},
        "type": "Retrieval" if category == "t2t" else "Any2AnyRetrieval",
        "category": category,
        "modalities": sorted({part for letters in category.split("2") for part in MODALITIES[letters]}),
        "eval_splits": [SPLIT],
        "eval_langs": ["und-Zyyy"],
        "main_score": MAIN_SCORE,
        "is_public": False,
    }
    metadata = TaskMetadata(**settings)
    kind = type(name, (AbsTaskRetrieval,), {"metadata": metadata, "ignore_identical_ids": True})
    return kind()
