"""Every odd input through the processor with the model, Sentence Transformers, training's reading and encode: one answer."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from hub.catalogue.shards import read_rejects
from hub.encode import encode
from modeling_notellm2 import ItemError, NoteLLM2Model, NoteLLM2Processor
from tests.odd_inputs.case import NotATable, OddInput
from tests.odd_inputs.pictures import picture_cases
from tests.odd_inputs.texts import CASES
from tests.support.catalogue import arguments, read_shards, vectors
from training.batches.collators import ItemCollator
from training.tables.items import load_items


AT_MOST = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[OddInput]:
    every = [*CASES, *picture_cases(tmp_path_factory.mktemp("pictures"))]
    names = [case.name for case in every]
    assert len(set(names)) == len(names) >= 120
    return every


@pytest.fixture(scope="module")
def encoder(tiny_model_folder) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_model_folder), trust_remote_code=True, device="cpu").eval()


@pytest.fixture(scope="module")
def loaded(tiny_model_folder) -> tuple[NoteLLM2Model, NoteLLM2Processor]:
    model = NoteLLM2Model.from_pretrained(tiny_model_folder).eval()
    return model, NoteLLM2Processor.from_pretrained(tiny_model_folder)


def embedded(model: NoteLLM2Model, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).embeddings


def named(case: OddInput) -> Any:
    """The item, with the case's name as id where it is a dict without one."""
    return {"item_id": case.name, **case.item} if isinstance(case.item, dict) and case.item else case.item


def differences(
    cases: list[OddInput], answers: list[torch.Tensor | str], expected: list[torch.Tensor | str]
) -> list[str]:
    """What is not as expected, one line for each case."""
    lines = []
    for case, answer, wanted in zip(cases, answers, expected, strict=True):
        if isinstance(wanted, str) and not isinstance(answer, str):
            lines.append(f"{case.name}: embedded, where {wanted!r} is expected")
        elif isinstance(wanted, str) and not re.search(wanted, answer):
            lines.append(f"{case.name}: {answer!r} where {wanted!r} is expected")
        elif isinstance(answer, str) and not isinstance(wanted, str):
            lines.append(f"{case.name}: refused: {answer}")
        elif not isinstance(answer, str) and not torch.allclose(answer, wanted, **AT_MOST):
            lines.append(f"{case.name}: off by {(answer - wanted).abs().max():.2g}")
    return lines


def references(wanted: list[Any], loaded) -> list[torch.Tensor | str]:
    """Embeddings of the plain items; a text stays what it is."""
    model, processor = loaded
    items = [item for item in wanted if not isinstance(item, str)]
    rows = iter(embedded(model, processor(items, return_tensors="pt")))
    return [item if isinstance(item, str) else next(rows) for item in wanted]


def refusals(items: list[Any], process) -> dict[int, str]:
    """The error of each item that can't be used, by its number; each stands second in a batch."""
    errors = {}
    for number, item in enumerate(items):
        try:
            process([{"title": "fine"}, item])
        except ItemError as error:
            errors[number] = str(error)
    return errors


def answers_of(count: int, errors: dict[int, str], rows: Iterable[torch.Tensor]) -> list[torch.Tensor | str]:
    """The error or, in their order, the embedding of each of `count` items."""
    left = iter(rows)
    return [errors[number] if number in errors else next(left) for number in range(count)]


def test_processor_and_sentence_transformers(cases, loaded, encoder):
    """Strict: an item that can't be used stops its batch with one line that names row, item_id and field."""
    model, processor = loaded
    items = [named(case) for case in cases]
    expected = references([case.expected for case in cases], loaded)
    errors = refusals(items, processor)
    good = [item for number, item in enumerate(items) if number not in errors]
    rows = torch.cat(
        [embedded(model, processor(good[at : at + 16], return_tensors="pt")) for at in range(0, len(good), 16)]
    )
    assert differences(cases, answers_of(len(items), errors, rows), expected) == []
    for number, error in errors.items():
        assert error.startswith("row 1"), error
        assert "\n" not in error and len(error) < 600, error
        assert not isinstance(items[number], dict) or f"item_id {items[number]['item_id']!r:.80}" in error

    assert refusals(items, encoder[0].preprocess) == errors
    rows = encoder.encode(good, convert_to_tensor=True, batch_size=16)
    assert differences(cases, answers_of(len(items), errors, rows), expected) == []


def test_training_and_encode(cases, loaded, tiny_model_folder, tmp_path):
    """Tolerant: a row that can't be used is a reject with its reason, and the others are embedded."""
    rows = [case for case in cases if not isinstance(case.expected_in_tables, NotATable)]
    assert len(rows) >= 120
    table = tmp_path / "items.jsonl"
    table.write_text("".join(json.dumps(row_of(case, number)) + "\n" for number, case in enumerate(rows)))
    expected = references([case.expected_in_tables for case in rows], loaded)

    items, rejects = load_items(str(table))
    reasons = {reject.row: reject.reason for reject in rejects}
    model, processor = loaded
    collator = ItemCollator(processor)
    batches = [items[start : start + 16] for start in range(0, len(items), 16)]
    trained = torch.cat([embedded(model, collator(batch)) for batch in batches])
    assert collator.unreadable.listed == set()
    assert differences(rows, answers_of(len(rows), reasons, trained), expected) == []

    encode(arguments(tiny_model_folder, table, tmp_path / "shards"))
    written = torch.from_numpy(vectors(read_shards(tmp_path / "shards")))
    reasons = {reject.row: reject.reason for reject in read_rejects(tmp_path / "shards", len(rows))}
    assert differences(rows, answers_of(len(rows), reasons, written), expected) == []


def row_of(case: OddInput, number: int) -> dict[str, Any]:
    """The item as a row of JSON lines; ids that aren't the case itself are its number."""
    row = {key: str(value) if isinstance(value, Path) else value for key, value in case.item.items()}
    return {"item_id": f"row {number}", **row}
