"""Tiny models made on the spot: a byte-level tokenizer, a two-layer Llama, a two-layer CLIP vision tower."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

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


def save_named_halves(folder: Path) -> None:
    """Tiny models of the families that the README files join, Qwen3 and SigLIP 2, in `text` and `vision` of a folder."""
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    qwen3 = Qwen3Config(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_key_value_heads=2, head_dim=16, **heads
    )
    siglip = SiglipVisionConfig(hidden_size=32, intermediate_size=64, image_size=32, patch_size=8, **heads)
    Qwen3Model(qwen3).save_pretrained(folder / "text")
    make_tokenizer().save_pretrained(folder / "text")
    SiglipVisionModel(siglip).save_pretrained(folder / "vision")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vision")


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


def save_dual_encoder(kind: str, folder: Path) -> Path:
    """A tiny "clip" or "siglip" of transformers with its processor, in a folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    parts = {
        "text_config": {"max_position_embeddings": 32, **ids, **sizes},
        "vision_config": {"image_size": 32, "patch_size": 8, **sizes},
    }
    tokenizer = make_tokenizer()
    tokenizer.model_max_length, tokenizer.eos_token = 32, "<|im_end|>"
    if kind == "clip":
        CLIPModel(CLIPConfig(**parts, projection_dim=24)).save_pretrained(folder)
        CLIPProcessor(make_image_processor(), tokenizer).save_pretrained(folder)
    else:
        parts["text_config"]["projection_size"] = 32
        SiglipModel(SiglipConfig(**parts)).save_pretrained(folder)
        images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
        SiglipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_text_model(folder: Path, **settings) -> Path:
    """A tiny Sentence Transformers model of texts, in a folder; `settings` are SentenceTransformer's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with TemporaryDirectory() as place:
        BertModel(BertConfig(vocab_size=260, max_position_embeddings=96, **sizes)).save_pretrained(place)
        make_tokenizer().save_pretrained(place)
        SentenceTransformer(modules=[Transformer(place), Pooling(16)], device="cpu", **settings).save(str(folder))
    return folder
