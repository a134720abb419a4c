"""Tiny models made on the spot: a byte-level tokenizer, a two-layer Llama, a two-layer CLIP vision tower."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor


QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with a chat model's special tokens."""
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def make_image_processor(size: int = 32) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def make_backbones(vocab_size: int = 260) -> tuple[CLIPVisionModel, LlamaModel]:
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=32, intermediate_size=64, image_size=32, patch_size=8, **heads)
    )
    text = LlamaModel(LlamaConfig(vocab_size=vocab_size, hidden_size=48, intermediate_size=96, **heads))
    return vision.eval(), text.eval()


def make_model(**overrides) -> tuple[NoteLLM2Model, NoteLLM2Processor]:
    """A model with its processor; random query tokens, so that images matter from the start."""
    vision, text = make_backbones()
    settings = {"qformer_config": QFORMER, "num_query_tokens": 4, "embedding_dim": 24, **overrides}
    model = NoteLLM2Model.from_vision_text_pretrained(vision, text, **settings)
    if model.query_tokens is not None:
        torch.nn.init.normal_(model.query_tokens)
    processor = NoteLLM2Processor.from_vision_text_pretrained(
        make_image_processor(), make_tokenizer(), model=model, prompt_language="en"
    )
    return model.eval(), processor
