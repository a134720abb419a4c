"""NoteLLM-2 for transformers and sentence-transformers: config, model, processor and loss.

The same files work installed as this package and as remote code beside a checkpoint's weights. torch is imported, and the
classes registered with transformers' Auto classes, when a name that needs them is first asked for, as in
`from modeling_notellm2 import NoteLLM2Model`: commands that only read tables or search an index start without torch.
"""

from typing import TYPE_CHECKING, Any

from .dtypes_notellm2 import DTYPES
from .prompts_notellm2 import ItemError


if TYPE_CHECKING:
    from .registered import (
        NoteLLM2Config,
        NoteLLM2Model,
        NoteLLM2Output,
        NoteLLM2PreTrainedModel,
        NoteLLM2Processor,
        Precision,
        choose_precision,
        complete_pairs,
        contrastive_pair_loss,
    )

__version__ = "0.1.0"

__all__ = [
    "DTYPES",
    "ItemError",
    "NoteLLM2Config",
    "NoteLLM2Model",
    "NoteLLM2Output",
    "NoteLLM2PreTrainedModel",
    "NoteLLM2Processor",
    "Precision",
    "choose_precision",
    "complete_pairs",
    "contrastive_pair_loss",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import registered

    return getattr(registered, name)
