"""Every option of a training run, and how a YAML file and the command line set them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments


@dataclass
class ModelArguments:
    """Which model is trained, and which part of its LLM."""

    model: str = field(metadata={"help": "Folder or Hub id of a NoteLLM-2 model with its processor."})
    dtype: str = field(default="float32", metadata={"help": "Type of the weights: float32, bfloat16 or float16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the LLM; 0 trains the LLM in full."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA: its update is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before LoRA's matrices."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules of the LLM (never of the rest) that get LoRA: names, or all-linear."},
    )


@dataclass
class DataArguments:
    """Tables to train and to measure on: Parquet, JSON lines, CSV, a folder, or a Hub dataset id."""

    items: str = field(metadata={"help": "Item table: item_id and title, topics, content, image."})
    train_pairs: str = field(metadata={"help": "Pair table to train on: query_id, target_id."})
    eval_pairs: str | None = field(default=None, metadata={"help": "Pair table for recall; none: no evaluation."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Evaluate on items whose column `split` says this; none: on all."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the items for precision@10: share of neighbours with its value."}
    )
    distinct_column: str | None = field(
        default=None, metadata={"help": "Column of the train pairs; no two pairs of a batch share its value."}
    )
    cache_vision_features: bool = field(
        default=False, metadata={"help": "Run the frozen vision encoder once and keep its output in memory (16 bit)."}
    )
    report_baselines: bool = field(
        default=False, metadata={"help": "Measure frozen features and a linear map on them under the same protocol."}
    )


@dataclass
class NoteLLM2TrainingArguments(TrainingArguments):
    """`TrainingArguments` with the published run as defaults: 3e-6, decay 1e-3, warm-up 10 %, one epoch, bf16."""

    output_dir: str | None = field(default="runs/train", metadata={"help": "Folder of everything the run writes."})
    learning_rate: float = field(default=3e-6, metadata={"help": "For the LLM or its LoRA."})
    connector_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "For what starts new: Q-Former, query tokens, projector, late fusion, reduction, logit scale; "
            "none: as learning_rate."
        },
    )
    weight_decay: float = field(default=1e-3, metadata={"help": "Of matrices; vectors and scalars have none."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 the share of all steps."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the train pairs."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs in a batch; each is two items."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Items in a batch of the evaluation."})
    bf16: bool = field(
        default=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        metadata={"help": "bfloat16 autocast; by default where a GPU has it."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(default="no", metadata={"help": "Checkpoints on the way; the end is always saved."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: pairs have no columns."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Must stay on: batches are filled up."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.connector_learning_rate is None:
            self.connector_learning_rate = self.learning_rate


def parse(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, NoteLLM2TrainingArguments]:
    """Read `CONFIG.yaml [--key value ...]`; what stands on the command line wins.

    Raises:
        SystemExit: with a message, when the file can't be read or is no mapping, for an unknown option, or when a
            needed one is missing.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, NoteLLM2TrainingArguments),
        usage="training/run.py [CONFIG.yaml] [--key value ...]",
    )
    rest = list(arguments)
    from_file = _yaml_options(Path(rest.pop(0)), parser) if rest and not rest[0].startswith("-") else []
    return parser.parse_args_into_dataclasses([*from_file, *rest], look_for_args_file=False)


def _yaml_options(path: Path, parser: HfArgumentParser) -> list[str]:
    """A YAML mapping as command line options, so that both are checked and converted by the same rules."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"{path}: {error}")
    if not isinstance(settings, dict):
        parser.error(f"{path}: expected lines of 'option: value'.")
    known = {action.dest for action in parser._actions}
    unknown = [str(key) for key in settings if key not in known]
    if unknown:
        parser.error(f"{path}: unknown option {', '.join(unknown)}; see `python training/run.py --help`.")
    options: list[str] = []
    for key, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        options += [f"--{key}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return options
