"""Writers of small tables, whole and broken, for the table of cases."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


Fill = Callable[[Path], Any]
"""Writes a table into a folder; gives the file's name, or None for the folder itself."""


def parquet(*columns: tuple[str, Any], **options: Any) -> Fill:
    def fill(folder: Path) -> str:
        arrays = {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns}
        pq.write_table(pa.table(arrays), folder / "items.parquet", **options)
        return "items.parquet"

    return fill


def text(name: str, content: str | bytes, encoding: str = "utf-8") -> Fill:
    def fill(folder: Path) -> str:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return name

    return fill


def picture(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def image_folder(metadata: str, content: str, pictures: tuple[str, ...]) -> Fill:
    def fill(folder: Path) -> None:
        for number, name in enumerate(pictures):
            (folder / name).write_bytes(picture("red" if number % 2 else "blue"))
        (folder / metadata).write_text(content)

    return fill


def files(**contents: Fill) -> Fill:
    def fill(folder: Path) -> None:
        for place, fill_part in contents.items():
            part = folder / "making"
            part.mkdir()
            made = part / fill_part(part)
            target = folder / f"{place.replace('__', '/')}{made.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            made.rename(target)
            part.rmdir()

    return fill


def class_labels(folder: Path) -> str:
    features = datasets.Features(
        {
            "item_id": datasets.Value("string"),
            "title": datasets.ClassLabel(names=["cat", "dog"]),
            "topics": datasets.List(datasets.ClassLabel(names=["x", "y"])),
        }
    )
    rows = [{"item_id": "a", "title": 0, "topics": [1, 0]}, {"item_id": "b", "title": 1, "topics": []}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "items.parquet")
    return "items.parquet"


def damaged_page(folder: Path) -> str:
    """Three row groups, of which the second is overwritten."""
    texts = [f"title {number} " + "x" * 200 for number in range(30)]
    table = pa.table({"item_id": [str(number) for number in range(30)], "title": texts})
    pq.write_table(table, folder / "items.parquet", row_group_size=10, compression="zstd", use_dictionary=False)
    group = pq.ParquetFile(folder / "items.parquet").metadata.row_group(1).column(1)
    content = bytearray((folder / "items.parquet").read_bytes())
    start, size = group.data_page_offset, group.total_compressed_size
    content[start + size // 2 : start + size] = b"\xff" * (size - size // 2)
    (folder / "items.parquet").write_bytes(content)
    return "items.parquet"


def two_titles(folder: Path) -> str:
    columns = [pa.array(["a"]), pa.array(["x"]), pa.array(["y"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["item_id", "title", "title"]), folder / "items.parquet")
    return "items.parquet"


def saved(folder: Path) -> None:
    rows = [{"item_id": 7.0, "title": "seven"}, {"item_id": None, "title": "none"}]
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows[:1]), "test": datasets.Dataset.from_list(rows[1:])}
    ).save_to_disk(folder)
