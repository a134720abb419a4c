"""What a file holds that isn't seen from outside: texts in any encoding, in metadata and in archives, and pickles.

A pickle runs code when it is read, whatever its file is called; a token in a picture's comment is published like one in a README.
"""

import bz2
import gzip
import io
import lzma
import pickletools
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from safetensors import safe_open


PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npz"}
MOST_BYTES = 256 * 2**20
"""Of a compressed or binary file that are looked at; weights in safetensors are told by their header."""
CALLS = {"INST", "NEWOBJ", "NEWOBJ_EX", "OBJ", "REDUCE"}
"""Opcodes of a pickle that call what it names."""
DEEPEST = 3
"""Archives in archives that are opened."""
PRINTABLE = re.compile(rb"[\t\n\r\x20-\x7e]{8,}")
COMPRESSED: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)


class HiddenPickle(ValueError):  # noqa: N818
    """A pickle where none is expected; the message says what it is."""


def texts_of(path: Path) -> Iterator[tuple[str, str]]:
    """Every text in a file, with where it stands ("" for the file itself).

    Raises:
        HiddenPickle: when the file, or one in it, is a pickle or an array of Python objects.
        ValueError, OSError: for a safetensors file that can't be read.
    """
    if path.suffix.lower() == ".safetensors":
        with safe_open(path, framework="pt") as tensors:
            yield from ((f"metadata {name}", value) for name, value in (tensors.metadata() or {}).items())
            yield "names of tensors", "\n".join(tensors.keys())
        return
    with path.open("rb") as stream:
        yield from _texts(stream, "", 0)


def _texts(stream: IO[bytes], where: str, depth: int) -> Iterator[tuple[str, str]]:
    head = stream.read(8192)
    stream.seek(0)
    _refuse_pickles(stream, head, where)
    opened = next((opener for start, opener in COMPRESSED.items() if head.startswith(start)), None)
    if opened is not None and depth < DEEPEST:
        with opened(stream) as inner:
            content = inner.read(MOST_BYTES)
        yield from _texts(io.BytesIO(content), _below(where, "compressed"), depth + 1)
    elif head.startswith(b"PK\x03\x04") and depth < DEEPEST:
        yield from _of_zip(stream, where, depth)
    elif head[257:262] == b"ustar" and depth < DEEPEST:
        yield from _of_tar(stream, where, depth)
    else:
        content = stream.read(MOST_BYTES)
        yield where, _decoded(content)
        yield from _of_picture(content, where)


def _of_zip(stream: IO[bytes], where: str, depth: int) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                if Path(member.filename).suffix.lower() in PICKLES:
                    raise HiddenPickle(f"an archive with the pickle {_below(where, member.filename)}")
                with archive.open(member) as inner:
                    content = inner.read(MOST_BYTES)
                yield from _texts(io.BytesIO(content), _below(where, member.filename), depth + 1)


def _of_tar(stream: IO[bytes], where: str, depth: int) -> Iterator[tuple[str, str]]:
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            if member.isfile() and (inner := archive.extractfile(member)) is not None:
                yield from _texts(io.BytesIO(inner.read(MOST_BYTES)), _below(where, member.name), depth + 1)


def _below(where: str, name: str) -> str:
    return f"{where}, {name}" if where else name


def _decoded(content: bytes) -> str:
    """A text in UTF-8 or UTF-16, or the printable parts of what is no text."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    head = content[:8192]
    if b"\0" not in head:
        return content.decode("utf-8", errors="replace")
    if len(head) > 3 and not any(head[1::2]) and all(head[0::2]):
        return content.decode("utf-16-le", errors="replace")
    if len(head) > 3 and not any(head[0::2]) and all(head[1::2]):
        return content.decode("utf-16-be", errors="replace")
    return b"\n".join(PRINTABLE.findall(content)).decode("ascii")


def _of_picture(content: bytes, where: str) -> Iterator[tuple[str, str]]:
    """Texts in a picture's chunks, comments and EXIF, some of which are compressed."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            values: dict[Any, Any] = {
                **picture.info,
                **{f"EXIF {tag}": value for tag, value in picture.getexif().items()},
            }
    except Exception:  # no picture, or one that can't be read: its bytes were looked at already
        return
    for name, value in values.items():
        text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
        yield _below(where, f"the picture's {name}"), text


def _refuse_pickles(stream: IO[bytes], head: bytes, where: str) -> None:
    prefix = f"{where}: " if where else ""
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        if _holds_objects(stream):
            raise HiddenPickle(f"{prefix}an array of Python objects, which is a pickle")
    elif _is_pickle(stream):
        raise HiddenPickle(f"{prefix}a pickle by its content")
    stream.seek(0)


def _holds_objects(stream: IO[bytes]) -> bool:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return bool(read(stream)[2].hasobject)
    except UNREADABLE:
        return False
    finally:
        stream.seek(0)


def _is_pickle(stream: IO[bytes]) -> bool:
    """Whether a stream starts with a pickle of any protocol: as far as it runs, each opcode finds on the stack what it takes.

    Texts whose letters happen to be opcodes ask for what isn't there. One that calls something is told before it ends: it
    need not be whole to do harm.
    """
    opcodes = 0
    stack: list[Any] = []
    try:
        for opcode, _, _ in pickletools.genops(stream):
            opcodes += 1
            _step(stack, opcode)
            if opcode.name in CALLS or opcodes > 1000:
                return True
    except Exception:  # whatever it is that genops doesn't understand, or a stack too short, it is no pickle
        return False
    return opcodes > 3


def _step(stack: list[Any], opcode: Any) -> None:
    """What an opcode does to the stack, of which only the kinds are known.

    Raises:
        IndexError, ValueError: when the stack doesn't hold what the opcode takes.
    """
    before, after = opcode.stack_before, opcode.stack_after
    mark = pickletools.markobject
    if mark in before or (opcode.name == "POP" and stack and stack[-1] is mark):
        last_mark = len(stack) - 1 - stack[::-1].index(mark)
        del stack[last_mark:]
        before = before[: before.index(mark)] if mark in before else []
    for _ in before:
        if stack.pop() is mark:
            raise ValueError("a mark where a value is taken")
    stack.extend(after)
