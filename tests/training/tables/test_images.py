"""Whatever a picture's decoder raises costs that picture alone, wherever pictures are opened."""

import struct

import numpy as np
import pytest
from PIL import Image

from hub.catalogue.encoder import ItemEncoder, Place
from hub.pages.app_page import picture_of
from hub.pages.gallery import GalleryView, write_gallery
from hub.publishing.dataset import published_item
from modeling_notellm2 import NoteLLM2Processor
from tests.support.catalogue import png
from training.batches.collators import ItemCollator
from training.tables.images import faults_of_pictures, first_picture


ERRORS = [
    struct.error("unpack requires 4 bytes"),
    SystemError("decoder"),
    AttributeError("no tile"),
    RecursionError("deep"),
    MemoryError("image"),
    KeyError(7),
    OverflowError("too large"),
    AssertionError(),
]
GOOD, BAD = png(1), b"\x89PNG of a kind that its decoder stumbles over"


@pytest.fixture(params=ERRORS, ids=lambda error: type(error).__name__)
def stumbling(request, monkeypatch):
    """A decoder that raises an error for BAD."""
    decode = Image.open

    def opened(source, *others, **more):
        if hasattr(source, "getvalue") and source.getvalue() == BAD:
            raise request.param
        return decode(source, *others, **more)

    monkeypatch.setattr(Image, "open", opened)
    return request.param


def test_one_bad_picture_costs_itself(stumbling, tiny_processor: NoteLLM2Processor, tiny_model_folder, tmp_path):
    item = {"item_id": "a", "title": "both", "image": [BAD, GOOD]}
    assert first_picture(item).size == Image.open(first_file(tmp_path)).size
    assert first_picture({"image": [BAD]}) is None

    assert [fault is None for fault in faults_of_pictures(item)] == [False, True]
    assert len(ItemCollator(tiny_processor).open(item)[1]) == 1
    published, faults = published_item(item)
    assert (len(published["image"]), len(faults)) == (1, 1)
    prepared = ItemEncoder(str(tiny_model_folder)).prepare(
        0, [(Place("a", "f", 0), item), (Place("b", "f", 1), {"image": BAD})]
    )
    assert [place.item_id for place in prepared.places] == ["a"]
    assert [reject.ids for reject in prepared.rejects] == [["a"], ["b"]]

    assert picture_of(item).getcolors(1) is None  # not the grey tile
    assert picture_of({"image": BAD}).getcolors(1) is not None
    view = GalleryView("v", "", "", np.eye(2, dtype=np.float32), np.ones(2, dtype=bool))
    items = [item, {"item_id": "b", "title": "bad", "image": BAD}]
    write_gallery(tmp_path / "page.html", ["a", "b"], items.__getitem__, [view], [0, 1])
    assert (tmp_path / "page.html").read_text().count("data:image/webp") == 2  # of a, as query and as neighbour


def first_file(folder):
    (folder / "good.png").write_bytes(GOOD)
    return folder / "good.png"
