"""The paper's findings on real data with seeds: `python -m training.experiments.findings training/experiments/findings.yaml`.

Trains every variant of the method that the config names, on each of its data sets, once for each seed, beside baselines
under the same pairs and the same number of steps, and measures all of them on the unseen items. Each finished run is one
line of `results`; started again, finished runs are skipped. `python -m training.experiments.findings_table` makes the tables.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from training.experiments.findings_runs import BASELINES, ITEM_TRANSFORMS, measure_run
from training.tables.commands.files import atomic_write
from training.tables.commands.handler import DONE, OptionParser, command


@dataclass(frozen=True)
class Experiment:
    """Variants to compare with one another.

    Attributes:
        name: of its table.
        sets: data sets, of `FindingsConfig.sets`.
        seeds: how many, counted from 0.
        variants: of `FindingsConfig.variants`, and baselines.
        items: what the items are given of their texts, of `training.experiments.findings_runs.ITEM_TRANSFORMS`.
    """

    name: str
    sets: list[str]
    seeds: int
    variants: list[str]
    items: str = "as they are"


@dataclass(frozen=True)
class FindingsConfig:
    """One file that says everything.

    Attributes:
        base: folder that hub/assemble.py wrote; its vision encoder, LLM and processor are what every variant starts from.
        results: JSON lines file, one line for each finished run.
        sets: name to a folder with items.parquet, train_pairs.parquet, test_pairs.parquet.
        variants: name to fields of NoteLLM2Config (early_fusion, micl, ...), `images: false` to leave all pictures out,
            `base` for another one than that of all, and `options` of training/run.py that differ.
        experiments: what is compared, the most important first.
        training: options of training/run.py, the same for all.
    """

    base: str
    results: str
    sets: dict[str, str]
    variants: dict[str, dict[str, Any]]
    experiments: list[Experiment]
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One variant on one data set with one seed.

    Attributes:
        settings: of the variant.
        key: changes with anything that the result depends on.
    """

    experiment: str
    data: str
    variant: str
    seed: int
    items: str
    settings: Mapping[str, Any]
    key: str


def read_config(path: Path) -> FindingsConfig:
    """The config of a YAML file.

    Raises:
        ValueError: for a file that can't be read, an unknown field, or a name that is not defined there.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content["experiments"] = [Experiment(**settings) for settings in content["experiments"]]
        config = FindingsConfig(**content)
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        known = ", ".join(field.name for field in fields(FindingsConfig))
        raise ValueError(f"{path}: {error!r}; it has the fields {known}, all but training needed.") from error
    for experiment in config.experiments:
        unknown = {*experiment.variants} - {*config.variants, *BASELINES}
        unknown |= {*experiment.sets} - {*config.sets} | {experiment.items} - {*ITEM_TRANSFORMS}
        if unknown:
            raise ValueError(f"{path}: experiment {experiment.name!r} names unknown {', '.join(sorted(unknown))}.")
    return config


def plan(config: FindingsConfig) -> list[Run]:
    """All runs: seed by seed, and within a seed in the order of the experiments, so that what is done first is balanced."""
    most = max(experiment.seeds for experiment in config.experiments)
    return [
        run
        for seed in range(most)
        for experiment in config.experiments
        if seed < experiment.seeds
        for run in _runs_of(config, experiment, seed)
    ]


@cache
def contents_of(folder: str) -> str:
    """A hash of the tables or weights in a folder, so that made anew they are measured anew; of nothing where it's missing."""
    digest = blake2b(digest_size=16)
    for path in sorted([*Path(folder).glob("*.parquet"), *Path(folder).glob("*.safetensors")]):
        with path.open("rb") as stream:
            digest.update(path.name.encode() + hashlib.file_digest(stream, partial(blake2b, digest_size=16)).digest())
    return digest.hexdigest()


def _runs_of(config: FindingsConfig, experiment: Experiment, seed: int) -> Iterator[Run]:
    for data in experiment.sets:
        for variant in experiment.variants:
            settings = config.variants.get(variant, {})
            folders = (config.sets[data], settings.get("base", config.base))
            inputs = [(folder, contents_of(folder)) for folder in folders]
            what = [variant, settings, experiment.items, seed, config.training, inputs]
            key = blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()
            yield Run(experiment.name, data, variant, seed, experiment.items, settings, key)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_all(config: FindingsConfig, runs: Sequence[Run]) -> None:
    """Carry out what isn't done. A run that stands in two experiments is carried out once and listed in both."""
    path = Path(config.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_results(path)
    listed = {(line["experiment"], line["key"]) for line in done}
    results = {line["key"]: line for line in done}
    missing = [run for run in runs if (run.experiment, run.key) not in listed]
    bar = tqdm(missing, desc="Runs", unit="run")
    for run in bar:
        bar.set_postfix_str(f"{run.experiment}, {run.data}: {run.variant}, seed {run.seed}")
        started = time.monotonic()
        if run.key not in results:
            metrics = measure_run(
                config.base, config.sets[run.data], run.variant, run.settings, run.items, run.seed, config.training
            )
            results[run.key] = {"metrics": metrics, "seconds": round(time.monotonic() - started, 1)}
        line = {name: getattr(run, name) for name in ("experiment", "data", "variant", "seed", "items", "key")}
        append_line(path, line | {name: results[run.key][name] for name in ("metrics", "seconds")})


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Write the file anew with one line more."""
    before = path.read_bytes() if path.exists() else b""
    with atomic_write(path) as place:
        place.write_bytes(before + json.dumps(line, ensure_ascii=False).encode() + b"\n")


@command("training.experiments.findings", go_on="Start it again with the same config: finished runs are kept.")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    parser = OptionParser(prog="python -m training.experiments.findings")
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="Which runs, on which tables.")
    config = read_config(parser.parse_args(options).config)
    run_all(config, plan(config))
    print(f"Results: {config.results}\nTables:  python -m training.experiments.findings_table {config.results}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
