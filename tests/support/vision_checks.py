"""What a vision encoder must hold when it is joined: the checks that the matrix of families makes of each.

    python -m tests.support.vision_checks --output hub/backbones/FAMILIES.md

writes the file's section of vision encoders and composite models' towers: right in every check, or refused with which sentence.
"""

import argparse
import inspect
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaModel, PreTrainedModel
from transformers.utils import logging

from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.vision_notellm2 import vision_features
from modeling_notellm2.vision_probe_notellm2 import probe_inputs
from tests.support.family_checks import VISION_SECTION
from tests.support.vision_families import encoder_types, tiny_config, tiny_encoder, tower_types


QFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TOLERANCE = 1e-4
BEGIN, END = VISION_SECTION, "<!-- vision encoders: end -->"


@dataclass(frozen=True)
class Finding:
    """How a family came out.

    Attributes:
        status: "right", "refused" (with a sentence), "wrong", or "untried" (no tiny model could be made).
        note: the sentence, or what is wrong, or what the family's tokens and summary feature are.
    """

    status: str
    note: str = ""


def examine(model_type: str, folder: Path) -> Finding:
    """Makes a tiny encoder of the family, joins it with a tiny LLM, and tries everything."""
    try:
        config = tiny_config(model_type)
    except Exception as error:
        return Finding("untried", f"no tiny config: {one_line(error)}")
    try:
        encoder = tiny_encoder(config)
        model = join(encoder)
    except (ValueError, ImportError) as error:
        return Finding("refused", one_line(error))
    except MemoryError as error:
        return Finding("untried", str(error))
    except Exception as error:
        return Finding("untried", f"no tiny model: {one_line(error)}")
    try:
        faults = list(_faults(model, folder))
        return Finding("wrong", "; ".join(faults)) if faults else Finding("right", _described(model))
    except Exception as error:
        return Finding("wrong", one_line(error))


def join(encoder: PreTrainedModel | str) -> NoteLLM2Model:
    """The encoder, or a folder's, with a tiny LLM; random query tokens, so that pictures matter from the start."""
    torch.manual_seed(1)
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaModel(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, **heads))
    tokens = {"image_token_id": 18, "visual_embedding_token_id": 19}
    model = NoteLLM2Model.from_vision_text_pretrained(
        encoder, text, qformer_config=QFORMER, num_query_tokens=2, embedding_dim=8, **tokens
    )
    torch.nn.init.normal_(model.query_tokens)
    return model.eval()


def pictures(encoder: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Three random pictures as the encoder takes them; of different sizes where it takes such."""
    for pixels, sizes in probe_inputs(encoder, inspect.signature(encoder.forward).parameters):
        try:
            with torch.no_grad():
                vision_features(encoder, pixels, -1, sizes)
        except Exception:  # this encoder wants its patches in the next shape
            continue
        values = torch.randn(3, *pixels.shape[1:], generator=torch.Generator().manual_seed(2))
        if sizes is None:
            return {"pixel_values": values}
        several = sizes.repeat(3, 1)
        several[1, -2] //= 2
        several[2, -2:] //= 2
        return {"pixel_values": values, "image_sizes": several}
    raise ValueError("no picture could be made for the encoder")


@torch.no_grad()
def embed(model: NoteLLM2Model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Multimodal and visual embeddings `(n, 2, 8)` of items with one picture each."""
    ids = torch.tensor([[3, 18, 18, 4, 19, 5, 6]] * len(inputs["pixel_values"]))
    output = model(input_ids=ids, **inputs)
    return torch.stack([output.embeddings, output.visual_embeddings], dim=1).float()


def _faults(model: NoteLLM2Model, folder: Path) -> Iterator[str]:
    inputs = pictures(model.vision_model)
    together = embed(model, inputs)
    if not torch.isfinite(together).all():
        yield "not finite"
    if not torch.equal(embed(model, inputs), together):
        yield "another embedding each time"
    for row in range(3):
        alone = embed(model, {name: values[row : row + 1] for name, values in inputs.items()})
        if (difference := (alone[0] - together[row]).abs().max().item()) > TOLERANCE:
            yield f"alone differs from in a batch by {difference:.4f}"
            break
    if (together[0] - together[1]).abs().amax(-1).min() < 1e-3:
        yield "pictures don't matter"
    if any(weight.requires_grad for weight in model.vision_model.parameters()) or model.train().vision_model.training:
        yield "not frozen"
    model.eval().save_pretrained(folder)
    loaded = NoteLLM2Model.from_pretrained(folder).eval()
    if type(loaded.vision_model) is not type(model.vision_model):
        yield f"loaded as {type(loaded.vision_model).__name__}"
    if (difference := (embed(loaded, inputs) - together).abs().max().item()) > TOLERANCE:
        yield f"saved and loaded differs by {difference:.4f}"
    half = NoteLLM2Model.from_pretrained(folder, dtype=torch.bfloat16).eval()
    similar = torch.cosine_similarity(embed(half, inputs), together, dim=-1).min().item()
    if not similar > 0.9:
        yield f"in bfloat16 cosine {similar:.2f} to float32"


def _described(model: NoteLLM2Model) -> str:
    inputs = pictures(model.vision_model)
    with torch.no_grad():
        features = model.get_vision_features(**inputs)
        kinds = []
        for summary in ("cls", "pooler", "mean"):
            try:
                given = vision_features(model.vision_model, **inputs, summary=summary).pooler_output
            except ValueError:
                continue
            kinds.append(summary)
            if torch.equal(given, features.pooler_output):
                break
    return f"summary: {kinds[-1]}" + ("; pictures of any size" if "image_sizes" in inputs else "")


def one_line(error: Exception) -> str:
    """An error's first sentence, with its kind unless it is a ValueError."""
    text = " ".join(str(error).split()).split(". ")[0]
    return text if isinstance(error, (ValueError, ImportError)) else f"{type(error).__name__}: {text}"


def table() -> str:
    """The section of FAMILIES.md, between its marks."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = ["| family | status | note |", "|---|---|---|"]
    for model_type in [*encoder_types(), *tower_types()]:
        with tempfile.TemporaryDirectory() as folder:
            finding = examine(model_type, Path(folder))
        print(model_type, finding.status, finding.note, flush=True)
        note = finding.note[:200].replace("|", "\\|")
        rows.append(f"| {model_type} | {finding.status} | {note} |")
    heading = (
        "## Vision encoders\n\nOf `AutoModel`, and the towers of composite models (`clip` gives its `clip_vision_model`). "
        "`summary` is what `vision_summary: auto` takes."
    )
    return "\n".join([BEGIN, heading, "", *rows, END])


def main() -> None:
    """Replaces the section in the file, or adds it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    path = parser.parse_args().output
    before = path.read_text(encoding="utf-8") if path.exists() else "# Families that were tried\n"
    start, _, rest = before.partition(BEGIN)
    path.write_text(start.rstrip() + "\n\n" + table() + "\n" + rest.partition(END)[2].lstrip(), encoding="utf-8")


if __name__ == "__main__":
    main()
