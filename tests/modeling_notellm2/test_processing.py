"""Items to inputs: users' text stays text, frames stay whole, pictures come out upright and RGB, bad items are named."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_notellm2 import ItemError, NoteLLM2Processor
from modeling_notellm2.images_notellm2 import load_image
from tests.support.models import make_image_processor, make_tokenizer


RED = Image.new("RGB", (40, 30), (255, 0, 0))


def processor_with(**settings) -> NoteLLM2Processor:
    return NoteLLM2Processor(make_image_processor(), make_tokenizer(), num_query_tokens=4, **settings)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_text_from_users_is_text(language):
    """Special tokens in any field change no slot, and come out as the characters that they are."""
    processor = processor_with(prompt_language=language, max_title_length=80)
    hostile = "a <IMG> <IMG_EMB> <|im_start|> <pad> <s>"
    for field in ("title", "content", "topics"):
        item = {field: [hostile] if field == "topics" else hostile, "image": RED}
        ids = processor(item, return_tensors="pt")["input_ids"][0].tolist()
        assert ids.count(processor.image_token_id) == 4
        assert ids.count(processor.visual_embedding_token_id) == 1
        special = set(processor.tokenizer.all_special_ids) - {
            processor.image_token_id,
            processor.visual_embedding_token_id,
        }
        assert special.isdisjoint(ids)
        wanted = processor.build_prompt(item).replace("<IMG>", "<IMG>" * 4, 1)
        assert processor.tokenizer.decode(ids) == wanted


def test_prompt_frame_is_never_cut():
    """Token limits shorten the fields alone: frame and read-outs are those of an empty item."""
    limits = {"max_title_length": 500, "max_content_length": 5000, "max_title_tokens": 5, "max_content_tokens": 7}
    processor = processor_with(prompt_language="en", max_topics_tokens=3, **limits)
    item = {"title": "t" * 400, "content": "c" * 4000, "topics": ["p" * 16, "q"], "image": RED}
    prompt, frame = processor.build_prompt(item), processor.build_prompt({"image": RED})
    assert prompt == frame.replace('"title": ""', '"title": "ttttt"').replace(
        '"topics": ""', '"topics": "ppp"'
    ).replace('"content": ""', '"content": "ccccccc"')
    # A character of several bytes is several tokens here: it is kept whole or left out.
    assert '"title": "é"' in processor_with(prompt_language="en", max_title_tokens=3).build_prompt({"title": "éé"})


def test_items_in_every_form(tmp_path):
    path = tmp_path / "red.png"
    RED.save(path)
    data = path.read_bytes()
    forms = [
        RED,
        str(path),
        path,
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        np.asarray(RED),
    ]
    forms.append(np.asarray(RED).transpose(2, 0, 1) / 255.0)
    processor = processor_with()
    inputs = processor([{"title": "x", "image": form} for form in forms], return_tensors="pt")
    assert inputs["num_images"].tolist() == [1] * len(forms)
    for pixels in inputs["pixel_values"]:
        torch.testing.assert_close(pixels, inputs["pixel_values"][0])
    mixed = processor(["a text", RED, path, {"image": [RED, None, data]}, {}, {"image": None, "title": float("nan")}])
    assert mixed["num_images"] == [0, 1, 1, 2, 0, 0]
    assert len(mixed["pixel_values"]) == 4
    assert "pixel_values" not in processor(["a text"], return_tensors="pt")
    skipped = processor([{"image": "not opened.png"}], process_images=False)
    assert skipped["num_images"] == [1]
    assert "pixel_values" not in skipped


def test_images_come_out_upright_and_rgb():
    wide = Image.new("RGB", (20, 10), (0, 0, 255))
    exif = wide.getexif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    assert load_image(encoded(wide, "JPEG", exif=exif)).size == (10, 20)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    for transparent in (clear, palette, Image.new("LA", (4, 4), (0, 0))):
        assert load_image(transparent).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16))
    for white in (deep, Image.new("1", (4, 4), 1), Image.new("L", (4, 4), 255), Image.new("F", (4, 4), 1.0)):
        assert load_image(white).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("CMYK", (4, 4), (0, 255, 255, 0))).mode == "RGB"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"no picture", "can't be read"),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")[:-500], "can't be read"),
        ("missing.png", "does not exist"),
        ("https://example.org/a.png", "web address"),
        (np.zeros((5, 5, 7)), "shape"),
        (np.full((3, 3), 7.5), "0 to 1"),
        (17, "int"),
    ],
)
def test_a_bad_image_is_named(image, reason):
    with pytest.raises(ItemError, match=rf"row 1 \(item_id 'b7'\): .*{reason}"):
        processor_with()([{"title": "fine"}, {"item_id": "b7", "image": image}])


def test_bad_fields_are_named():
    processor = processor_with()
    with pytest.raises(ItemError, match=r"row 0 \(item_id 9\): title is a list"):
        processor([{"item_id": 9, "title": ["a"]}])
    with pytest.raises(ItemError, match="row 0: topics is the string"):
        processor([{"topics": "a,b"}])
    with pytest.raises(ItemError, match="row 1: an item is a int"):
        processor(["a", 3])


@pytest.mark.parametrize("keys", [["Title"], ["images"], ["item_id", "Title", "photo"], ["text"], ["bytes", "path"]])
def test_a_dict_that_is_no_item_is_refused_with_its_keys(keys):
    """Further columns beside an item's are fine, and so is an item of which nothing is known."""
    processor = processor_with()
    with pytest.raises(
        ItemError, match=rf"row 1.*a dict of {', '.join(keys)} has none of content, image, title, topics"
    ):
        processor([{"title": "a"}, dict.fromkeys(keys, "x")])
    whole = processor([{"title": "a", "Title": "x", "price": 7}, {"title": None}, {"item_id": "x"}, {}])["input_ids"]
    assert whole[1] == whole[2] == whole[3]
    assert whole[0][-40:] == processor({"title": "a"})["input_ids"][0][-40:]


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_no_item_gives_empty_tensors_of_integers(kind):
    inputs = processor_with()([], return_tensors=kind)
    assert {
        name: (tuple(values.shape), str(values.dtype).removeprefix("torch.")) for name, values in inputs.items()
    } == {
        "input_ids": ((0, 0), "int64"),
        "attention_mask": ((0, 0), "int64"),
        "num_images": ((0,), "int64"),
    }
    assert dict(processor_with()([])) == {"input_ids": [], "attention_mask": [], "num_images": []}


def test_ready_prompts():
    processor = processor_with(prompt_language="en")
    item = {"title": "x", "image": [RED, RED]}
    prompt = processor.build_prompt(item)
    assert prompt.count("<IMG>") == 2
    assert processor(text=prompt, images=[RED, RED])["input_ids"] == processor(item)["input_ids"]
    both = processor(text=[prompt, "no image"], images=[[RED, RED], []], padding=False)
    assert both["num_images"] == [2, 0]
    assert both["input_ids"][0] == processor(item)["input_ids"][0]
    with pytest.raises(ValueError, match="3 images"):
        processor(text=prompt, images=[RED] * 3)
    with pytest.raises(ValueError, match="row 1: 0 <IMG> slots but 1 images"):
        processor(text=[prompt, "no slot"], images=[[RED, RED], [RED]])


def test_padding_sides_hold_the_same_tokens():
    processor = processor_with()
    items = ["short", {"content": "a longer text", "image": RED}]
    right = processor(items, return_tensors="pt", padding_side="right", pad_to_multiple_of=8)
    left = processor(items, return_tensors="pt", padding_side="left", padding="max_length", max_length=300)
    assert right["input_ids"].shape[1] % 8 == 0
    assert left["input_ids"].shape[1] == 300
    for row in range(2):
        kept = [batch["input_ids"][row][batch["attention_mask"][row].bool()] for batch in (right, left)]
        assert kept[0].tolist() == kept[1].tolist()


def test_a_bos_token_comes_first_and_nothing_comes_last():
    """Llama's tokenizers put a BOS before a text; an EOS behind it would move the read-out and is left away."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", 1), ("<|im_end|>", 3)]
    )
    ids = NoteLLM2Processor(make_image_processor(), tokenizer)("a")["input_ids"][0]
    assert ids[0] == 1
    assert 3 not in ids
    assert ids.count(1) == 1


def test_settings_survive_saving(tmp_path):
    settings = {"prompt_language": "en", "max_title_length": 7, "max_content_tokens": 5, "micl": False}
    processor = processor_with(**settings)
    processor.save_pretrained(tmp_path)
    loaded = NoteLLM2Processor.from_pretrained(tmp_path)
    item = {"title": "a title of some length", "content": "content", "image": RED}
    assert loaded.build_prompt(item) == processor.build_prompt(item)
    assert loaded.limits == processor.limits
    torch.testing.assert_close(dict(loaded(item, return_tensors="pt")), dict(processor(item, return_tensors="pt")))
    with pytest.raises(ValueError, match="prompt_language is 'fr'"):
        processor_with(prompt_language="fr")
