"""A saved folder trains with sentence-transformers, and the card that this fills tells the truth."""

import io
import re
from contextlib import redirect_stdout
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from transformers import AutoModel

from tests.modeling_notellm2.test_sentence_transformers import ITEMS, assert_same, embed, fresh_encoder, picture


def pair_table() -> datasets.DatasetDict:
    """Pairs of dicts with one picture, two or none in each, and pairs of a picture and a text."""
    names = ["red panda", "coffee mill", "sailing boat", "oak tree", "violin", "bicycle"]
    partners = ["eats bamboo", "breakfast", "at sea", "forest", "plays Bach", "two wheels"]
    feature = {"title": datasets.Value("string"), "image": datasets.List(datasets.Image())}
    pictures = [[picture(n)] * (n % 3) for n in range(len(names))]
    pairs = {
        "anchor": [{"title": name, "image": images} for name, images in zip(names, pictures, strict=True)],
        "positive": [{"title": name, "image": [picture(n + 9)]} for n, name in enumerate(partners)],
    }
    items = datasets.Dataset.from_dict(pairs, features=datasets.Features(dict.fromkeys(pairs, feature)))
    pairs = {"anchor": [picture(n) for n in range(len(names))], "positive": partners}
    features = datasets.Features({"anchor": datasets.Image(), "positive": datasets.Value("string")})
    return datasets.DatasetDict({"items": items, "mixed": datasets.Dataset.from_dict(pairs, features=features)})


def test_a_gradient_cache_gives_the_gradients_of_the_whole_batch(tiny_model_folder):
    """Mini-batches must get the pictures of their own items, whose number differs."""
    table = pair_table()["items"]
    gradients = []
    for loss_class, kwargs in (
        (MultipleNegativesRankingLoss, {}),
        (CachedMultipleNegativesRankingLoss, {"mini_batch_size": 2}),
    ):
        encoder = fresh_encoder(tiny_model_folder)
        features = [encoder.preprocess(table[name][:]) for name in ("anchor", "positive")]
        loss = MatryoshkaLoss(encoder, loss_class(encoder, **kwargs), [24, 12])(features, None)
        loss.backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert not any(".vision_model." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def trained(tiny_model_folder, tmp_path_factory):
    """A model trained by sentence-transformers, its folder, and what the evaluator said before and after."""
    output = tmp_path_factory.mktemp("trained")
    encoder, table = fresh_encoder(tiny_model_folder), pair_table()
    config = encoder[0].model.config
    config.vision_config.name_or_path, config.text_config.name_or_path = "org/vision", "org/unknown"
    pairs = table["items"]
    evaluator = InformationRetrievalEvaluator(
        {f"q{n}": item for n, item in enumerate(pairs["anchor"])},
        {f"d{n}": item for n, item in enumerate(pairs["positive"])},
        {f"q{n}": {f"d{n}"} for n in range(len(pairs))},
        accuracy_at_k=[1],
        precision_recall_at_k=[1],
        mrr_at_k=[3],
        ndcg_at_k=[3],
        map_at_k=[3],
        name="items",
    )
    before = evaluator(encoder)
    loss = MatryoshkaLoss(encoder, CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=4), [24, 12])
    arguments = SentenceTransformerTrainingArguments(
        str(output / "run"),
        max_steps=40,
        per_device_train_batch_size=6,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="steps",
        save_steps=40,
        logging_steps=20,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(encoder, arguments, train_dataset=table, loss=loss, evaluator=evaluator)
    trainer.train()
    encoder.save(str(output / "model"))
    return encoder, output, before, evaluator(encoder)


def test_training_with_sentence_transformers(trained, tiny_model_folder):
    """The evaluator's score rises, the vision encoder stays, and AutoModel loads what was trained."""
    encoder, output, before, after = trained
    metric = "items_cosine_mrr@3"
    assert after[metric] > before[metric] + 0.2
    reference = AutoModel.from_pretrained(tiny_model_folder).state_dict()
    saved = AutoModel.from_pretrained(output / "model").state_dict()
    moved = {name for name, tensor in saved.items() if not torch.equal(tensor, reference[name])}
    assert not any(name.startswith("vision_model.") for name in moved)
    assert {"query_tokens", "reduction.weight", "late_fusion.gate.weight"} <= moved
    assert_same(embed(output / "model", ITEMS)[0], encoder.encode(ITEMS))
    checkpoint = fresh_encoder(output / "run" / "checkpoint-40")
    assert_same(checkpoint.encode(ITEMS), encoder.encode(ITEMS))


def test_the_card_shows_items_and_what_it_shows_is_what_comes_out(trained, monkeypatch):
    encoder, output, _, _ = trained

    def known(model_id, **kwargs):
        if model_id != "org/vision":
            raise OSError(model_id)
        return SimpleNamespace(id=model_id, sha="1" * 40)

    monkeypatch.setattr("sentence_transformers.base.model_card.get_model_info", known)
    encoder.model_card_data.first_save = True
    folder = output / "model"
    encoder.save(str(folder))
    card = (folder / "README.md").read_text()
    head = card.split("---")[1]
    assert "base_model:\n- org/vision\n" in head and "org/unknown" not in card
    assert "**Vision encoder:** clip_vision_model, from [org/vision]" in card
    assert "**Supported Modalities:** Text, Image, Image+Text\n" in card
    assert "red panda" in card
    assert "(picture)" in card
    assert len(card) < 40_000  # no bytes of pictures
    code = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("sentence_transformers_model_id", str(folder))
    assert Image.open(folder / "assets" / "item_1_0.png").size == (32, 32)
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code, {})
    shown = [line.removeprefix("# ") for line in code.splitlines() if line.startswith(("# (", "# tensor", "#   "))]
    assert printed.getvalue().splitlines() == shown
