"""Pictures that lie elsewhere: fetched once, from what is allowed alone, and each fault costs its picture."""

import asyncio
import multiprocessing
import os
import sys
from dataclasses import replace

import fsspec
import pytest

from modeling_notellm2 import ItemError
from modeling_notellm2.images_notellm2 import load_image
from tests.support.catalogue import png
from training.tables.items import load_items
from training.tables.remote import fetching, pictures
from training.tables.remote.pictures import RemotePicture, fetch_pictures
from training.tables.remote.store import store_folder


def write(path, rows: list[tuple[str, str]]) -> str:
    path.write_text("item_id,title,image\n" + "".join(f"{item_id},t,{image}\n" for item_id, image in rows))
    return str(path)


def table(path, web, *names: str) -> str:
    return write(path, [(name, f"{web.url}/{name}.png") for name in names])


def reasons(rejects) -> dict[str, str]:
    return {reject.ids[0]: reject.reason for reject in rejects}


def test_without_the_option_nothing_is_asked(web, tmp_path):
    web.answers["/a.png"] = (200, png(1))
    path = write(tmp_path / "items.csv", [("a", f"{web.url}/a.png?sign=secret"), ("b", ""), ("c", "s3://shop/c.png")])
    items, rejects = load_items(path)
    assert list(items.item_ids) == ["b"] and not web.asked
    assert reasons(rejects) == {
        "a": f"unreadable image: image {web.url}/a.png is not fetched: --allow_remote {web.host} would allow it",
        "c": "unreadable image: image s3://shop/c.png is not fetched: --allow_remote s3://shop would allow it",
    }
    load_items(path, allow_remote="example.com")
    assert not web.asked


def test_a_picture_is_asked_for_once(web, tmp_path):
    web.answers |= {f"/{name}.png": (200, png(number)) for number, name in enumerate("abc")}
    path = table(tmp_path / "items.csv", web, *"abc")
    for _ in range(2):
        items, rejects = load_items(path, allow_remote=web.host)
        assert len(items) == 3 and not len(rejects)
        assert load_image(items[1]["image"]).tobytes() == load_image(png(1)).tobytes()
    assert sorted(web.asked) == ["/a.png", "/b.png", "/c.png"]
    assert not list(store_folder().glob("arriving/.*"))


def test_each_fault_costs_its_picture(web, tmp_path, monkeypatch):
    small = replace(pictures.PICTURE, size=20_000, seconds=2, silence=0.3)
    monkeypatch.setattr(pictures, "PICTURE", small)
    web.answers |= {
        "/good.png": (200, png(1)),
        "/missing.png": 404,
        "/broken.png": 500,
        "/later.png": [503, (429, b"", {"Retry-After": "0"}), (200, png(2))],
        "/slow.png": 1.0,
        "/large.png": (200, b"x" * 20_001),
        "/cut.png": [(200, png(3)[:-5], {"Content-Length": str(len(png(3)))})],
        "/page.png": (200, b"<html>no such picture</html>"),
        "/inside.png": (302, b"", {"Location": "http://127.0.0.2/a.png"}),
        "/port.png": (302, b"", {"Location": "http://127.0.0.1:1/a.png"}),
        "/file.png": (302, b"", {"Location": "file:///etc/hostname"}),
        "/moved.png": (301, b"", {"Location": "/good.png"}),
        "/round.png": (302, b"", {"Location": "/round.png"}),
        "/zipped.png": (200, b"", {"Content-Encoding": "gzip"}),
    }
    names = [path.removeprefix("/").removesuffix(".png") for path in web.answers]
    items, rejects = load_items(table(tmp_path / "items.csv", web, *names), allow_remote=web.host)
    assert list(items.item_ids) == ["good", "later", "moved"]
    said = {
        "missing": "answered 404",
        "broken": "answered 500, asked 4 times",
        "slow": "did not answer within 0.3 s, asked 4 times",
        "large": "has more than 20,000 bytes",
        "cut": "could not be fetched (peer closed connection",
        "page": "is no picture that can be read",
        "inside": "http://127.0.0.2/a.png is not fetched: --allow_remote 127.0.0.2 would",
        "port": "http://127.0.0.1:1/a.png is not fetched: --allow_remote 127.0.0.1:1 would",
        "file": "file.png redirects to file:/etc/hostname, which is no web address",
        "round": "more than 5 redirects",
        "zipped": "answered 200 with gzip",
    }
    found = reasons(rejects)
    assert found.keys() == said.keys()
    assert not [name for name, words in said.items() if words not in found[name]], found
    assert web.asked.count("/missing.png") == 1 and web.asked.count("/broken.png") == fetching.TRIES


def test_few_are_fetched_at_once(web, monkeypatch):
    monkeypatch.setattr(fetching, "AT_ONCE", 3)
    web.answers |= {f"/{number}.png": 0.02 for number in range(20)}
    fetch_pictures(RemotePicture(f"{web.url}/{number}.png", web.host) for number in range(20))
    assert len(web.asked) == 20 and 1 < web.most_at_once <= 3


def test_a_host_that_does_not_answer_is_given_up(web, monkeypatch):
    monkeypatch.setattr(pictures, "PICTURE", replace(pictures.PICTURE, silence=0.05))
    monkeypatch.setattr(fetching, "AT_ONCE", 1)
    web.answers |= {f"/{number}.png": 1.0 for number in range(20)}
    asked = [RemotePicture(f"{web.url}/{number}.png", web.host) for number in range(20)]
    fetch_pictures(asked)
    assert len(web.asked) == fetching.SILENT * fetching.TRIES
    with pytest.raises(ItemError, match=f"left {fetching.SILENT} addresses in a row unanswered"):
        os.fspath(asked[-1])


def test_what_failed_is_asked_again_by_the_next_process_alone(web):
    web.answers["/a.png"] = [404, (200, png(1))]
    picture = RemotePicture(f"{web.url}/a.png", web.host)
    for _ in range(2):
        with pytest.raises(ItemError, match="answered 404"):
            load_image(picture)
    assert len(web.asked) == 1
    pictures._failed.clear()
    assert load_image(picture).size == (25, 24)


def open_in_process(picture: RemotePicture, answers) -> None:
    answers.put(load_image(picture).size)


def test_many_processes_share_the_copies(web):
    web.answers["/a.png"] = (200, png(1))
    picture = RemotePicture(f"{web.url}/a.png", web.host)
    processes = multiprocessing.get_context("fork")
    answers = processes.SimpleQueue()
    children = [processes.Process(target=open_in_process, args=(picture, answers)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [answers.get() for _ in children] == [(25, 24)] * 4
    asked = len(web.asked)
    assert load_image(picture).size == (25, 24) and len(web.asked) == asked


def test_a_copy_is_used_only_where_it_may_be_fetched(web):
    web.answers["/a.png"] = (200, png(1))
    load_image(RemotePicture(f"{web.url}/a.png", web.host))
    with pytest.raises(ItemError, match="--allow_remote"):
        load_image(RemotePicture(f"{web.url}/a.png"))


def test_pictures_of_buckets(tmp_path):
    fsspec.filesystem("memory").pipe({"/shop/a.png": png(1), "/shop/b.png": b"none"})
    path = write(tmp_path / "items.csv", [(name, f"memory://shop/{name}.png") for name in "abc"])
    items, rejects = load_items(path, allow_remote="memory://shop")
    assert list(items.item_ids) == ["a"] and load_image(items[0]["image"]).size == (25, 24)
    assert {item_id: reason.rpartition(".png")[2] for item_id, reason in reasons(rejects).items()} == {
        "b": " is no picture that can be read (UnidentifiedImageError)",
        "c": ": there is no such file",
    }


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    picture = RemotePicture("s3://shop/a.png", "s3://shop")
    with pytest.raises(ItemError, match="s3fs"):
        load_image(picture)


def test_it_works_inside_a_running_loop(web):
    web.answers["/a.png"] = (200, png(1))

    async def notebook():
        return load_image(RemotePicture(f"{web.url}/a.png", web.host)).size

    assert asyncio.run(notebook()) == (25, 24)


def test_a_disk_that_is_full_ends_the_job(web, monkeypatch):
    web.answers["/a.png"] = (200, png(1))

    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching.Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        fetch_pictures([RemotePicture(f"{web.url}/a.png", web.host)])
