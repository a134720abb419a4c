"""Items of chance: right or refused by name, the same alone and in any company; pictures with bytes of chance never crash.

Hypothesis writes the items. What an item may hold is drawn from what catalogues were seen to hold, broken pieces included.
"""

import io
import string
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_notellm2 import ItemError
from modeling_notellm2.images_notellm2 import MAX_ASPECT, load_image
from tests.support.models import make_model


def encoded(kind: str, size: tuple[int, int], seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
GOOD = [encoded(kind, (8 + number, 40 - number), number) for number, kind in enumerate(KINDS)]
SPECIAL = [
    "<IMG>",
    "<IMG_EMB>",
    "</s>",
    "<|endoftext|>",
    "in one word:",
    '{"title":',
    "\u202e",
    "\ufeff",
    "\0",
    "é" * 40,
]

texts = st.one_of(
    st.none(),
    st.text(max_size=30),
    st.text(st.characters(), max_size=10),  # half surrogates too
    st.lists(st.sampled_from(SPECIAL) | st.text(string.printable, max_size=4), max_size=6).map("".join),
    st.integers(),
    st.floats(),
    st.booleans(),
)
topics = st.one_of(texts, st.lists(texts, max_size=12))
pictures = st.one_of(
    st.none(),
    st.sampled_from(GOOD),
    st.binary(max_size=40),
    st.tuples(st.sampled_from(GOOD), st.integers(1, 200)).map(lambda cut: cut[0][: cut[1]]),
    st.sampled_from(["", "nowhere.png", "/dev/zero", "http://example.org/a.png"]),
    st.builds(
        Image.new,
        st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"]),
        st.tuples(st.integers(0, 60), st.integers(0, 60)),
    ),
    st.builds(
        lambda shape, dtype: np.ones(shape, dtype=dtype),
        st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
        st.sampled_from(["uint8", "bool", "float32", "uint16", "int64", "complex64"]),
    ),
    st.floats(),
)
items = st.fixed_dictionaries(
    {},
    optional={
        "item_id": texts,
        "title": texts,
        "topics": topics,
        "content": texts,
        "image": pictures | st.lists(pictures, max_size=3),
        "price": st.floats(),
    },
)
MANY = settings(
    max_examples=10_000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="module")
def pair():
    model, processor = make_model()
    return model.eval(), processor


@pytest.mark.slow
def test_ten_thousand_items_are_read_or_refused_by_name(pair):
    """Each has a slot for every token of its pictures, and no text makes another."""
    _, processor = pair
    outcomes: Counter[str] = Counter()

    @MANY
    @given(items)
    def check(item):
        try:
            inputs = processor([item], return_tensors="pt")
        except ItemError as error:
            outcomes["refused" if str(error).startswith("row 0") else f"refused namelessly: {error}"] += 1
            return
        count = int(inputs["num_images"])
        ids = inputs["input_ids"]
        assert int((ids == processor.image_token_id).sum()) == count * processor.num_query_tokens
        assert int((ids == processor.visual_embedding_token_id).sum()) == min(count, 1)
        assert ids.dtype == torch.int64 and int(ids.max()) < 400
        if count:
            assert inputs["pixel_values"].shape[0] == count and inputs["pixel_values"].isfinite().all()
        outcomes["read"] += 1
        outcomes["with pictures"] += bool(count)

    check()
    assert set(outcomes) == {"read", "refused", "with pictures"} and min(outcomes.values()) > 500, outcomes


@pytest.mark.slow
def test_items_of_chance_embed_alike_in_any_company(pair):
    model, processor = pair

    def embedded(rows):
        with torch.inference_mode():
            return model(**processor(rows, return_tensors="pt")).embeddings

    @settings(MANY, max_examples=200)
    @given(st.lists(items, min_size=2, max_size=6), st.randoms(use_true_random=False))
    def check(rows, random):
        good = []
        for item in rows:
            try:
                processor([item])
                good.append(item)
            except ItemError:
                continue
        if not good:
            return
        alone = torch.cat([embedded([item]) for item in good])
        assert alone.isfinite().all()
        torch.testing.assert_close(alone.norm(dim=-1), torch.ones(len(good)))
        order = random.sample(range(len(good)), len(good))
        torch.testing.assert_close(embedded([good[at] for at in order]), alone[order], atol=2e-5, rtol=0)

    check()


def mutated(seed: int) -> bytes:
    """A picture of some kind with bytes changed, cut, doubled or moved."""
    generator = np.random.default_rng(seed)
    content = bytearray(GOOD[seed % len(GOOD)])
    for _ in range(int(generator.integers(1, 12))):
        at = int(generator.integers(0, min(len(content), 120) if generator.random() < 0.6 else len(content)))
        match int(generator.integers(0, 5)):
            case 0 | 1:
                content[at] = int(generator.integers(0, 256))
            case 2:
                content[at : at + 4] = b"\xff\xff\xff\x7f"
            case 3:
                del content[at : at + int(generator.integers(1, 9))]
            case _:
                content[at:at] = content[at : at + int(generator.integers(1, 40))]
        if not content:
            break
    return bytes(content)


def open_mutated(seeds: range) -> tuple[int, int]:
    """How many open as pictures of a bounded shape, and how many are refused as pictures; nothing else may happen."""
    opened = refused = 0
    for seed in seeds:
        try:
            picture = load_image(mutated(seed))
        except ItemError:
            refused += 1
            continue
        assert picture.mode == "RGB" and min(picture.size) > 0
        assert max(picture.size) <= MAX_ASPECT * min(picture.size) + 1
        opened += 1
    return opened, refused


@pytest.mark.parametrize(
    "count", [2_000, pytest.param(100_000, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])]
)
@pytest.mark.filterwarnings("ignore")
def test_pictures_with_bytes_of_chance_open_or_are_refused(count):
    opened, refused = open_mutated(range(count))
    assert opened > count / 10 and refused > count / 10
