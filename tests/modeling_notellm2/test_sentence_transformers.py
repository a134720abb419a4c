"""A saved folder as a sentence-transformers model: encoding and saving; also without the package."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from tests.support.models import make_model


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


ITEMS = [
    {"item_id": "1", "title": "red panda", "topics": ["zoo", "forest"], "content": "sleeps", "image": picture(1)},
    "a text alone, which is longer than the others",
    picture(2),
    {"title": "two pictures", "image": [picture(3), picture(4)]},
    {"title": "no picture", "image": None},
    "",
]


@pytest.fixture(scope="module")
def encoder(tiny_model_folder) -> SentenceTransformer:
    """Don't train or change it."""
    return SentenceTransformer(str(tiny_model_folder), trust_remote_code=True)


def embed(folder, items, **kwargs):
    """Both embeddings by AutoModel and AutoProcessor, as arrays."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(items, return_tensors="pt", **kwargs))
    return outputs.embeddings.numpy(), outputs.visual_embeddings.numpy()


def assert_same(given, expected) -> None:
    np.testing.assert_allclose(given, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_embeddings_are_those_of_automodel_in_the_order_of_the_items(encoder, tiny_model_folder, batch_size):
    multimodal, visual = embed(tiny_model_folder, ITEMS)
    assert_same(encoder.encode(ITEMS, batch_size=batch_size, show_progress_bar=True), multimodal)
    assert_same(encoder.encode(ITEMS, batch_size=batch_size, output="visual"), visual)
    assert not visual[[1, 4, 5]].any() and visual[[0, 2, 3]].any(1).all()


def test_every_kind_of_item_alone_and_mixed(encoder, tmp_path):
    picture(1).save(tmp_path / "panda.png")
    kinds = [tmp_path / "panda.png", picture(1), np.asarray(picture(1)), {"image": str(tmp_path / "panda.png")}]
    kinds += [{"image": picture(1), "text": ""}, {"image": [(tmp_path / "panda.png").read_bytes()]}]
    mixed = encoder.encode([*kinds, "sleeps", {"text": "sleeps"}, {"content": "sleeps"}])
    assert mixed.shape == (9, 24)
    assert_same(mixed[:6], np.tile(mixed[0], (6, 1)))
    assert_same(mixed[6:], np.tile(mixed[6], (3, 1)))
    for item, embedding in zip(kinds, mixed, strict=False):
        assert encoder.encode(item).shape == (24,)
        assert_same(encoder.encode(item), embedding)
    assert_same(
        encoder.encode({"text": "sleeps", "image": picture(1)}),
        encoder.encode([ITEMS[0] | {"title": None, "topics": []}])[0],
    )
    assert len(encoder.encode([])) == 0


def test_arrays_and_columns_of_items(encoder, tiny_model_folder):
    dicts = [ITEMS[0], {"title": "two pictures", "image": picture(3)}, {"title": "no picture"}]
    expected = embed(tiny_model_folder, dicts)[0]
    assert_same(encoder.encode(np.array(dicts, dtype=object)), expected)
    assert_same(encoder.encode(np.array(["a", "b"])), encoder.encode(["a", "b"]))
    fields = {"title": datasets.Value("string"), "topics": datasets.List(datasets.Value("string"))}
    fields |= {"content": datasets.Value("string"), "image": datasets.Image()}
    rows = [{"item": {name: item.get(name) for name in fields}, "picture": picture(n)} for n, item in enumerate(dicts)]
    for decode in (True, False):
        features = {"item": {**fields, "image": datasets.Image(decode=decode)}, "picture": datasets.Image()}
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        assert_same(encoder.encode(table["item"]), expected)
    assert_same(encoder.encode(table["picture"]), encoder.encode([picture(0), picture(1), picture(2)]))


def test_options_of_encode(encoder, tmp_path):
    full = encoder.encode(ITEMS)
    as_tensor = encoder.encode(ITEMS, convert_to_tensor=True)
    assert isinstance(as_tensor, torch.Tensor)
    assert_same(as_tensor.numpy(), full)
    short = encoder.encode(ITEMS, truncate_dim=16, normalize_embeddings=True)
    assert_same(short, full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True))
    np.testing.assert_array_equal(
        encoder.encode(ITEMS, precision="binary").view(np.uint8), np.packbits(full > 0, axis=1) ^ 128
    )
    assert encoder.encode(ITEMS, precision="int8").dtype == np.int8
    assert_same(encoder.similarity(full, full).numpy(), full @ full.T)
    assert encoder.get_embedding_dimension() == 24
    with encoder.truncate_embeddings(8):
        assert encoder.encode("a").shape == (encoder.get_embedding_dimension(),) == (8,)
    settings = encoder.encode(ITEMS[:2], processing_kwargs={"pad_to_multiple_of": 64, "padding_side": "left"})
    assert_same(settings, full[:2])


def test_what_any_module_of_sentence_transformers_must_do(tiny_model_folder):
    """Their documented contract. Two exceptions: items aren't cut at a length, and there are no token embeddings."""
    encoder = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True)
    full = encoder.encode(ITEMS)
    for same in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        np.testing.assert_array_equal(same.encode(ITEMS), full)
    for encode in (encoder.encode_query, encoder.encode_document):
        np.testing.assert_array_equal(encode(ITEMS), full)
    features = encoder.encode(ITEMS, output_value=None)
    assert_same(torch.stack([feature["sentence_embedding"] for feature in features]).numpy(), full)
    assert encoder.supports("image") and encoder.supports("text") and encoder.supports(("image", "text"))
    encoder.load_state_dict(encoder.state_dict())
    encoder.to(torch.bfloat16).float()
    with pytest.raises(AttributeError, match="max_title_length"):
        encoder.max_seq_length = 32
    with pytest.raises(KeyError, match="token_embeddings"):
        encoder.encode(ITEMS, output_value="token_embeddings")


@pytest.mark.slow
def test_several_processes_encode_as_one(encoder):
    assert_same(encoder.encode(ITEMS, device=["cpu", "cpu"], batch_size=2, chunk_size=2), encoder.encode(ITEMS))


def test_half_precision(tiny_model_folder):
    half = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True).half()
    loaded = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True, model_kwargs={"dtype": torch.float16})
    expected = embed(tiny_model_folder, ITEMS)[0]
    for model in (half, loaded):
        embeddings = model.encode(ITEMS)
        assert embeddings.dtype == np.float16
        np.testing.assert_allclose(embeddings, expected, atol=5e-3)


def test_a_prompt_is_text_before_the_item_and_none_is_the_default(encoder, tiny_model_folder):
    prompt = "<IMG><|im_start|>find: "
    multimodal, visual = embed(tiny_model_folder, ITEMS, prefix=prompt)
    assert_same(encoder.encode(ITEMS, prompt=prompt), multimodal)
    assert_same(encoder.encode(ITEMS, prompt=prompt, output="visual"), visual)
    assert np.abs(encoder.encode(ITEMS) - multimodal).max() > 1e-3
    assert_same(encoder.encode_query(ITEMS), encoder.encode(ITEMS))
    assert_same(encoder.encode_document(ITEMS), encoder.encode(ITEMS))
    plain, processed = (encoder.processor(ITEMS, prefix=text)["input_ids"] for text in (None, prompt))
    for special in (encoder.processor.image_token_id, encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")):
        assert sum(row.count(special) for row in plain) == sum(row.count(special) for row in processed)
    prompted = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True, prompts={"query": prompt})
    assert_same(prompted.encode_query(ITEMS), multimodal)
    assert_same(prompted.encode_document(ITEMS), encoder.encode(ITEMS))


def test_mistakes_are_named(encoder, tmp_path, caplog):
    with pytest.raises(ValueError, match="a dict of bytes, path has none of content, image"):
        encoder.encode(["a", {"bytes": b"", "path": None}], batch_size=2)
    with pytest.raises(ValueError, match="row 0 .item_id '7'.: a dict of item_id, Title has none of"):
        encoder.encode([{"item_id": "7", "Title": "a"}])
    with pytest.raises(ValueError, match="`text` and `content`"):
        encoder.encode({"text": "a", "content": "b"})
    with pytest.raises(ValueError, match="row 0 .item_id '7'.: image file .* does not exist"):
        encoder.encode({"item_id": "7", "image": tmp_path / "none.png"})
    with pytest.raises(ValueError, match="expected one of multimodal, visual"):
        encoder.encode("a", output="text")
    with pytest.raises(TypeError, match="max_length"):
        encoder.preprocess(["a"], max_length=10)
    with pytest.raises(ValueError, match="backend='torch'"):
        SentenceTransformer(encoder[0].model.name_or_path, trust_remote_code=True, backend="onnx")
    picture(1).save(tmp_path / "panda.png")
    logging.enable_propagation()
    try:
        assert_same(
            encoder.encode(str(tmp_path / "panda.png")), encoder.encode({"content": str(tmp_path / "panda.png")})
        )
    finally:
        logging.disable_propagation()
    assert "pathlib.Path" in caplog.text


def test_a_visual_embedding_needs_micl(tmp_path):
    model, processor = make_model(micl=False)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    assert encoder.encode(ITEMS).shape == (6, 24)
    with pytest.raises(ValueError, match="needs a model with mICL"):
        encoder.encode(ITEMS, output="visual")


def test_saving_keeps_what_sentence_transformers_was_told(encoder, tiny_model_folder, tmp_path):
    """Prompts and truncation survive; AutoModel's own save into the folder leaves them alone."""
    told = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True, prompts={"query": "q: "}, truncate_dim=8)
    told.save(str(tmp_path))
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    assert (again.prompts["query"], again.truncate_dim) == ("q: ", 8)
    assert_same(again.encode_query(ITEMS), told.encode_query(ITEMS))
    assert_same(embed(tmp_path, ITEMS)[0], encoder.encode(ITEMS))


def test_the_modalities_that_a_folder_names_are_read_by_others_alone(encoder, tiny_model_folder, tmp_path):
    """Folders of before, without that file, load as well."""
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    named = json.loads((tmp_path / "model" / "sentence_bert_config.json").read_text())["modality_config"]
    assert set(named) == {"text", "image"}
    (tmp_path / "model" / "sentence_bert_config.json").unlink()
    old = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True)
    assert_same(old.encode(ITEMS), encoder.encode(ITEMS))
    assert old.modalities == encoder.modalities
    old.save(str(tmp_path / "again"))
    assert (tmp_path / "again" / "sentence_bert_config.json").is_file()


def test_push_to_hub_uploads_a_folder_that_loads(encoder, tmp_path, monkeypatch):
    """Up to the two calls of the Hub's API that leave the machine."""

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **kwargs):
            Path(folder_path).rename(tmp_path / "uploaded")
            Path(folder_path).mkdir()
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr("sentence_transformers.base.model.HfApi", Hub)
    assert encoder.push_to_hub("org/items", replace_model_card=True) == "https://hub/org/items/commit/1"
    uploaded = SentenceTransformer(str(tmp_path / "uploaded"), trust_remote_code=True)
    assert_same(uploaded.encode(ITEMS), encoder.encode(ITEMS))
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert 'SentenceTransformer("org/items", trust_remote_code=True)' in card


def fresh_encoder(folder) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True)


FRESH = """
import sys
sys.path.append(sys.argv[1])
import json
from pathlib import Path
from PIL import Image
from sentence_transformers import SentenceTransformer

def main():
    try:
        import modeling_notellm2
    except ImportError:
        pass
    else:
        raise SystemExit("the package is importable: this tests nothing")
    folder, picture, again = sys.argv[2:5]
    model = SentenceTransformer(folder, trust_remote_code=True)
    items = [{"title": "a", "image": picture}, "text", Image.open(picture), Path(picture)]
    results = {"embeddings": model.encode(items).tolist(), "visual": model.encode(items, output="visual").tolist()}
    if len(sys.argv) > 5:
        pool = model.start_multi_process_pool(["cpu"] * 2)
        results["pool"] = model.encode(items, pool=pool, chunk_size=1).tolist()
        results["pool visual"] = model.encode(items, pool=pool, output="visual", batch_size=1).tolist()
        model.stop_multi_process_pool(pool)
    model.save(again)
    print(json.dumps(results))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_where_the_package_is_not_installed(tiny_model_folder, tmp_path):
    """The saved folder, with several processes, and the folder that the process without the package saved again."""
    picture(1).save(tmp_path / "picture.png")
    (tmp_path / "fresh.py").write_text(FRESH)
    items = [{"title": "a", "image": picture(1)}, "text", picture(1), picture(1)]
    multimodal, visual = embed(tiny_model_folder, items)
    for source, target, more in ((tiny_model_folder, "again", ["pool"]), (tmp_path / "again", "third", [])):
        results = run_fresh(tmp_path, tmp_path / "fresh.py", source, tmp_path / "picture.png", tmp_path / target, *more)
        assert len(results) == 2 + 2 * len(more)
        for name, embeddings in results.items():
            assert_same(embeddings, visual if "visual" in name else multimodal)


WITHOUT = """
import sys
sys.path.append(sys.argv[1])
sys.modules["sentence_transformers"] = None
import json
import torch
from transformers import AutoModel, AutoProcessor
folder, again = sys.argv[2:4]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    embeddings = model(**processor(["text"], return_tensors="pt")).embeddings
model.save_pretrained(again)
processor.save_pretrained(again)
print(json.dumps({"embeddings": embeddings.tolist()}))
"""


@pytest.mark.slow
def test_without_sentence_transformers_a_model_loads_and_is_saved_whole(tiny_model_folder, encoder, tmp_path):
    (tmp_path / "without.py").write_text(WITHOUT)
    result = run_fresh(tmp_path, tmp_path / "without.py", tiny_model_folder, tmp_path / "again")
    assert_same(result["embeddings"], encoder.encode(["text"]))
    assert_same(fresh_encoder(tmp_path / "again").encode(ITEMS), encoder.encode(ITEMS))


def run_fresh(folder: Path, *arguments) -> dict:
    """A script in a process that has site-packages but, by -S, not the editable install; its last line is JSON."""
    script, *rest = arguments
    command = [sys.executable, "-I", "-S", script, sysconfig.get_paths()["purelib"], *rest]
    environment = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])
