"""What a joined folder must hold before it takes its place: it loads whole and embeds as the model that was saved."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor


# Largest distance of two unit vectors that are the same but for rounding, in single and in half precision.
TOLERANCE, TOLERANCE_OF_HALF = 1e-4, 5e-2


def check_saved(folder: Path, model: NoteLLM2Model) -> None:
    """Loads a saved folder and compares its embeddings of a picture with text and of a text alone.

    Args:
        folder: what `model` and its processor were saved in.
        model: as it was saved, in eval mode.

    Raises:
        ValueError: if weights are missing or left over, or if an embedding is another one.
    """
    loaded = NoteLLM2Model.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    again, info = cast("tuple[NoteLLM2Model, dict[str, Any]]", loaded)  # its annotation knows the model alone
    amiss = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    amiss = {kind: names for kind, names in amiss.items() if names}
    if amiss:
        listed = "; ".join(f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in amiss.items())
        raise ValueError(f"the saved model does not load whole: {listed}. {_advice(model)}")
    inputs = NoteLLM2Processor.from_pretrained(folder)(_trial_items(), return_tensors="pt")
    with torch.no_grad():
        expected, reloaded = model(**inputs).embeddings, again.eval()(**inputs).embeddings
    distance = (reloaded.float() - expected.float()).norm(dim=-1).max()
    if not distance <= (TOLERANCE if model.dtype.itemsize >= 4 else TOLERANCE_OF_HALF):  # NaN is too far as well
        raise ValueError(f"the saved model embeds otherwise than before ({distance:.2g} apart). {_advice(model)}")


def _trial_items() -> list[dict[str, object]]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return [{"title": "red apple", "image": Image.fromarray(noise)}, {"title": "green pear"}]


def _advice(model: NoteLLM2Model) -> str:
    halves = f"{type(model.vision_model).__name__} and {type(model.language_model).__name__}"
    return f"{halves} can't be joined so; choose another --text or --vision, or look into it with --no_check."
