"""Numbers out of bounds are wrong options, in Python and on the command line, before anything is read or written."""

import importlib
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import pytest
from transformers import TrainingArguments

from hub.encode import EncodeArguments
from hub.encode import main as encode_command
from hub.gallery import GalleryArguments
from hub.index import SearchArguments
from training.evaluate import EvaluateArguments, MeasureOptions
from training.hard_negatives import HardNegativesArguments
from training.mining.cooccurrence import MiningArguments
from training.tables.commands.bounds import Bounds, bounds_in, check_bounds
from training.tables.commands.handler import OptionError
from training.trainer.arguments import OF_TRAINER, NoteLLM2TrainingArguments


@dataclass
class Options:
    whole: Annotated[int, Bounds(1)] = 1
    share: Annotated[float, Bounds(0, 1, open=True)] | None = None
    several: list[Annotated[int, Bounds(1, 9)]] = field(default_factory=lambda: [3])
    free: float = 0.0

    def __post_init__(self) -> None:
        check_bounds(self)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whole": 0}, "--whole is 0; it must be at least 1."),
        ({"share": 1.0}, "--share is 1.0; it must be above 0 and below 1."),
        ({"share": float("nan")}, "--share is nan"),
        ({"several": [3, 10]}, "--several is 10; it must be at least 1 and at most 9."),
    ],
)
def test_a_number_out_of_bounds_is_named(options, message):
    with pytest.raises(OptionError, match=message):
        Options(**options)
    assert Options(1, 0.5, [1, 9], -7.0) == Options(share=0.5, several=[1, 9], free=-7.0)


TABLES = {"model": "m", "items": "i", "output": "o"}
WRONG = [
    (
        EncodeArguments,
        TABLES,
        ("batch_size", "rows_per_block", "rows_per_shard", "ray_actors", "ray_cpus_per_actor"),
        0,
    ),
    (EncodeArguments, TABLES, ("num_workers", "ray_gpus_per_actor"), -1),
    (GalleryArguments, TABLES, ("queries", "neighbours", "batch_size"), 0),
    (SearchArguments, {"index": "i"}, ("k",), 0),
    (EvaluateArguments, {**TABLES, "pairs": "p"}, ("batch_size",), -3),
    (EvaluateArguments, {**TABLES, "pairs": "p"}, ("num_workers",), -1),
    (MeasureOptions, {}, ("resamples", "confidence"), 0),
    (MeasureOptions, {}, ("confidence",), 1),
    (MeasureOptions, {}, ("seed", "top_categories", "examples", "neighbours"), -1),
    (MeasureOptions, {}, ("ks",), [1, 1_000_000_000]),
    (HardNegativesArguments, {**TABLES, "pairs": "p"}, ("negatives", "neighbours", "batch_size"), 0),
    (HardNegativesArguments, {**TABLES, "pairs": "p"}, ("ceiling", "num_workers"), -2),
    (MiningArguments, {"interactions": "l", "output": "o"}, ("min_users", "candidates_per_part"), 0),
    (MiningArguments, {"interactions": "l", "output": "o"}, ("top_targets", "lower_score", "upper_score"), -1),
    (MiningArguments, {"interactions": "l", "output": "o"}, ("max_items_per_user",), 1),
]


@pytest.mark.parametrize(
    ("kind", "needed", "name", "value"),
    [(kind, needed, name, value) for kind, needed, names, value in WRONG for name in names],
)
def test_every_command_has_bounds(kind, needed, name, value):
    kind(**needed)
    with pytest.raises(OptionError, match=f"--{name} is "):
        kind(**needed, **{name: value})


def test_a_command_ends_with_exit_code_2_and_one_line(tmp_path, capsys):
    options = ["--model", "m", "--items", "i", "--output", str(tmp_path / "out"), "--batch_size", "-3"]
    with pytest.raises(SystemExit) as stopped:
        encode_command(options)
    assert stopped.value.code == 2
    assert "--batch_size is -3; it must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


COMMANDS = [
    f"{path.parent.name}.{path.stem}" for folder in ("training", "hub") for path in Path(folder).glob("[!_]*.py")
]
OF_OTHERS = {option.name for option in fields(TrainingArguments)}


def numbers_of(module: str) -> list[tuple[str, str, list[Bounds]]]:
    """The numeric options of a command: class, name and bounds."""
    found = []
    for kind in vars(importlib.import_module(module)).values():
        if not (isinstance(kind, type) and is_dataclass(kind) and kind.__name__.endswith(("Arguments", "Options"))):
            continue
        hints = get_type_hints(kind, include_extras=True)
        for option in fields(kind):
            if re.search(r"\b(int|float)\b", str(hints[option.name])):
                inherited = [OF_TRAINER[option.name]] if option.name in OF_TRAINER else []
                found.append((kind.__name__, option.name, bounds_in(hints[option.name]) + inherited))
    return found


@pytest.mark.parametrize("module", COMMANDS)
def test_every_number_that_is_an_option_has_bounds(module):
    for kind, name, bounds in numbers_of(module):
        if name in OF_OTHERS and name not in OF_TRAINER:
            continue  # which transformers alone reads
        assert bounds, f"{kind}.{name}"
        assert not any(limit.hold(value) for limit in bounds for value in (-2, -math.inf, math.nan)), f"{kind}.{name}"


@pytest.mark.parametrize("value", [-2, math.nan, math.inf, 1e308, 10**18])
@pytest.mark.parametrize("name", OF_TRAINER)
def test_numbers_of_the_trainer_have_bounds_too(name, value):
    with pytest.raises(OptionError, match=f"--{name} is "):
        NoteLLM2TrainingArguments(use_cpu=True, **{name: value})
