"""OpenMoji's tables from a hand-made archive: what becomes an item, what is rejected, and what a wrong archive says."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.experiments import openmoji as openmoji_items
from training.experiments.openmoji import DATA, DRAWINGS, OpenMojiArguments, build_tables
from training.tables.items import load_items
from training.tables.pairs import load_pairs


ROOT = Path(__file__).parents[3]
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="36" height="72" fill="{}"/></svg>'


def entry(hexcode, subgroup, tags="a, b", skintone=""):
    name = f"Name of {hexcode}"
    return {
        "hexcode": hexcode,
        "group": "extras-openmoji",
        "subgroups": subgroup,
        "annotation": name,
        "openmoji_tags": tags,
        "skintone": skintone,
    }


ENTRIES = [
    *(entry(f"E{number:03}", "brand" if number % 2 else "emergency") for number in range(24)),
    entry("E100", "brand", tags="Browser,  fire , browser, Name of E100, "),
    entry("1F1E6-1F1E8", "country-flag"),
    entry("1F44B-1F3FB", "brand", skintone="1"),
    entry("1F600", "brand", tags=" "),
    entry("E200", "brand"),
    entry("E201", "brand"),
]


def write_archive(path, entries):
    drawings = {f"{DRAWINGS}/{one['hexcode']}.svg": SVG.format("#ff0000").encode() for one in entries}
    del drawings[f"{DRAWINGS}/E200.svg"]
    drawings[f"{DRAWINGS}/E201.svg"] = b"no drawing"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {**drawings, DATA: json.dumps(entries).encode()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("npm") / "openmoji.tgz", ENTRIES)


def build(archive, **options):
    return build_tables(OpenMojiArguments(output="unused", archive=str(archive), **options))


def test_tagged_drawings_are_items(archive):
    tables = build(archive)
    assert {item["item_id"] for item in tables.items} == {f"e{number:03}" for number in range(24)} | {"e100"}
    item = next(item for item in tables.items if item["item_id"] == "e100")
    assert (item["title"], item["topics"], item["content"]) == ("name of e100", ["browser", "fire"], None)
    assert (item["category"], item["subcategory"]) == ("extras-openmoji", "brand")
    pixels = np.asarray(Image.open(io.BytesIO(item["image"]["bytes"])).convert("RGBA"))
    assert pixels.shape == (72, 72, 4)
    assert pixels[36, 10].tolist() == [255, 0, 0, 255]
    assert pixels[36, 60, 3] == 0

    assert [reject["item_id"] for reject in tables.rejects] == ["E200", "E201"]
    assert tables.rejects[0]["reason"] == "no picture"
    assert tables.flags_left_out == 1
    assert build(archive, country_flags=1).flags_left_out == 0
    assert build(archive) == tables != build(archive, seed=1)


def test_no_text_is_made_from_the_relation(archive, tmp_path):
    renamed = [one | {"group": "xyzzy", "subgroups": "plugh"} for one in ENTRIES]
    items = build(write_archive(tmp_path / "renamed.tgz", renamed)).items
    texts = [text for item in items for text in (item["title"], *item["topics"])]
    assert len(items) == 26
    assert not any("xyzzy" in text or "plugh" in text for text in texts)


def test_command_writes_tables_that_training_reads(archive, tmp_path):
    command = [sys.executable, "-m", "training.experiments.openmoji", "--output", str(tmp_path / "data"), "--archive"]
    done = subprocess.run([*command, str(archive)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "25 items in 2 subcategories" in done.stdout
    items, rejects = load_items(str(tmp_path / "data" / "items.parquet"))
    assert (len(items), len(rejects)) == (25, 0)
    pairs, rejects = load_pairs(str(tmp_path / "data" / "train_pairs.parquet"), items, "train", "subcategory")
    assert len(pairs.pairs) > 50 and len(rejects) == 0

    (tmp_path / "none.tgz").write_bytes(archive.read_bytes()[:100])
    wrong = subprocess.run([*command, str(tmp_path / "none.tgz")], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "none.tgz: not a readable .tgz archive" in wrong.stderr


def test_an_archive_of_something_else(tmp_path):
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/index.js"), io.BytesIO())
    with pytest.raises(ValueError, match="other.tgz: there is no package/data/openmoji.json in it"):
        build(tmp_path / "other.tgz")
    with pytest.raises(ValueError, match="missing.tgz: not a readable"):
        build(tmp_path / "missing.tgz")


def test_npm_fetches_the_package(archive, tmp_path, monkeypatch):
    """A stand-in for npm that copies the archive to where it is started, as `npm pack` does; then none; then a failing one."""
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack {openmoji_items.PACKAGE}" ] && cp {archive} openmoji-17.0.0.tgz\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert build_tables(OpenMojiArguments(output="unused")) == build(archive)
    npm.write_text("#!/bin/sh\necho no such registry >&2; exit 1\n")
    with pytest.raises(ValueError, match="failed: no such registry"):
        build_tables(OpenMojiArguments(output="unused"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="needs npm, which is not installed. Or get"):
        build_tables(OpenMojiArguments(output="unused"))
