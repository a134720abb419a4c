"""The cache of vision features: like uncached within float16, never stale, safe to kill, bounded, shared by workers."""

import io
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.conftest import make_model
from training.batches import vision_cache
from training.batches.collators import ItemCollator, cache_vision_features
from training.batches.vision_cache import encoder_key, open_vision_cache


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def model_and_processor():
    return make_model()


ITEMS = [
    {"item_id": "a", "title": "one", "image": png(0)},
    {"item_id": "b", "title": "none"},
    {"item_id": "c", "title": "two", "image": [png(1), png(2)]},
    {"item_id": "d", "title": "the first again", "image": png(0)},
    {"item_id": "e", "image": png(3)},
]


def test_cached_uncached_and_mixed_batches_give_the_same_embeddings(model_and_processor, tmp_path):
    model, processor = model_and_processor
    with torch.no_grad():
        expected = model(**ItemCollator(processor)(ITEMS))
    all_cached = cache_vision_features(model, processor, ITEMS, tmp_path / "all", batch_size=2)
    some_cached = cache_vision_features(model, processor, ITEMS[2:3], tmp_path / "some")

    assert (len(all_cached), len(some_cached)) == (4, 2)
    for cache, keys in (
        (all_cached, set()),
        (some_cached, {"pixel_values", "cached_images"}),
        (None, {"pixel_values"}),
    ):
        batch = ItemCollator(processor, cache)(ITEMS)
        assert batch.keys() & {"pixel_values", "cached_images"} == keys
        assert len(batch.get("pixel_values", ())) == {0: 0, 1: 5, 2: 3}[len(keys)]
        with torch.no_grad():
            found = model(**batch)
        assert found.has_image.tolist() == [True, False, True, True, True]
        torch.testing.assert_close(found.embeddings, expected.embeddings, atol=2e-3, rtol=0)
        torch.testing.assert_close(found.visual_embeddings, expected.visual_embeddings, atol=2e-3, rtol=0)
    mean = model.get_vision_features(ItemCollator(processor)(ITEMS[2:3])["pixel_values"]).pooler_output.mean(0)
    torch.testing.assert_close(all_cached.summary(ITEMS[2]), mean, atol=2e-3, rtol=2e-3)
    assert not all_cached.summary(ITEMS[1]).any()
    with pytest.raises(ValueError, match="vision_cache_gb"):
        some_cached.summary(ITEMS[0])


def test_a_changed_image_or_encoder_or_preprocessing_has_no_stale_features(model_and_processor, tmp_path):
    model, processor = model_and_processor
    path = tmp_path / "picture.png"
    path.write_bytes(png(4))
    item = {"item_id": "p", "image": str(path)}
    cache = cache_vision_features(model, processor, [item], tmp_path)
    assert "pixel_values" not in ItemCollator(processor, cache)([item])
    path.write_bytes(png(5))
    assert "vision_hidden_states" not in ItemCollator(processor, cache)([item])

    other, other_processor = make_model()
    assert encoder_key(other, other_processor) == encoder_key(model, processor)
    other_processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert encoder_key(other, other_processor) != encoder_key(other, processor)
    with torch.no_grad():
        next(other.vision_model.parameters()).add_(1e-3)
    assert len(open_vision_cache(other, processor, tmp_path)) == 0
    other.config.freeze_vision = False
    with pytest.raises(ValueError, match="frozen"):
        open_vision_cache(other, processor, tmp_path)


def test_what_is_stored_is_not_computed_again_and_the_limit_holds(model_and_processor, tmp_path, monkeypatch):
    model, processor = model_and_processor
    items = [{"item_id": str(number), "image": png(number)} for number in range(40)]
    items += [{"item_id": "bad", "image": b"no image"}, {"item_id": "lost", "image": "missing.png"}]
    monkeypatch.setattr(vision_cache, "FILE_BYTES", 5_000)
    cache = cache_vision_features(model, processor, items, tmp_path, batch_size=4)
    assert len(cache) == 40
    assert len(cache.files) > 3
    assert not list(tmp_path.rglob(".*.partial"))

    calls = []
    monkeypatch.setattr(model, "get_vision_features", lambda pixels: calls.append(len(pixels)))
    cache_vision_features(model, processor, items, tmp_path, batch_size=4)
    assert not calls
    monkeypatch.undo()

    cache.files[0].write_bytes(cache.files[0].read_bytes()[:50])
    left = len(open_vision_cache(model, processor, tmp_path))
    assert left < 40
    cache.files[0].unlink()
    assert len(cache_vision_features(model, processor, items, tmp_path)) == 40

    each = cache.size / 40
    bounded = cache_vision_features(
        model, processor, items, tmp_path / "bounded", limit_gb=12 * each / 1e9, batch_size=4
    )
    assert 8 <= len(bounded) <= 12
    assert bounded.size <= 13 * each
    again = cache_vision_features(model, processor, items, tmp_path / "bounded", limit_gb=12 * each / 1e9, batch_size=4)
    assert len(again) <= 12


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.conftest import make_model
from tests.training.batches.test_vision_cache import png
from training.batches import vision_cache
from training.batches.collators import cache_vision_features
vision_cache.FILE_BYTES = 5_000
write = os.replace
def replace(*paths):
    if len(list(Path(sys.argv[1]).rglob("*.safetensors"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*paths)
os.replace = replace  # which every writer uses
items = [{"item_id": str(number), "image": png(number)} for number in range(40)]
cache_vision_features(*make_model(), items, Path(sys.argv[1]), batch_size=4)
"""


@pytest.mark.slow
def test_a_killed_run_is_taken_up_where_its_last_file_ended(model_and_processor, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stored = len(open_vision_cache(*model_and_processor, tmp_path))
    assert 0 < stored < 40
    items = [{"item_id": str(number), "image": png(number)} for number in range(40)]
    assert len(cache_vision_features(*model_and_processor, items, tmp_path)) == 40


def test_workers_read_the_mapped_files(model_and_processor, tmp_path):
    model, processor = model_and_processor
    items = [{"item_id": str(number), "image": png(number % 6)} for number in range(12)]
    cache = cache_vision_features(model, processor, items[:3], tmp_path, num_workers=2)
    expected = model(**ItemCollator(processor, cache)(items), output_vision_features=True).vision_hidden_states
    collate = pickle.loads(pickle.dumps(ItemCollator(processor, cache)))  # as a spawned worker gets it
    loader = DataLoader(items, 4, num_workers=2, collate_fn=collate)
    batches = [model(**batch, output_vision_features=True).vision_hidden_states for batch in loader]
    torch.testing.assert_close(torch.cat(batches), expected, atol=1e-5, rtol=1e-4)
