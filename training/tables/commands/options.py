"""Options that several commands have: each is written once, so that it reads and means the same everywhere.

@dataclass
class Arguments:
    split: str | None = split_option()
"""

from dataclasses import field
from typing import Any

from modeling_notellm2 import DTYPES


def split_option() -> Any:
    """Which rows of a table with splits are read: a dataclass field."""
    return field(
        default=None, metadata={"help": "Split of the items' data set or folder; none: all, one after another."}
    )


def encoding_option() -> Any:
    """How text tables are decoded: a dataclass field."""
    return field(
        default=None,
        metadata={"help": "Of CSV and JSON lines tables, e.g. gbk or latin-1; none: UTF-8, or as their mark says."},
    )


def allow_remote_option() -> Any:
    """What may be asked over the network: a dataclass field."""
    return field(
        default=None,
        metadata={
            "help": "Hosts whose tables and pictures are fetched, and places such as s3://bucket, with commas between "
            "them; none: nothing is fetched."
        },
    )


def device_option() -> Any:
    """Where the model runs: a dataclass field."""
    return field(
        default_factory=_best_device,
        metadata={"help": "Where the model runs, e.g. cpu, cuda, cuda:1; by default a GPU if there is one."},
    )


def _best_device() -> str:
    import torch  # not above: commands without a model take options from here too

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_option() -> Any:
    """Type of the weights: a dataclass field."""
    return field(
        default="auto",
        metadata={"help": "Type of the weights; auto: bfloat16 where the machine has it.", "choices": list(DTYPES)},
    )
