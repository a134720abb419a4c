"""What an LLM family must hold when it is joined: the checks that the matrix of families makes of each.

    python -m tests.support.family_checks --output hub/backbones/FAMILIES.md

writes the table of all families of the installed transformers: right in every check, or refused with which sentence.
"""

import argparse
import contextlib
import logging
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.backbones_notellm2 import language_stack, load_language_model
from tests.support.families import causal_families, multimodal_families, tiny_model
from tests.support.models import make_image_processor, make_tokenizer


SECONDS = 60
VISION_SECTION = "<!-- vision encoders: begin -->"  # what `vision_checks` writes behind the table
QFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TOLERANCE = 5e-5


@dataclass(frozen=True)
class Finding:
    """How a family came out.

    Args:
        status: "right", "refused" (with a sentence), "wrong" or "untried" (no tiny model could be made).
        note: the sentence, or what is wrong, or how the model is called where that is unusual.
    """

    status: str
    note: str = ""


class Wrong(AssertionError):  # noqa: N818
    """A check that does not hold."""


class TooLong(BaseException):
    """A family is too slow to be tried; no `except Exception` of a library may take it."""


def examine(family: str, folder: Path) -> Finding:
    """Makes a tiny model of the family, saves it with a tokenizer, joins the folder, and tries everything."""
    try:
        with time_limit(SECONDS):
            return _examine(family, folder)
    except TooLong:
        return Finding("untried", f"takes more than {SECONDS} seconds")


def _examine(family: str, folder: Path) -> Finding:
    try:
        source = tiny_model(family)
        source.save_pretrained(folder / "text")
    except Exception as error:
        return Finding("untried", f"transformers makes or saves no tiny model: {_one_line(error)}")
    make_tokenizer().save_pretrained(folder / "text")
    try:
        model = join(str(folder / "text"))
    except ValueError as error:
        return Finding("refused", _one_line(error))
    except Exception as error:
        return Finding("wrong", f"joining: {_one_line(error)}")
    try:
        check(model, source, folder)
    except Exception as error:
        return Finding("wrong", _one_line(error))
    return Finding("right", unusual(model))


def join(text: str | PreTrainedModel) -> NoteLLM2Model:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, image_size=32, patch_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = NoteLLM2Model.from_vision_text_pretrained(
        CLIPVisionModel(vision), text, qformer_config=QFORMER, num_query_tokens=3, embedding_dim=16
    )
    torch.nn.init.normal_(model.query_tokens)
    return model.eval()


def unusual(model: NoteLLM2Model) -> str:
    config = model.config
    notes = []
    if config.padding_side:
        notes.append(f"padded on the {config.padding_side} only")
    if config.text_inputs == "ids":
        notes.append("called with its token ids beside the embeddings")
    if config.text_class:
        notes.append(f"built as {config.text_class}")
    return ", ".join(notes)


def check(model: NoteLLM2Model, source: PreTrainedModel, folder: Path) -> None:
    """All checks of one family, the cheap ones first.

    Raises:
        Wrong: naming the check.
    """
    processor = NoteLLM2Processor.from_vision_text_pretrained(
        make_image_processor(), make_tokenizer(), model=model, prompt_language="en"
    )
    pictures = list(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8))
    texts = ["<IMG>in one word:<IMG_EMB> red apple, fresh from a garden", "<IMG>x<IMG_EMB>y", "green pear"]
    alone = [
        _embed(model, processor(text=text, images=images, return_tensors="pt"))
        for text, images in zip(texts, [pictures[:1], pictures[1:], None], strict=True)
    ]
    expected = torch.cat(alone)
    if not expected.isfinite().all():
        raise Wrong("embeddings are not finite")
    for side in [model.config.padding_side] if model.config.padding_side else ["left", "right"]:
        together = _embed(model, processor(text=texts, images=pictures, return_tensors="pt", padding_side=side))
        _same(together, expected, f"alone and in a batch padded on the {side}")
    _check_text_states(model, source, processor)
    batch = processor(text=texts, images=pictures, return_tensors="pt")
    _check_pictures(model, batch, expected)
    _check_gradients(model, batch)
    model.eval()
    model.save_pretrained(folder / "joined")
    again, info = NoteLLM2Model.from_pretrained(folder / "joined", output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise Wrong(
            f"saved and loaded: missing {sorted(info['missing_keys'])[:3]}, surplus {sorted(info['unexpected_keys'])[:3]}"
        )
    _same(_embed(again.eval(), batch), _embed(model, batch), "saved and loaded")
    del again
    for dtype in (torch.bfloat16, torch.float16):
        half = NoteLLM2Model.from_pretrained(folder / "joined", dtype=dtype).eval()
        try:
            embeddings = _embed(half, batch)
        except RuntimeError:
            if _runs_alone(folder / "text", dtype, batch["input_ids"]):
                raise
            continue
        if embeddings.dtype != dtype or not embeddings.isfinite().all():
            raise Wrong(f"loaded in {dtype}: not finite, or in {embeddings.dtype}")
        if dtype == torch.bfloat16 and (embeddings.float() * _embed(model, batch)).sum(-1).min() < 0.8:
            raise Wrong(f"loaded in {dtype}: another embedding")


def _runs_alone(folder: Path, dtype: torch.dtype, input_ids: torch.Tensor) -> bool:
    """Whether transformers' own model of the family can be called in a dtype at all."""
    try:
        load_language_model(str(folder), dtype=dtype)(input_ids=input_ids)
    except RuntimeError:
        return False
    return True


def _embed(model: NoteLLM2Model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).embeddings


def _same(values: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    distance = (values - expected).abs().max().item()
    if not distance <= TOLERANCE:
        raise Wrong(f"{what}: {distance:.2g}")


def _check_text_states(model: NoteLLM2Model, source: PreTrainedModel, processor: NoteLLM2Processor) -> None:
    """A text's last state is the one that the family's own model makes of the same ids."""
    inputs = processor(text="nothing but a text", return_tensors="pt")
    with torch.no_grad():
        ours = model(**inputs)
        states = language_stack(source)(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
    last = torch.nn.functional.normalize(model.reduction(states[:, -1]), dim=-1)
    _same(ours.embeddings, last, "differs from the family's own forward")


def _check_pictures(model: NoteLLM2Model, batch: dict, expected: torch.Tensor) -> None:
    """The visual embedding knows the picture but nothing of the text behind it; another picture changes both."""
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    with torch.no_grad():
        first, second = model(**batch), model(**other)
        longer = batch["input_ids"].clone()
        places = batch["attention_mask"].cumsum(-1).argmax(-1)
        longer[torch.arange(len(longer)), places] = 7
        changed = model(**{**batch, "input_ids": longer})
    with_picture = first.has_image
    if (first.embeddings - second.embeddings)[with_picture].abs().max() < 1e-4:
        raise Wrong("pictures don't matter")
    if (first.visual_embeddings - second.visual_embeddings)[with_picture].abs().max() < 1e-4:
        raise Wrong("pictures don't matter for the visual embedding")
    _same(changed.visual_embeddings, first.visual_embeddings, "not causal: the visual embedding sees the text")
    if (changed.embeddings - first.embeddings).abs().max() < 1e-4:
        raise Wrong("the last token doesn't matter")


def _check_gradients(model: NoteLLM2Model, batch: dict) -> None:
    """Query tokens and every layer learn; recomputing activations changes nothing; the frozen encoder stays as it is."""
    grads = []
    ways = [False, True] if model.language_model.supports_gradient_checkpointing else [False]
    for recompute in ways:
        model.train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        output = model(**batch)
        (output.embeddings * torch.arange(16.0)).sum().backward()
        if not (model.query_tokens.grad is not None and model.query_tokens.grad.any()):
            raise Wrong("no gradient reaches the query tokens")
        if model.vision_model.training or any(p.grad is not None for p in model.vision_model.parameters()):
            raise Wrong("the frozen vision encoder is trained")
        grads.append(model.query_tokens.grad.clone())
        model.zero_grad()
    if len(ways) > 1:
        model.gradient_checkpointing_disable()
        scale = grads[0].abs().max()
        if (grads[0] - grads[1]).abs().max() > 1e-3 * scale:
            raise Wrong("other gradients with gradient checkpointing")


def _one_line(error: BaseException) -> str:
    kind = "" if isinstance(error, (ValueError, Wrong)) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Ends what takes more seconds of this process's own time, with `TooLong`."""

    def late(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def findings(names: list[str]) -> Iterator[tuple[str, Finding]]:
    """Each family's finding, as it is made."""
    for family in names:
        with tempfile.TemporaryDirectory() as folder:
            finding = examine(family, Path(folder))
        yield family, Finding(finding.status, finding.note.replace(folder, "DIR"))


def table(rows: dict[str, Finding]) -> str:
    """The findings as Markdown: a row for each family, with how it is called or why it is refused."""
    counts = Counter(finding.status for finding in rows.values())
    lines = [
        "# LLM families as `text`",
        "",
        f"Tried with transformers {transformers.__version__} on tiny random models of all its causal language models and of all",
        "its models of pictures and text: "
        + ", ".join(f"{counts[status]} {status}" for status in sorted(counts))
        + ".",
        "",
        "*right*: alone as in a batch on every side of padding that it allows, causal, the family's own states for a text,",
        "pictures matter, gradients (recomputed too), saved and loaded, in bfloat16 and float16. *refused*: joining ends with",
        "the sentence of the note, before anything is saved. *untried*: no tiny model could be made here; joining tries it.",
        "",
        "Written by `python -m tests.support.family_checks --output hub/backbones/FAMILIES.md`.",
        "",
        "| family | status | note |",
        "| --- | --- | --- |",
    ]
    for family, finding in sorted(rows.items()):
        note = finding.note.partition(" A decoder-only language model is expected")[0].replace("|", "\\|")
        lines.append(f"| {family} | {finding.status} | {note[:200]} |")
    return "\n".join(lines) + "\n"


def rows_of(text: str) -> dict[str, str]:
    """Family and status of each row of a table; a section of vision encoders behind it is left out."""
    text, _, _ = text.partition(VISION_SECTION)
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    return {row[0].removeprefix("| "): row[1] for row in cells if len(row) > 2 and row[0] != "| ---"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; all if left out")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = {}
    for family, finding in findings(options.families or causal_families() + multimodal_families()):
        rows[family] = finding
        print(f"{family:26} {finding.status:8} {finding.note[:300]}", flush=True)
    if options.output:
        before = options.output.read_text(encoding="utf-8") if options.output.exists() else ""
        _, mark, vision = before.partition(VISION_SECTION)
        options.output.write_text(table(rows) + ("\n" + mark + vision if mark else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
