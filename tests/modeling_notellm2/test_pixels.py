"""Pictures of any size: alone as in a batch, from image processor through collator, cache, chunks, catalogue and encode."""

import io

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, LlamaConfig, LlamaModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from hub.encode import encode
from modeling_notellm2 import ItemError, NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.pixels_notellm2 import join_pictures, keeps_sizes, one_picture_each, picture_pixels
from tests.support.catalogue import arguments, read_shards, vectors, write_items
from tests.support.models import QFORMER, make_image_processor, make_tokenizer
from tests.support.vision_families import tiny_config, tiny_encoder
from training.batches.collators import ItemCollator, cache_vision_features
from training.trainer.grad_cache import split_inputs


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def native(kind: str) -> tuple[NoteLLM2Model, NoteLLM2Processor]:
    """A tiny model whose encoder takes pictures of any size, with its family's own image processor."""
    if kind == "qwen2_5_vl":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        config = tiny_config("qwen2_5_vl_vision")
        config.patch_size, config.temporal_patch_size, config.window_size = 8, 2, 32
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=8, merge_size=config.spatial_merge_size, size={"shortest_edge": 256, "longest_edge": 4096}
        )
    elif kind == "siglip2":
        from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

        config = tiny_config("siglip2_vision_model")
        image_processor = Siglip2ImageProcessorPil(patch_size=config.patch_size, max_num_patches=16)
    elif kind == "pixtral":
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

        config = tiny_config("pixtral")
        image_processor = PixtralImageProcessorPil(patch_size={"height": 16, "width": 16}, size={"longest_edge": 64})
    else:
        from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

        config = tiny_config("yolos")
        image_processor = YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaModel(LlamaConfig(vocab_size=260, hidden_size=48, intermediate_size=96, **heads)).eval()
    settings = {"qformer_config": QFORMER, "num_query_tokens": 4, "embedding_dim": 24}
    model = NoteLLM2Model.from_vision_text_pretrained(tiny_encoder(config), text, **settings)
    torch.nn.init.normal_(model.query_tokens)
    processor = NoteLLM2Processor.from_vision_text_pretrained(image_processor, make_tokenizer(), model=model)
    return model.eval(), processor


ITEMS = [
    {"item_id": "a", "title": "wide", "image": photo(90, 40)},
    {"item_id": "b", "title": "none"},
    {"item_id": "c", "title": "two", "image": [photo(40, 90, 1), photo(64, 64, 2)]},
    {"item_id": "d", "image": photo(50, 50, 3)},
]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "siglip2", "pixtral", "yolos"])
@torch.no_grad()
def test_pictures_of_any_size_are_the_same_on_every_way(kind, tmp_path):
    model, processor = native(kind)
    inputs = dict(processor(ITEMS, return_tensors="pt"))
    assert len(inputs["image_sizes"]) == len(inputs["pixel_values"]) == 4
    expected = model(**inputs).embeddings

    for row, item in enumerate(ITEMS):  # alone
        alone = model(**processor([item], return_tensors="pt")).embeddings[0]
        torch.testing.assert_close(alone, expected[row], atol=2e-5, rtol=0)
    collated = ItemCollator(processor)(ITEMS)
    torch.testing.assert_close(model(**collated).embeddings, expected, atol=2e-5, rtol=0)
    chunks = [model(**chunk).embeddings for chunk in split_inputs(model, collated, 2)]
    torch.testing.assert_close(torch.cat(chunks), expected, atol=2e-5, rtol=0)

    some = cache_vision_features(model, processor, ITEMS[:3], tmp_path, batch_size=2)
    partly = ItemCollator(processor, some)(ITEMS)
    assert partly["cached_images"].tolist() == [True, True, True, False]
    torch.testing.assert_close(model(**partly).embeddings, expected, atol=3e-3, rtol=0)
    every = cache_vision_features(model, processor, ITEMS, tmp_path, batch_size=2)
    wholly = ItemCollator(processor, every)(ITEMS)
    assert "pixel_values" not in wholly
    torch.testing.assert_close(model(**wholly).embeddings, expected, atol=3e-3, rtol=0)

    other = [{**item, "image": photo(64, 64, 9)} if "image" in item else item for item in ITEMS]
    assert (model(**processor(other, return_tensors="pt")).embeddings - expected)[0].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "siglip2"])
def test_sentence_transformers_and_the_catalogue_encoder_take_pictures_of_any_size(kind, tmp_path):
    """A saved folder gives what `AutoModel` gives for each item alone."""
    model, processor = native(kind)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    alone = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    reader = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs = [alone(**reader([item], return_tensors="pt")) for item in ITEMS]
    expected = torch.cat([output.embeddings for output in outputs]).numpy()

    encoder = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    for batch_size in (1, 4):
        np.testing.assert_allclose(encoder.encode(ITEMS, batch_size=batch_size), expected, atol=2e-5, rtol=0)

    rows = [{"title": None, **item, "image": as_png(item.get("image"))} for item in ITEMS]
    encode(arguments(folder, write_items(rows, tmp_path / "items.parquet"), tmp_path / "shards", visual=True))
    shards = read_shards(tmp_path / "shards")
    assert shards.column("item_id").to_pylist() == [item["item_id"] for item in ITEMS]
    np.testing.assert_allclose(vectors(shards), expected, atol=2e-5, rtol=0)
    visual = torch.cat([output.visual_embeddings for output in outputs]).numpy()
    np.testing.assert_allclose(vectors(shards, "visual_embedding"), visual, atol=2e-5, rtol=0)
    assert visual.any(1).tolist() == [True, False, True, True]


def as_png(source: Image.Image | list[Image.Image] | None) -> list[bytes] | None:
    """An item's pictures as a table holds them."""
    if source is None:
        return None
    streams = []
    for picture in source if isinstance(source, list) else [source]:
        picture.save(stream := io.BytesIO(), "PNG")
        streams.append(stream.getvalue())
    return streams


def test_max_pixels_bounds_a_pictures_patches():
    _, processor = native("qwen2_5_vl")
    assert processor.max_pixels == 512 * 512
    processor.max_pixels = 1024
    assert processor.process_images([photo(60, 60)])["image_sizes"].prod() <= 1024 / 8**2
    fixed = NoteLLM2Processor.from_vision_text_pretrained(make_image_processor(), make_tokenizer())
    assert fixed.max_pixels is None
    assert "image_sizes" not in fixed([{"image": photo(60, 20)}, {"image": photo(20, 60)}], return_tensors="pt")


def image_processors() -> dict[str, str]:
    """A model type of every image processor that runs without torchvision."""
    classes = {}
    for model_type, names in IMAGE_PROCESSOR_MAPPING_NAMES.items():
        name = names.get("pil") if isinstance(names, dict) else None
        if name:
            classes.setdefault(name, model_type)
    return classes


PICTURES = [photo(300, 200), photo(120, 260, 1), photo(224, 224, 2)]


@pytest.mark.slow
def test_every_image_processor_is_right_or_refused():
    """No picture's pixels depend on its neighbours, and what gives no pixels says so."""
    right, refused = [], {}
    for name in image_processors():
        try:
            image_processor = getattr(transformers, name)()
            one_picture_each(image_processor)
            keeps_sizes(image_processor)
            parts = [picture_pixels(image_processor, picture, 256 * 256) for picture in PICTURES]
        except (ValueError, ImportError, TypeError) as error:  # TypeError: its class has no defaults
            refused[name] = str(error)
            continue
        joined = join_pictures(parts)
        assert len(joined["pixel_values"]) == 3, name
        for row, part in enumerate(parts):
            (pixels,) = part["pixel_values"]
            padded = joined["pixel_values"][row]
            assert torch.equal(padded[tuple(slice(side) for side in pixels.shape)], pixels), name
            assert padded.abs().sum(dtype=torch.float64) == pixels.abs().sum(dtype=torch.float64), name
            again = picture_pixels(image_processor, PICTURES[row], 256 * 256)
            assert torch.equal(again["pixel_values"], part["pixel_values"]), name
        right.append(name)
    assert {"CLIPImageProcessorPil", "Siglip2ImageProcessorPil", "Qwen2VLImageProcessorPil"} <= set(right)
    assert {"PixtralImageProcessorPil", "Idefics3ImageProcessorPil", "Gemma4ImageProcessorPil"} <= set(right)
    assert {"YolosImageProcessorPil", "MllamaImageProcessorPil", "SmolVLMImageProcessorPil"} <= set(right)
    assert "pixel_values" in refused["Pix2StructImageProcessorPil"]
    assert len(right) > 50


def test_an_image_processors_refusal_is_its_pictures():
    class Picky:
        def __call__(self, images, return_tensors):
            raise ZeroDivisionError("thin")

    processor = NoteLLM2Processor(make_image_processor(), make_tokenizer())
    processor.image_processor = Picky()
    with pytest.raises(ItemError, match=r"row 0 \(item_id 'x'\): Picky refuses an image of 30 x 3 pixels \(thin\)"):
        processor([{"item_id": "x", "image": photo(30, 3)}])


def test_what_needs_torchvision_says_so(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "DINOv3ViTImageProcessor"}')
    with pytest.raises(ImportError, match="pip install torchvision"):
        NoteLLM2Processor.from_vision_text_pretrained(str(tmp_path), make_tokenizer())
