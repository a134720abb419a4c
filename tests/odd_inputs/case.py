"""What one odd input is: an item, the plain item whose embedding it must have or the error it must give, and in tables."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


class Same:
    """In tables an input counts as it does in the processor."""


class NotATable:
    """No table can hold the input: an object in memory."""


SAME, NOT_A_TABLE = Same(), NotATable()


@dataclass(frozen=True)
class OddInput:
    """One line of the table of odd inputs.

    Attributes:
        name: of the input; its item_id too, where it is a dict without one.
        item: as a user passes it.
        expected: a plain item with the same embedding, or a part of the one error's message.
        in_tables: what a table's row of this content gives: `SAME`, an item, a part of the reject's reason, or `NOT_A_TABLE`.
    """

    name: str
    item: Any
    expected: dict[str, Any] | str
    in_tables: dict[str, Any] | str | Same | NotATable = field(default=SAME)

    @property
    def expected_in_tables(self) -> dict[str, Any] | str | NotATable:
        return self.expected if isinstance(self.in_tables, Same) else self.in_tables


def sample(size: tuple[int, int] = (40, 30)) -> Image.Image:
    """An RGB picture of two colours, none of them symmetric."""
    image = Image.new("RGB", size, (200, 40, 40))
    image.paste((40, 40, 200), (0, 0, size[0] // 2, max(size[1] // 3, 1)))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def file(folder: Path, name: str, content: bytes) -> str:
    """Writes a file, and gives its path as text."""
    (folder / name).write_bytes(content)
    return str(folder / name)


__all__ = ["NOT_A_TABLE", "SAME", "NotATable", "OddInput", "encoded", "file", "sample"]
