"""transformers' own common tests of models and processors, on NoteLLM-2.

tests/modeling_notellm2/test_common.py runs it in a folder of its own.

There `tests` is transformers' package, from its source distribution; nothing of it is copied here.
"""

import importlib.util
import os
import sys
import unittest
from pathlib import Path

from PIL import Image

from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model, NoteLLM2Processor
from tests.test_modeling_common import ModelTesterMixin  # transformers', not ours
from tests.test_processing_common import ProcessorTesterMixin


EXCEPTIONS = {
    "test_batching_equivalence": "cuts every input to one row, but a batch's pictures are not one for each item; "
    "test_modeling.py compares items alone and in batches",
    "test_eager_matches_sdpa_inference": "gives text alone where the ids ask for pictures; test_parity.py runs both",
    "test_model_outputs_equivalence": "subtracts outputs, of which has_image is bool",
    "test_resize_tokens_embeddings": "cuts the vocabulary below the placeholders' ids, which the model refuses",
    "test_sdpa_can_dispatch_composite_models": "looks for the name sdpa; the LLM's is the packed one (packing_notellm2.py)",
    "test_reverse_loading_mapping": "asks for a mapping of old names, which this model doesn't have",
    "test_processor_from_and_save_pretrained": "what is saved has an auto_map beside what was there, for remote code",
    "test_call_arguments_": "items, not kwargs of parts, are this processor's call; padding and process_images have defaults",
    **dict.fromkeys(
        (
            "test_doubly_passed_kwargs",
            "test_flat_kwarg_applied",
            "test_kwargs_overrides",
            "test_model_input_names",
            "test_overlapping_text_image_kwargs",
            "test_processor_text_has_no_visual",
            "test_processor_with_multiple_inputs",
            "test_structured_kwargs",
            "test_subprocessor_defaults_preserved",
            "test_unstructured_kwargs",
        ),
        "passes a picture with a text that has no <IMG> for it, or options of the image processor; items are the call here",
    ),
}
"""Tests by the beginning of their names that are left out, and why."""


def our_models():
    """tests/support/models.py, whose package has the name of transformers' own here."""
    spec = importlib.util.spec_from_file_location("our_models", Path(os.environ["OUR_SUPPORT"], "models.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class NoteLLM2Tester:
    """Gives a config, and the inputs of two pairs: three items with a picture, one without."""

    is_training = True
    batch_size = 4

    def __init__(self):
        self.model, self.processor = our_models().make_model(freeze_vision=False)
        text = self.model.config.text_config
        self.seq_length = self.encoder_seq_length = self.inputs()["input_ids"].shape[1]
        self.hidden_size, self.num_hidden_layers = text.hidden_size, text.num_hidden_layers
        self.num_attention_heads = text.num_attention_heads

    def inputs(self):
        items = [{"title": f"thing {n}", "image": Image.new("RGB", (32, 32), (80 * n, 0, 90))} for n in range(3)]
        return dict(self.processor([*items, "a text alone"], return_tensors="pt"))

    def prepare_config_and_inputs_for_common(self):
        return NoteLLM2Config.from_dict(self.model.config.to_dict()), self.inputs()


class Excepted:
    """Leaves out what is listed."""

    def setUp(self):
        for beginning, reason in EXCEPTIONS.items():
            if self._testMethodName.startswith(beginning):
                self.skipTest(f"listed: {reason}")
        super().setUp()


class NoteLLM2ModelTest(Excepted, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (NoteLLM2Model,)
    _is_composite = True
    test_all_params_have_gradient = False  # CLIP's last norm is read by no embedding

    def setUp(self):
        super().setUp()
        self.model_tester = NoteLLM2Tester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        return {**inputs, "return_loss": True} if return_labels else inputs


class NoteLLM2ProcessorTest(Excepted, ProcessorTesterMixin, unittest.TestCase):
    processor_class = NoteLLM2Processor

    @classmethod
    def _setup_image_processor(cls):
        return our_models().make_image_processor()

    @classmethod
    def _setup_tokenizer(cls):
        return our_models().make_tokenizer()
