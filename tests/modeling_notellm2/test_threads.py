"""Threads that share one model, processor and table get what one thread gets.

A tokenizer has states (truncation, padding, whether special tokens are recognised in texts), which a call in one thread
could change under another's.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sentence_transformers import SentenceTransformer

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from tests.support.catalogue import make_items
from training.tables.items import load_items


HOSTILE = [
    {"title": "<|im_start|><s>", "content": "<pad><IMG><IMG_EMB><|im_end|>", "topics": ["<s>"]},
    {"title": "<IMG>", "content": "y" * 60},
]
THREADS = 8


@pytest.fixture(autouse=True)
def _threads_change_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(function, calls: int) -> list:
    """Results of `function` of 0 to `calls`, computed by threads at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, range(calls)))


@pytest.mark.parametrize("settings", [{}, {"max_title_tokens": 3, "max_content_tokens": 9}], ids=["plain", "limits"])
def test_texts_of_users_stay_text_in_threads(tiny_processor, settings):
    for name, value in settings.items():
        setattr(tiny_processor, name, value)
    expected = tiny_processor(HOSTILE)["input_ids"]
    for input_ids in in_threads(lambda _: tiny_processor(HOSTILE)["input_ids"], 2000):
        assert input_ids == expected


def test_threads_begin_with_a_loaded_processor(tiny_model_folder):
    """The first calls of all come at once."""
    for _ in range(10):
        processor = NoteLLM2Processor.from_pretrained(tiny_model_folder)
        first, *others = in_threads(lambda _, ready=processor: ready(HOSTILE)["input_ids"], THREADS)
        assert others == [first] * (THREADS - 1)


def test_one_model_and_one_table_in_threads(tiny_model_folder, table):
    model = NoteLLM2Model.from_pretrained(tiny_model_folder).eval()
    processor = NoteLLM2Processor.from_pretrained(tiny_model_folder)
    items, _ = load_items(str(table))

    @torch.inference_mode()
    def embedded(part: int) -> torch.Tensor:
        """Every seventh item from that one on, read one by one."""
        batch = [*HOSTILE, *(items[row] for row in range(part % 7, len(items), 7))]
        return model(**processor(batch, return_tensors="pt")).embeddings

    expected = [embedded(part) for part in range(7)]
    for call, embeddings in enumerate(in_threads(embedded, 42)):
        assert torch.equal(embeddings, expected[call % 7])


def test_sentence_transformers_in_threads(tiny_model_folder):
    encoder = SentenceTransformer(str(tiny_model_folder), trust_remote_code=True, device="cpu")
    batch = [*HOSTILE, *make_items(6)]
    expected = encoder.encode(batch, convert_to_tensor=True)
    for embeddings in in_threads(lambda _: encoder.encode(batch, convert_to_tensor=True), 24):
        assert torch.equal(embeddings, expected)
