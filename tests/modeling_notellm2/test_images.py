"""Pictures of every kind: PIL's modes, arrays and their ranges, odd shapes and sizes, files that aren't, broken encodings."""

import io
import os
import resource
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_notellm2 import ItemError, NoteLLM2Processor
from modeling_notellm2 import images_notellm2 as images
from modeling_notellm2.images_notellm2 import load_image
from tests.support.models import make_image_processor, make_model
from training.batches.collators import ItemCollator
from training.tables.images import faults_of_pictures, read_encoded


WHITE, GREY, BLACK = (255, 255, 255), (128, 128, 128), (0, 0, 0)


def colour_of(source) -> tuple[int, ...]:
    """The one colour of a picture."""
    colours = load_image(source).getcolors()
    assert len(colours) == 1, colours
    return colours[0][1]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "RGBX", "RGBa", "L", "LA", "La", "1", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_shows_its_colours(mode):
    """Grey and white come out as they went in, within the mode's precision."""
    for colour in (WHITE, BLACK, (200, 200, 200)):
        if mode == "1" and colour not in (WHITE, BLACK):
            continue
        picture = Image.new("RGB", (4, 4), colour)
        if mode in ("La", "RGBa"):
            picture = picture.convert("LA" if mode == "La" else "RGBA").convert(mode)
        elif mode in ("P", "PA"):
            picture = picture.convert("P", palette=Image.Palette.ADAPTIVE).convert(mode)
        else:
            picture = picture.convert(mode)
        assert picture.mode == mode
        assert np.abs(np.subtract(colour_of(picture), colour)).max() <= 3, (mode, colour)


def test_what_is_transparent_is_white():
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    rgba_palette = Image.new("P", (4, 4), 0)
    rgba_palette.putpalette([0, 0, 0, 0] * 4, "RGBA")
    deep = Image.fromarray(np.full((4, 4), 300, np.uint16))
    clear = [Image.new("RGBA", (4, 4), 0), Image.new("LA", (4, 4), 0), Image.new("RGBA", (4, 4), 0).convert("RGBa")]
    clear += [palette, rgba_palette, encoded(palette, "GIF"), encoded(deep, "PNG", transparency=300)]
    clear += [encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7)]
    clear += [encoded(Image.new("1", (4, 4), 0), "PNG", transparency=0)]
    clear += [np.zeros((4, 4, 4), np.uint8)]
    assert [colour_of(picture) for picture in clear] == [WHITE] * len(clear)


@pytest.mark.parametrize(
    ("array", "colour"),
    [
        (np.ones((4, 4), bool), WHITE),
        (np.zeros((4, 4, 3), bool), BLACK),
        (np.ones((3, 4, 5), bool), WHITE),
        (np.full((4, 4), 128, np.uint8), GREY),
        (np.full((4, 4), 128, np.int64), GREY),
        (np.full((4, 4), 128 * 257, np.uint16), GREY),
        (np.full((4, 4), 128 * 257, ">u2"), GREY),
        (np.full((4, 4, 1), 1.0), WHITE),
        (np.full((4, 4, 3), 1.0000001, np.float32), WHITE),
        (np.full((4, 4), 1.2), WHITE),
        (np.full((4, 4), -0.1), BLACK),
        (np.full((4, 4), 0.5, np.float16), GREY),
    ],
)
def test_arrays_mean_what_their_dtype_says(array, colour):
    assert colour_of(array) == colour


@pytest.mark.parametrize(
    ("mode", "value", "colour"),
    [
        ("F", 1.0, WHITE),
        ("F", 1.001, WHITE),
        ("F", 1.2, WHITE),
        ("F", 0.5, GREY),
        ("F", 128.0, GREY),
        ("F", 255.5, WHITE),
        ("F", 300.0, WHITE),
        ("F", 128.0 * 257, GREY),
        ("F", -0.2, BLACK),
        ("I", 0, BLACK),
        ("I", 255, WHITE),
        ("I", 128 * 257, GREY),
        ("I;16", 65535, WHITE),
        ("I;16B", 128 * 257, GREY),
    ],
)
def test_deep_grey_pictures_mean_what_their_values_say(mode, value, colour):
    assert colour_of(Image.new(mode, (4, 4), value)) == colour


def test_one_bright_pixel_does_not_darken_the_others():
    values = np.full((8, 8), 0.5, np.float32)
    values[0, 0] = 1.01
    for source in (values, Image.fromarray(values)):
        assert load_image(source).getpixel((5, 5)) == GREY


def nan_somewhere(value: float) -> np.ndarray:
    values = np.full((8, 8), 0.5, np.float32)
    values[3, 3] = value
    return values


BAD = {
    "NaN pixel": (nan_somewhere(float("nan")), "NaN"),
    "NaN pixel, PIL": (Image.fromarray(nan_somewhere(float("nan"))), "NaN"),
    "NaN pixel, TIFF": (encoded(Image.fromarray(nan_somewhere(float("nan"))), "TIFF"), "NaN"),
    "infinite pixel": (nan_somewhere(float("inf")), "NaN or infinite"),
    "normalised floats": (np.linspace(-1, 1, 64).reshape(8, 8), "from -1 to 1; expected 0 to 1"),
    "floats to 255": (np.full((4, 4), 200.0), "use dtype uint8"),
    "F of no range": (Image.new("F", (4, 4), 1e9), "expected 0 to 1 or 0 to 255 or 0 to 65535"),
    "negative I": (Image.new("I", (4, 4), -5), "from -5 to -5"),
    "negative integers": (np.full((4, 4), -1), "from 0 to 255"),
    "complex": (np.ones((4, 4), complex), "dtype complex128"),
    "objects": (np.full((4, 4), None), "dtype object"),
    "no pixels": (Image.new("RGB", (0, 5)), "which is none"),
    "empty array": (np.zeros((0, 4, 3)), "shape"),
    "empty bytes": (b"", "can't be read"),
    "empty bytes of datasets": ({"bytes": b"", "path": None}, "can't be read"),
    "two channels": (np.zeros((5, 5, 2), np.uint8), "shape"),
    "NUL in a path": ("a\0b.png", "can't be read"),
    "long path": ("a" * 5000, "can't be read"),
    "folder": (os.path.dirname(__file__), "not a regular file"),
    "device": ("/dev/zero", "not a regular file"),
    "device of datasets": ({"bytes": None, "path": "/dev/zero"}, "not a regular file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_an_item_error(name):
    source, reason = BAD[name]
    with pytest.raises(ItemError, match=reason):
        load_image(source)


def test_a_fifo_is_not_waited_for(tmp_path):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    for read in (load_image, read_encoded):
        with pytest.raises(ItemError, match="not a regular file"):
            read(path)
    link = tmp_path / "link.png"
    link.symlink_to(path)
    assert "not a regular file" in faults_of_pictures({"image": str(link)})[0]


FORMATS = [
    "PNG",
    "JPEG",
    "GIF",
    "BMP",
    "TIFF",
    "WEBP",
    "AVIF",
    "JPEG2000",
    "DDS",
    "ICO",
    "TGA",
    "PPM",
    "PCX",
    "SGI",
    "ICNS",
    "IM",
    "MSP",
    "XBM",
    "SPIDER",
    "BLP",
    "QOI",
]


def whole_files() -> dict[str, bytes]:
    """One picture in every format that this PIL writes."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    modes = {"MSP": "1", "XBM": "1", "SPIDER": "F", "BLP": "P"}
    files = {}
    Image.init()
    for kind in FORMATS:
        if kind in Image.SAVE:
            files[kind] = encoded(noise.convert(modes.get(kind, "RGB")), kind)
    return files


@pytest.mark.filterwarnings("ignore")  # decoders warn of what they meet
def test_whatever_a_decoder_raises_is_an_item_error():
    """Each format, cut and with bytes changed: a picture or an ItemError, nothing else, alike in all readers."""
    generator = np.random.default_rng(1)
    files = whole_files()
    assert {"PNG", "JPEG", "AVIF", "DDS", "BLP", "WEBP"} <= files.keys()
    refused = 0
    for whole in files.values():
        assert load_image(whole).mode == "RGB"
        broken = [whole[: int(len(whole) * share)] for share in (0.1, 0.5, 0.9)]
        for _ in range(12):
            changed = bytearray(whole)
            for at in generator.integers(0, min(len(changed), 200), 4):
                changed[at] = generator.integers(0, 256)
            broken.append(bytes(changed))
        for source in broken:
            faults_of_pictures({"image": source})  # raises nothing
            try:
                assert load_image(source).mode == "RGB"
            except ItemError:
                refused += 1
    assert refused > 100


class Exploding(Image.Image):
    def load(self):
        raise KeyError("a decoder's own error")


def test_an_error_of_any_kind_names_itself_and_its_item_goes_on_in_training():
    picture = Exploding()
    picture._size = (4, 4)
    with pytest.raises(ItemError, match="KeyError: .*decoder's own"):
        load_image(picture)
    _, processor = make_model()
    batch = ItemCollator(processor)(
        [{"item_id": "a", "title": "x", "image": picture}, {"item_id": "b", "image": b"qoif"}]
    )
    assert batch["num_images"].tolist() == [0, 0]


def test_a_thin_picture_costs_little():
    """138 bytes of 1 x 30,000 pixels: its middle, long before an image processor scales it up."""
    values = np.zeros((30_000, 1, 3), np.uint8)
    values[14_000:16_000] = 255
    thin = encoded(Image.fromarray(values), "PNG")
    image = load_image(thin)
    assert image.size == (1, images.MAX_ASPECT)
    assert colour_of(thin) == WHITE
    assert load_image(encoded(Image.fromarray(values.transpose(1, 0, 2)), "PNG")).size == (images.MAX_ASPECT, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = make_image_processor(224)(images=[image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    usual = Image.new("RGB", (10, 200))
    assert load_image(usual).size == usual.size


def test_the_number_of_pixels_is_bounded_also_where_pil_does_not(monkeypatch):
    huge = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ItemError, match="20000 x 10000 pixels; at most 178,956,970"):
        load_image(huge)
    monkeypatch.undo()
    with warnings.catch_warnings(), pytest.raises(ItemError):
        warnings.simplefilter("error")
        load_image(huge)


def test_an_item_of_nothing_but_nan_is_refused():
    _, processor = make_model()
    for image in (float("nan"), np.float32("nan"), [float("nan")]):
        with pytest.raises(ItemError, match=r"row 1 \(item_id 'n'\): its image is NaN and it has no text"):
            processor([{"title": "fine"}, {"item_id": "n", "image": image, "title": float("nan")}])
        assert processor([{"title": "fine", "image": image}])["num_images"] == [0]
    empty = processor([], return_tensors="pt")
    assert all(values.dtype.is_floating_point is False for values in empty.values())
    assert empty["input_ids"].shape == (0, 0)


def photograph(width: int, height: int) -> bytes:
    """A JPEG with coarse and fine structure."""
    coarse = np.random.default_rng(0).integers(0, 255, (height // 40, width // 40, 3), dtype=np.uint8)
    return encoded(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), "JPEG", quality=90)


@pytest.mark.parametrize(
    ("side", "size"), [(None, (1600, 1200)), (601, (1600, 1200)), (448, (800, 600)), (100, (200, 150))]
)
def test_a_large_jpeg_is_decoded_smaller_where_that_is_asked(side, size, tmp_path):
    data = photograph(1600, 1200)
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (data, tmp_path / "a.jpg", {"bytes": data, "path": None}):
        assert load_image(source, side).size == size
    given = Image.open(io.BytesIO(data))
    assert load_image(given, side).size == given.size == (1600, 1200)  # what belongs to somebody else stays
    turned = Image.open(io.BytesIO(data))
    exif = turned.getexif()
    exif[0x0112] = 6
    assert load_image(encoded(turned, "JPEG", exif=exif), side).size == size[::-1]
    assert load_image(encoded(turned, "PNG"), side).size == (1600, 1200)


def test_embeddings_of_pictures_decoded_smaller_are_nearly_the_same(tmp_path):
    """Twice the encoder's 32 pixels: the grey levels differ by a few, the embedding's cosine by less than a thousandth."""
    model, processor = make_model()
    items = [{"title": "a", "image": photograph(1600, 1200)}]
    processor.save_pretrained(tmp_path)
    smaller = NoteLLM2Processor.from_pretrained(tmp_path, jpeg_side=64)
    smaller.save_pretrained(tmp_path)
    assert NoteLLM2Processor.from_pretrained(tmp_path).jpeg_side == 64
    with torch.no_grad():
        whole, drafted = (model(**each(items, return_tensors="pt")).embeddings for each in (processor, smaller))
    assert not torch.equal(whole, drafted)
    assert F.cosine_similarity(whole, drafted).item() > 0.999
    with pytest.raises(ValueError, match="jpeg_side is 0"):
        NoteLLM2Processor.from_pretrained(tmp_path, jpeg_side=0)
