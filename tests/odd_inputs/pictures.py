"""Odd pictures: every mode and format that PIL writes here, what files and paths can be, arrays, and what is no picture."""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from tests.odd_inputs.case import NOT_A_TABLE, OddInput, encoded, file, sample


MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "F",
]
LOSSLESS = {
    "BMP": {},
    "DIB": {},
    "IM": {},
    "PCX": {},
    "PNG": {},
    "PPM": {},
    "QOI": {},
    "SGI": {},
    "TGA": {},
    "TIFF": {},
}
LOSSLESS |= {"DDS": {}, "WEBP": {"lossless": True}, "ICNS": {}, "ICO": {}, "GIF": {}, "JPEG2000": {}}
LOSSY = ["AVIF", "JPEG", "MPO"]
CUT = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "DDS", "QOI", "JPEG2000", "SGI", "TGA", "ICO"]
UNREADABLE = "image can't be read|unreadable image"
"""In an error of the processor, or in a table's reject."""


def in_mode(mode: str) -> Image.Image:
    image = sample()
    if mode in ("La", "RGBa"):
        return image.convert("LA" if mode == "La" else "RGBA").convert(mode)
    if mode == "PA":
        return image.convert("P", palette=Image.Palette.ADAPTIVE).convert("PA")
    if mode == "LAB":
        return Image.merge("LAB", image.convert("RGB").split())
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    return image.convert(mode)


def modes() -> Iterator[OddInput]:
    """A picture in each mode gives what its upright RGB gives: by PIL's conversion, or as grey."""
    for mode in MODES:
        image = in_mode(mode)
        grey = mode in ("I", "I;16", "F")
        plain = sample().convert("L").convert("RGB") if grey else image.convert("RGB") if mode[-1] != "a" else None
        if plain is None:
            plain = (sample().convert("L") if mode == "La" else sample()).convert("RGB")
        yield OddInput(f"mode {mode}", {"image": image}, {"image": plain}, NOT_A_TABLE)


def formats(folder: Path) -> Iterator[OddInput]:
    """A picture in each format gives what its pixels give, whatever the file is called."""
    square = sample((32, 32))
    for kind, options in LOSSLESS.items():
        plain = square.quantize(8).convert("RGB") if kind == "GIF" else square
        content = encoded(plain, kind, **options)
        if kind == "ICNS":  # keeps the sizes that the format knows
            plain = Image.open(Path(file(folder, "known.icns", content))).convert("RGB")
        yield OddInput(f"format {kind}", {"image": file(folder, f"{kind}.png", content)}, {"image": plain})
    for kind in LOSSY:
        path = file(folder, f"{kind}.bin", encoded(square, kind))
        with Image.open(path) as opened:
            yield OddInput(f"format {kind}", {"image": path}, {"image": opened.convert("RGB")})
    for kind in CUT:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        content = encoded(noise, kind)
        path = file(folder, f"cut.{kind.lower()}", content[: len(content) // 2])
        yield OddInput(f"half a {kind}", {"image": path}, "image")
    frames = [sample((32, 32)), Image.new("RGB", (32, 32), "green")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        path = file(folder, f"frames.{kind.lower()}", content)
        with Image.open(path) as opened:
            yield OddInput(f"first frame of a {kind}", {"image": path}, {"image": opened.convert("RGB")})


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def files(folder: Path) -> Iterator[OddInput]:
    """What stands at a path, and how paths are written."""
    content, plain = encoded(sample()), {"image": sample()}
    path = file(folder, "plain.png", content)
    (folder / "link.png").symlink_to(path)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    for name in ("图片.png", "e\u0301.png", "with blank .png", "a'b\"c.png", "x%20y.png", "#hash?.png"):
        yield OddInput(f"a file named {name}", {"image": file(folder, name, content)}, plain)
    yield OddInput("a path as text", {"image": path}, plain)
    yield OddInput("a Path", {"image": Path(path)}, plain)
    yield OddInput("a link", {"image": str(folder / "link.png")}, plain)
    yield OddInput("a detour", {"image": f"{folder}/folder.png/../plain.png"}, plain)
    yield OddInput("a PNG named .jpg", {"image": file(folder, "plain.jpg", content)}, plain)
    yield OddInput("a picture with a tail", {"image": file(folder, "tail.png", content + b"tail" * 100)}, plain)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = file(folder, f"exif{orientation}.png", encoded(sample(), exif=exif))
        turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
        upright = sample() if turn is None else sample().transpose(Image.Transpose(turn))
        yield OddInput(f"EXIF orientation {orientation}", {"image": path}, {"image": upright})
    for name, size in {"one pixel": (1, 1), "two pixels": (2, 1)}.items():
        yield OddInput(name, {"image": file(folder, f"{name}.png", encoded(sample(size)))}, {"image": sample(size)})
    for name, size in {"thin": (1, 3000), "flat": (3000, 1)}.items():
        middle = sample(size).crop((0, 1490, 1, 1510) if name == "thin" else (1490, 0, 1510, 1))
        yield OddInput(name, {"image": file(folder, f"{name}.png", encoded(sample(size)))}, {"image": middle})
    profile = b"\0" * 128
    yield OddInput(
        "a broken ICC profile", {"image": file(folder, "icc.png", encoded(sample(), icc_profile=profile))}, plain
    )
    for name, reason, source in [
        ("no bytes", UNREADABLE, file(folder, "empty.png", b"")),
        ("text in a file", UNREADABLE, file(folder, "text.png", b"no picture")),
        ("a bomb", "image", file(folder, "bomb.png", bomb(60_000, 60_000))),
        ("SVG", UNREADABLE, file(folder, "a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>")),
        ("EPS", UNREADABLE, file(folder, "a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")),
        ("PDF", UNREADABLE, file(folder, "a.pdf", encoded(sample(), "PDF"))),
        ("a missing file", "does not exist|No such file", str(folder / "none.png")),
        ("a link to itself", UNREADABLE, str(folder / "loop.png")),
        ("a folder", "not a regular file", str(folder / "folder.png")),
        ("a FIFO", "not a regular file", str(folder / "pipe.png")),
        ("a device", "not a regular file", "/dev/zero"),
        ("a socket's descriptor", "not a regular file|image", "/proc/self/fd/99999"),
        ("an address", "web address|--allow_remote", "https://example.org/a.png"),
        ("a file:// address", "does not exist|No such file", f"file://{path}"),
        ("a home folder", "does not exist|No such file", "~/none.png"),
        ("NUL in a path", UNREADABLE, "a\0b.png"),
        ("a long path", UNREADABLE, "a" * 5000),
    ]:
        yield OddInput(name, {"image": source}, reason)
    nan = np.full((8, 8), float("nan"), np.float32)
    yield OddInput("NaN in a TIFF", {"image": file(folder, "nan.tiff", encoded(Image.fromarray(nan), "TIFF"))}, "NaN")
    path = file(folder, "range.tiff", encoded(Image.new("F", (8, 8), 1e9), "TIFF"))
    yield OddInput("a TIFF of no range", {"image": path}, "expected 0 to 1")


def arrays() -> Iterator[OddInput]:
    """Arrays of every type, and what is no array of pixels."""
    pixels = np.asarray(sample())
    good: dict[str, Any] = {
        "uint8": pixels,
        "int64": pixels.astype(np.int64),
        "int16": pixels.astype(np.int16),
        "uint16": pixels.astype(np.uint16) << 8,
        "float32": pixels.astype(np.float32) / 255,
        "float64": pixels / 255.0,
        "channels first": pixels.transpose(2, 0, 1),
        "strided": np.ascontiguousarray(pixels[:, ::-1])[:, ::-1],
        "big-endian": pixels.astype(">u2") << 8,
        "read-only": np.frombuffer(pixels.tobytes(), np.uint8).reshape(pixels.shape),
    }
    for name, array in good.items():
        yield OddInput(f"array {name}", {"image": array}, {"image": sample()}, NOT_A_TABLE)
    bad = {
        "NaN": (np.full((8, 8), np.nan), "NaN"),
        "infinite": (np.full((8, 8), np.inf), "NaN or infinite"),
        "floats to 255": (pixels.astype(np.float32), "expected 0 to 1"),
        "negative": (pixels.astype(np.int64) - 300, "from 0 to 255"),
        "complex": (np.zeros((8, 8), complex), "dtype complex128"),
        "objects": (np.full((8, 8), None), "dtype object"),
        "dates": (np.zeros((8, 8), "datetime64[s]"), "dtype datetime64"),
        "texts": (np.full((8, 8), "x"), "dtype"),
        "a batch": (pixels[None], "shape"),
        "flat": (pixels.reshape(-1), "shape"),
        "none": (np.zeros((0, 4, 3)), "shape"),
        "no dimension": (np.array(5), "shape"),
        "seven channels": (np.zeros((8, 8, 7), np.uint8), "shape"),
    }
    for name, (array, reason) in bad.items():
        yield OddInput(f"array {name}", {"image": array}, reason, NOT_A_TABLE)


def sources(folder: Path) -> Iterator[OddInput]:
    """Everything else that may stand under `image`."""
    content, plain = encoded(sample()), {"image": sample()}
    path = file(folder, "source.png", content)
    for name, source in {
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "datasets' bytes": {"bytes": content, "path": None},
        "datasets' bytes with a name": {"bytes": content, "path": "none.png"},
        "a tuple": (sample(),),
        "a list with None": [None, sample(), None, ""],
    }.items():
        yield OddInput(f"image {name}", {"image": source}, plain, NOT_A_TABLE)
    yield OddInput("image datasets' path", {"image": {"bytes": None, "path": path}}, plain)
    yield OddInput("two pictures", {"image": [path, path]}, {"image": [sample(), sample()]})
    for name, source in {
        "None": None, "empty text": "", "blanks": " ", "an empty list": [], "a list of None": [None],
        "datasets' nothing": {"bytes": None, "path": None}, "datasets' empty path": {"path": ""},
    }.items():  # fmt: skip
        yield OddInput(f"image {name}", {"title": "x", "image": source}, {"title": "x"})
    yield OddInput("image NA", {"title": "x", "image": pd.NA}, {"title": "x"}, NOT_A_TABLE)
    yield OddInput("image NaN", {"title": "x", "image": float("nan")}, {"title": "x"})
    yield OddInput("image NaN alone", {"image": float("nan")}, "image is NaN", "neither text nor image")
    for name, source, reason, in_tables in [
        ("a number", 5, "image is a int", "image must be"),
        ("a truth value", True, "image is a bool", "image must be"),
        ("a dict of an address", {"url": "x"}, "image is a dict of url", "image must be"),
        ("text as bytes", {"bytes": "abc"}, "image has bytes that are a str", "image has bytes that are a str"),
        ("a tensor", torch.zeros(3, 8, 8), "image is a Tensor", NOT_A_TABLE),
        ("a set", {1}, "image is a set", NOT_A_TABLE),
        ("an iterator", iter([sample()]), "image is a list_iterator", NOT_A_TABLE),
        ("a nested list", [[sample()]], "image is a list", NOT_A_TABLE),
        ("empty bytes", b"", UNREADABLE, NOT_A_TABLE),
    ]:
        yield OddInput(f"image {name}", {"image": source}, reason, in_tables)
    closed = sample()
    closed.close()
    yield OddInput("a closed picture", {"image": closed}, UNREADABLE, NOT_A_TABLE)


def picture_cases(folder: Path) -> list[OddInput]:
    """All of them; files are written into `folder`."""
    return [*modes(), *formats(folder), *files(folder), *arrays(), *sources(folder)]


__all__ = ["picture_cases"]
