"""Every option of a training run, and how a YAML file and the command line set them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
import yaml
from transformers import TrainingArguments

from modeling_notellm2 import DTYPES, Precision, choose_precision
from training.tables.commands.bounds import MANY, AtLeastOne, Bounds, NotNegative, check_bounds
from training.tables.commands.handler import OptionParser
from training.tables.commands.options import allow_remote_option, encoding_option, split_option


FIXED = {
    "remove_unused_columns": (False, "must stay off, as pairs have no columns."),
    "dataloader_drop_last": (
        True,
        "must stay on: processes with batches of different sizes would wait for each other.",
    ),
    "ddp_find_unused_parameters": (False, "must stay off, as every parameter takes part in every batch."),
    "auto_find_batch_size": (False, "must stay off: a smaller batch is another loss; chunk_size saves memory instead."),
}
"""Options of Trainer that this training depends on, with the value that they have."""

_RATE, _COUNT, _STEPS = Bounds(0, 1000), Bounds(1, MANY), Bounds(0, MANY)
OF_TRAINER = {
    **dict.fromkeys(("learning_rate", "weight_decay"), _RATE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), Bounds(0, 1)),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "save_total_limit",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "warmup_steps",
            "num_train_epochs",
            "save_steps",
            "eval_steps",
            "logging_steps",
            "eval_delay",
            "max_grad_norm",
        ),
        _STEPS,
    ),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_prefetch_factor"), Bounds(0, 1000)),
    **dict.fromkeys(("seed", "data_seed"), Bounds(0, 2**32 - 1)),
    "max_steps": Bounds(-1, MANY),
}
"""Bounds of Trainer's own numbers, of which it checks hardly any."""
Share = Annotated[float, Bounds(0, 1)]
READING = ("readout", "text_attention", "standardize_states")
"""Fields of a model's config that a run may choose anew, as no pretrained weight goes with them."""


@dataclass
class ModelArguments:
    """Which model is trained, and which part of its LLM."""

    model: str = field(metadata={"help": "Folder or Hub id of a NoteLLM-2 model with its processor."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2."})
    readout: str | None = field(
        default=None,
        metadata={
            "help": "What becomes an item's embedding: last, the last token's state (published), or mean over its tokens; "
            "none: as the model has it.",
            "choices": ["last", "mean"],
        },
    )
    text_attention: str | None = field(
        default=None,
        metadata={
            "help": "Which tokens of an item see which: causal, those before (published), or bidirectional, all (LLM2Vec); "
            "none: as the model has it.",
            "choices": ["causal", "bidirectional"],
        },
    )
    standardize_states: bool | None = field(
        default=None,
        metadata={
            "help": "Centre and scale the LLM's states, as measured on the train items before the first step; none: as the "
            "model has it (published: no)."
        },
    )
    lora_r: Annotated[int, Bounds(0, 65_536)] = field(
        default=0, metadata={"help": "Rank of LoRA on the LLM; 0 trains the LLM in full."}
    )
    lora_alpha: NotNegative = field(
        default=32, metadata={"help": "Scale of LoRA: its update is multiplied by alpha / r."}
    )
    lora_dropout: Share = field(default=0.05, metadata={"help": "Dropout before LoRA's matrices."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules of the LLM (never of the rest) that get LoRA: names, or all-linear."},
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA: LoRA with a trained magnitude for each output."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the LLM's weights in 4 bits (bitsandbytes, needs lora_r)."}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Save a plain model with LoRA merged in, in place of the adapter alone."}
    )

    align_steps: NotNegative = field(
        default=0,
        metadata={
            "help": "Batches on which a new connector is warmed up before the first pair, as by training/align.py, on the "
            "train items alone; 0: none. A resumed run skips it."
        },
    )
    align_batch_size: Annotated[int, Bounds(2, 65_536)] = field(
        default=32, metadata={"help": "Items in a batch of the warm-up."}
    )
    align_learning_rate: Annotated[float, Bounds(0, 1000)] = field(
        default=1e-3, metadata={"help": "Largest of the warm-up; cosine decay."}
    )
    align_caption_weight: NotNegative = field(
        default=1, metadata={"help": "Of the warm-up's captioning loss; 0: the LLM isn't run, many times as fast."}
    )
    align_matching_weight: NotNegative = field(default=1, metadata={"help": "Of the warm-up's matching loss."})
    head_steps: NotNegative = field(
        default=0,
        metadata={
            "help": "Batches on which late fusion and reduction learn first, on the LLM's states as they are, read once: as good "
            "as free beside steps through the LLM; 0: none. A resumed run skips it."
        },
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.lora_r and (self.use_dora or self.load_in_4bit or self.merge_adapter):
            raise ValueError("use_dora, load_in_4bit and merge_adapter need LoRA: set lora_r above 0.")
        chosen = [name for name in READING if getattr(self, name) is not None]
        if chosen and self.lora_r and not self.merge_adapter:
            raise ValueError(
                f"{', '.join(chosen)}: kept in the base model's config, which an adapter alone doesn't change. Set "
                f"merge_adapter, or assemble the base model so (hub/assemble.py --{chosen[0]} ...)."
            )
        if self.load_in_4bit and self.merge_adapter:
            raise ValueError(
                "merge_adapter can't merge into 4-bit weights: save the adapter, load it on the full base model, and "
                "call merge_and_unload() there."
            )


@dataclass
class DataArguments:
    """Tables to train and to measure on: Parquet, JSON lines, CSV, a folder, or a Hub data set, ORG/DATA or ORG/DATA:CONFIG."""

    items: str = field(metadata={"help": "Item table: item_id and title, topics, content, image."})
    train_pairs: str = field(metadata={"help": "Pair table to train on: query_id, target_id."})
    eval_pairs: str | None = field(default=None, metadata={"help": "Pair table for recall; none: no evaluation."})
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    allow_remote: str | None = allow_remote_option()
    eval_split: str | None = field(
        default=None, metadata={"help": "Evaluate on items whose column `split` says this; none: on all."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the items for precision@10: share of neighbours with its value."}
    )
    distinct_column: str | None = field(
        default=None, metadata={"help": "Column of the train pairs; no two pairs of a batch share its value."}
    )
    weight_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the train pairs, e.g. mined scores: how much a pair counts in the loss; none: alike."
        },
    )
    validate_only: bool = field(
        default=False, metadata={"help": "Check all tables and images, list every fault in rejects.jsonl, and stop."}
    )
    check_images: bool | None = field(
        default=None, metadata={"help": "Open every image before training; none: where the table is small."}
    )
    mask_known_positives: bool = field(
        default=True, metadata={"help": "A row's partners in the whole pair table are not its negatives."}
    )
    mask_same_image: bool = field(
        default=True, metadata={"help": "Items with one image aren't each other's negatives."}
    )
    mask_same_text: bool = field(default=True, metadata={"help": "Items with one text aren't each other's negatives."})
    image_dropout: Share = field(default=0.0, metadata={"help": "Probability that an item with text loses its images."})
    text_dropout: Share = field(default=0.0, metadata={"help": "Probability that an item with images loses its text."})
    cache_vision_features: bool = field(
        default=False, metadata={"help": "Run the frozen vision encoder once and keep its output on disk (16 bit)."}
    )
    vision_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of cached vision features; none: in the cache of `datasets`."}
    )
    vision_cache_gb: Annotated[float, Bounds(0, 1_000_000)] = field(
        default=50.0, metadata={"help": "Largest size of it; images beyond are decoded in every epoch."}
    )
    report: bool = field(
        default=False,
        metadata={"help": "Write report.html, with intervals, slices, saliency and examples; some more passes."},
    )
    report_baselines: bool = field(
        default=False, metadata={"help": "Measure frozen features and a linear map on them under the same protocol."}
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass
class NoteLLM2TrainingArguments(TrainingArguments):
    """`TrainingArguments` with the published run as defaults: 3e-6, decay 1e-3, warm-up 10 %, one epoch.

    `dtype` is the one choice of what a run computes in; `bf16` and `fp16`, transformers' own switches, follow from it. Given
    explicitly they are another way to ask.

    Attributes:
        precision: what was chosen, and why.

    Raises:
        ValueError: where `dtype`, `bf16` and `fp16` contradict each other.
    """

    output_dir: str = field(default="runs/train", metadata={"help": "Folder of everything the run writes."})
    learning_rate: float = field(default=3e-6, metadata={"help": "For the LLM or its LoRA."})
    connector_learning_rate: Annotated[float, Bounds(0, 1000)] | None = field(
        default=None,
        metadata={
            "help": "For what starts new: Q-Former, query tokens, projector, late fusion, reduction, logit scale; "
            "none: as learning_rate."
        },
    )
    qformer_learning_rate: Annotated[float, Bounds(0, 1000)] | None = field(
        default=None,
        metadata={"help": "For Q-Former, query tokens and projector; none: as connector_learning_rate."},
    )
    late_fusion_learning_rate: Annotated[float, Bounds(0, 1000)] | None = field(
        default=None, metadata={"help": "For late fusion's projection and gate; none: as connector_learning_rate."}
    )
    reduction_learning_rate: Annotated[float, Bounds(0, 1000)] | None = field(
        default=None, metadata={"help": "For the reduction to embedding_dim; none: as connector_learning_rate."}
    )
    logit_scale_learning_rate: Annotated[float, Bounds(0, 1000)] | None = field(
        default=None,
        metadata={
            "help": "For the logit scale (logarithm of the factor on similarities), which Adam moves by about this much in "
            "a step; none: as connector_learning_rate."
        },
    )
    weight_decay: float = field(default=1e-3, metadata={"help": "Of matrices; vectors and scalars have none."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 the share of all steps."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the train pairs."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs in a batch; each is two items."})
    chunk_size: NotNegative = field(
        default=0,
        metadata={"help": "Items embedded at once in a training step (GradCache): memory for one chunk; 0: all."},
    )
    gather_for_each_chunk: bool = field(
        default=False,
        metadata={
            "help": "FSDP with chunk_size: gather the weights anew for each chunk; slower, but they needn't fit one GPU."
        },
    )
    shard_frozen_vision: bool = field(
        default=False,
        metadata={
            "help": "FSDP: spread the frozen vision encoder too; else each process holds it whole, which needs no exchange."
        },
    )
    false_negative_margin: Annotated[float, Bounds(0, 2)] | None = field(
        default=None,
        metadata={
            "help": "Items more similar to a row than its partner by more than this (cosine) are not its negatives; 0.1 in "
            "Qwen3-Embedding; none: all are."
        },
    )
    several_positives: bool = field(
        default=False,
        metadata={
            "help": "A row's other known partners in the batch are positives of it too, each against its negatives alone; else "
            "they are left out."
        },
    )
    matryoshka_dims: list[AtLeastOne] = field(
        default_factory=list, metadata={"help": "Widths of prefixes that are trained as embeddings too."}
    )
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Items in a batch of the evaluation."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the computation; auto: bfloat16 where the machine has it. Trained weights stay float32.",
            "choices": list(DTYPES),
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # transformers has no way to tell false from not given
        default=None, metadata={"help": "The same as --dtype bfloat16; false: never bfloat16."}
    )
    fp16: bool | None = field(  # type: ignore[assignment]  # as bf16
        default=None, metadata={"help": "The same as --dtype float16."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the order that HfArgumentParser reads)
        default="tensorboard", metadata={"help": "Where the log goes: tensorboard, trackio, wandb, none."}
    )
    save_strategy: str = field(default="no", metadata={"help": "Checkpoints on the way; the end is always saved."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: pairs have no columns."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Must stay on: batches are filled up."})
    metric_for_best_model: str | None = field(
        default="eval_recall@100", metadata={"help": "For load_best_model_at_end, early stopping and searches."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Of metric_for_best_model."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Must stay off: every parameter takes part in every batch."}
    )

    def __post_init__(self) -> None:
        check_bounds(self, OF_TRAINER)
        wrong = [f"{name}: {reason}" for name, (value, reason) in FIXED.items() if getattr(self, name) != value]
        if wrong:
            raise ValueError(f"These options can't be changed. {' '.join(wrong)}")
        accelerator = None if self.use_cpu else torch.accelerator.current_accelerator(check_available=True)
        self.use_cpu = accelerator is None  # transformers takes bf16 without a GPU only where this is on
        self.precision: Precision = choose_precision(self._asked_dtype(), accelerator or "cpu")
        self.bf16, self.fp16 = (self.precision.name == name for name in ("bfloat16", "float16"))
        super().__post_init__()
        if self.connector_learning_rate is None:
            self.connector_learning_rate = self.learning_rate

    def _asked_dtype(self) -> str:
        """What `dtype`, `bf16` and `fp16` say together."""
        switches = {"bfloat16": self.bf16, "float16": self.fp16}
        on = [name for name, switch in switches.items() if switch]
        asked = {*on, self.dtype} - {"auto"}
        if len(asked) > 1 or any(switches.get(name) is False for name in asked):
            raise ValueError(f"--dtype {self.dtype}, --bf16 {self.bf16} and --fp16 {self.fp16} contradict each other.")
        if not asked and self.bf16 is False:
            return "float32"
        return next(iter(asked), "auto")


def parse(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, NoteLLM2TrainingArguments]:
    """Read `CONFIG.yaml [--key value ...]`; what stands on the command line wins.

    Raises:
        SystemExit: with a message, when the file can't be read or is no mapping, for an unknown option, or when a
            needed one is missing.
    """
    parser = OptionParser(
        ModelArguments,
        DataArguments,
        NoteLLM2TrainingArguments,
        usage="training/run.py [CONFIG.yaml] [--key value ...]",
    )
    rest = list(arguments)
    from_file = _yaml_options(Path(rest.pop(0)), parser) if rest and not rest[0].startswith("-") else []
    return parser.read([*from_file, *rest])


def _yaml_options(path: Path, parser: OptionParser) -> list[str]:
    """A YAML mapping as command line options, so that both are checked and converted by the same rules."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"{path}: {error}")
    if not isinstance(settings, dict):
        parser.error(f"{path}: expected lines of 'option: value'.")
    known = {option.name for kind in parser.dataclass_types for option in fields(kind) if option.init}
    unknown = [str(key) for key in settings if key not in known]
    if unknown:
        parser.error(f"{path}: unknown option {', '.join(unknown)}; see `python training/run.py --help`.")
    options: list[str] = []
    for key, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        options += [f"--{key}", *(json.dumps(part) if isinstance(part, dict) else str(part) for part in values)]
    return options
