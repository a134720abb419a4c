"""The connector's warm-up on a catalogue: what it learns, and what it leaves alone."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel

from tests.support.models import make_model
from training.align import main
from training.evaluation.saliency import token_kinds
from training.trainer.aligning import alignment_losses, matching_loss


CONNECTOR = ("qformer.", "projector.", "query_tokens")


def options(model, items, output, **more):
    given = {"model": model, "items": items, "output": output, "dtype": "float32", "device": "cpu", **more}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("connector", ["qformer", "mlp"])
def test_matching_teaches_the_connector_and_nothing_else(coloured_tables, tmp_path, connector):
    items, output = coloured_tables / "items.parquet", tmp_path / "out"
    for part in make_model(connector=connector):
        part.save_pretrained(tmp_path / "base")
    sizes = {"steps": 40, "batch_size": 24, "learning_rate": 3e-3, "vision_cache_dir": tmp_path / "cache"}
    assert main(options(tmp_path / "base", items, output, caption_weight=0, **sizes)) == 0
    log = json.loads((output / "alignment.json").read_text())["log"]
    assert log[-1]["matching_loss"] < log[0]["matching_loss"] - 0.2
    old, new = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", output))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith(CONNECTOR) for name in changed)
    assert AutoModel.from_pretrained(output, trust_remote_code=True)


def test_the_captioning_loss_is_that_of_the_items_own_words_behind_the_picture():
    model, processor = make_model()
    items = [
        {"title": "abc", "image": Image.new("RGB", (8, 8), "red")},
        {"content": "defgh", "image": Image.new("RGB", (8, 8))},
    ]
    inputs = processor(items, return_tensors="pt")
    caption, _ = alignment_losses(model, inputs, token_kinds(processor, items, inputs), captions=True)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    logits = hidden @ model.get_input_embeddings().weight.T
    losses = []
    for row, word in enumerate(("abc", "defgh")):
        ids = inputs["input_ids"][row].tolist()
        written = processor.tokenizer(word)["input_ids"]
        start = next(place for place in range(len(ids)) if ids[place : place + len(written)] == written)
        places = range(start, start + len(written))
        losses += [F.cross_entropy(logits[row, place - 1], inputs["input_ids"][row, place]) for place in places]
    torch.testing.assert_close(caption, torch.stack(losses).mean())
    caption.backward()
    assert model.query_tokens.grad.any()
    assert model.projector.linear_2.weight.grad.any()


def test_a_text_finds_its_picture_whatever_all_have_in_common():
    generator = torch.Generator().manual_seed(0)
    told, common = torch.randn(16, 8, generator=generator), 100 * torch.randn(8, generator=generator)
    assert matching_loss(told + common, 3 * told - common) < 0.1
    assert matching_loss(told + common, told.roll(1, 0)) > 3


@pytest.mark.parametrize(
    ("more", "said"),
    [({}, "caption_weight 0"), ({"caption_weight": 0, "batch_size": 999}, "143 items")],
)
def test_what_can_not_be_learned_from_is_refused(coloured_tables, tiny_model_folder, tmp_path, more, said):
    with pytest.raises(SystemExit, match=said):
        main(options(tiny_model_folder, coloured_tables / "items.parquet", tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()
