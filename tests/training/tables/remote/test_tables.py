"""Tables that lie elsewhere: read as local ones are, copied again only when they have changed."""

import subprocess
import sys

import fsspec
import pytest

from hub.publishing.dataset import published_item
from tests.support.catalogue import png
from tests.support.hub_client import ROOT, environment
from training.tables.items import load_items
from training.tables.pairs import load_pairs
from training.tables.rejects import TableError


ITEMS = b"item_id,title,image\na,one,pics/a b.png\nb,two\nc,three,\nd,,\n"


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    return system


def test_without_the_option_nothing_is_asked(web):
    for address in (f"{web.url}/items.csv", "memory://shop/items.csv", "s3://shop/items"):
        with pytest.raises(TableError, match="is not fetched: --allow_remote .* would allow it"):
            load_items(address, allow_remote="example.com")
    assert not web.asked


def test_a_table_of_a_host_with_its_pictures_and_faults(web):
    web.answers |= {"/data/items.csv": (200, ITEMS), "/data/pics/a%20b.png": (200, png(1))}
    items, rejects = load_items(f"{web.url}/data/items.csv?sign=1", allow_remote=web.host)
    assert list(items) == [
        {"item_id": "a", "title": "one", "image": items[0]["image"]},
        {"item_id": "c", "title": "three"},
    ]
    assert str(items[0]["image"]) == f"{web.url}/data/pics/a%20b.png"
    assert [(reject.file, reject.row) for reject in rejects] == [("items.csv", 1), ("items.csv", 3)]
    assert web.asked == ["/data/items.csv?sign=1", "/data/pics/a%20b.png"]


def test_a_table_is_copied_again_when_it_has_changed(web):
    web.answers["/items.csv"] = (200, ITEMS)
    address = f"{web.url}/items.csv"
    first, again = (load_items(address, check_images=False, allow_remote=web.host)[0] for _ in range(2))
    assert first.table.copy == again.table.copy and len(first) == 2
    web.answers["/items.csv"] = (200, b"item_id,title\na,one\n")
    assert len(load_items(address, allow_remote=web.host)[0]) == 1
    assert list(first.item_ids) == ["a", "c"]
    web.answers["/items.csv"] = 404
    with pytest.raises(TableError, match="answered 404"):
        load_items(address, allow_remote=web.host)


def test_what_is_published_of_pictures_lies_beside_the_table(web):
    web.answers |= {
        "/data/items.csv": (
            200,
            b"item_id,image\na,a.png\nb,/b.png\nc,../c.png\nd,URL/d.png\n".replace(b"URL", web.url.encode()),
        )
    }
    web.answers |= {path: (200, png(1)) for path in ("/data/a.png", "/c.png", "/d.png")}
    items, _ = load_items(f"{web.url}/data/items.csv", check_images=False, allow_remote=web.host)
    faults = {item["item_id"]: published_item(item, items.table.folders)[1] for item in items}
    assert faults.pop("a") == []
    assert all("lies outside the table's folder" in fault for (fault,) in faults.values()) and len(faults) == 3
    assert all(not published_item(items[at])[1] for at in (0, 2, 3))


def test_pairs_may_come_from_where_items_may(web):
    web.answers |= {
        "/items.csv": (200, b"item_id,title\na,one\nb,two\n"),
        "/pairs.csv": (200, b"query_id,target_id\na,b\n"),
    }
    items, _ = load_items(f"{web.url}/items.csv", allow_remote=web.host)
    assert load_pairs(f"{web.url}/pairs.csv", items)[0].pairs.tolist() == [[0, 1]]


def test_a_folder_of_a_bucket(memory):
    memory.pipe(
        {
            "/shop/items/day=1/a.csv": b"item_id,title\na,one\n",
            "/shop/items/day=2/b.jsonl": b'{"item_id": "b", "title": "two"}\nbroken\n',
            "/shop/items/_temporary/c.csv": b"item_id,title\nc,three\n",
            "/shop/items/notes.txt": b"none",
        }
    )
    items, rejects = load_items("memory://shop/items", allow_remote="memory://shop")
    assert list(items.item_ids) == ["a", "b"] and [reject.file for reject in rejects] == ["day=2/b.jsonl"]
    assert items.table.names == ["day=1/a.csv", "day=2/b.jsonl"]
    memory.pipe("/shop/items/day=1/a.csv", b"item_id,title\nz,one\n")
    assert list(load_items("memory://shop/items", allow_remote="memory://shop")[0].item_ids) == ["z", "b"]


def test_an_image_folder_of_a_bucket(memory):
    memory.pipe(
        {"/shop/red/metadata.csv": b"file_name,item_id\na.png,a\n", "/shop/red/a.png": png(1), "/shop/x.csv": b"y\n"}
    )
    items, rejects = load_items("memory://shop", allow_remote="memory://shop")
    assert str(items[0]["image"]) == "memory://shop/red/a.png" and not len(rejects)


READ_FROM_THE_HUB = """
import sys
from huggingface_hub import HfApi
from modeling_notellm2.images_notellm2 import load_image
from training.tables.items import load_items

HfApi().create_repo("org/shop", repo_type="dataset")
where = {"repo_id": "org/shop", "repo_type": "dataset"}
HfApi().upload_file(path_or_fileobj=b"item_id,title,image\\na,one,a.png\\n", path_in_repo="shop/items.csv", **where)
HfApi().upload_file(path_or_fileobj=sys.argv[1], path_in_repo="shop/a.png", **where)
for address in ("hf://datasets/org/shop/shop", "hf://datasets/org/shop/shop/items.csv"):
    items, rejects = load_items(address, allow_remote="hf://datasets/org/shop")
    print("READ", load_image(items[0]["image"]).size, len(rejects))
"""


def test_files_of_the_hub(hub, tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    done = subprocess.run(
        [sys.executable, "-c", READ_FROM_THE_HUB, str(tmp_path / "a.png")],
        cwd=ROOT,
        env=environment(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("READ (25, 24) 0") == 2, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("memory://shop/none", "no such table"),
        ("memory://shop/none.csv", "no such table"),
        ("nowhere://shop/a.csv", "nowhere"),
        ("https://127.0.0.1:1/items", "ends with .parquet, .jsonl, .csv"),
        ("http://127.0.0.1:1/items.csv", "could not be fetched"),
    ],
)
def test_what_is_no_table_is_said(memory, address, words):
    with pytest.raises(TableError, match=words):
        load_items(address, allow_remote="memory://,nowhere://shop,127.0.0.1:1")
