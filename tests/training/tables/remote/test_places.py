"""Which addresses `--allow_remote` lets be asked."""

import pytest

from training.tables.commands.handler import OptionError
from training.tables.remote.places import (
    Allowed,
    RemoteError,
    RemoteFolder,
    checked_address,
    is_address,
    shown,
    suffix_of,
)


NAMED = "cdn.example.com, Images.Example.com:8443,127.0.0.1:9000,[::1]:9000,s3://shop/items,hf://datasets/ORG/DATA,memory://"


@pytest.mark.parametrize(
    "address",
    [
        "https://cdn.example.com/a.png?sign=1",
        "http://CDN.example.com:80/a.png",
        "https://images.example.com:8443/a.png",
        "http://127.0.0.1:9000/a.png",
        "http://[::1]:9000/a.png",
        "s3://shop/items/a.png",
        "s3://shop/items",
        "hf://datasets/ORG/DATA/items.parquet",
        "memory://a/b.csv",
    ],
)
def test_what_is_named_is_allowed(address):
    Allowed.of(NAMED).check(address)


@pytest.mark.parametrize(
    ("address", "entry"),
    [
        ("https://example.com/a.png?sign=1", "example.com"),
        ("https://cdn.example.com.evil.com/a.png", "cdn.example.com.evil.com"),
        ("https://cdn.example.com:8443/a.png", "cdn.example.com:8443"),
        ("https://images.example.com/a.png", "images.example.com"),
        ("http://evil.com#cdn.example.com", "evil.com"),
        ("http://127.0.0.1/a.png", "127.0.0.1"),
        ("http://[::2]:9000/a.png", "[::2]:9000"),
        ("s3://shop/items2/a.png", "s3://shop"),
        ("gs://shop/items/a.png", "gs://shop"),
    ],
)
def test_what_is_not_named_is_refused_with_the_option_that_would_do(address, entry):
    with pytest.raises(RemoteError, match="is not fetched: --allow_remote") as caught:
        Allowed.of(NAMED).check(address)
    assert f"--allow_remote {entry} would allow it" in str(caught.value) and "sign=1" not in str(caught.value)
    Allowed.of(f"{NAMED},{entry}").check(address)


@pytest.mark.parametrize(
    "address",
    [
        "http://cdn.example.com@evil.com/a.png",
        "http://user@cdn.example.com/a.png",
        "http://",
        "http://cdn.example.com:port/a.png",
        "http://[cdn.example.com/",
        "s3://shop/items/../secrets/a.png",
        "memory://a.zip::https://evil.com/a.zip",
    ],
)
def test_what_is_no_plain_address_is_refused(address):
    with pytest.raises(RemoteError):
        Allowed.of(NAMED).check(address)


@pytest.mark.parametrize(
    "entry", ["https://cdn.example.com", "file:///etc", "a/b", "a:99999", "user@host", "s3://a::b"]
)
def test_an_entry_that_is_none_is_a_wrong_option(entry):
    with pytest.raises(OptionError, match="--allow_remote"):
        Allowed.of(entry)


def test_only_an_address_that_was_typed_may_be_one_inside():
    inside = Allowed.of("127.0.0.1:9000,example.com,localhost")
    assert checked_address("127.0.0.1", ["127.0.0.1"], inside) == "127.0.0.1"
    assert checked_address("example.com", ["93.184.215.14"], inside) == "93.184.215.14"
    for host, found in [
        ("localhost", ["127.0.0.1"]),
        ("example.com", ["93.184.215.14", "10.0.0.1"]),
        ("example.com", []),
    ]:
        with pytest.raises(RemoteError, match="not a public address"):
            checked_address(host, found, inside)


def test_addresses_and_paths_are_told_apart():
    assert [is_address(text) for text in ("https://a/b", "s3://a", "C://a", "a/b.png", "file:///a", "HTTP://a")] == [
        *(True, True, False, False, False, True)
    ]
    assert suffix_of("https://host/a%20b.CSV?name=x.parquet#y") == ".csv" and suffix_of("s3://b/x.jsonl") == ".jsonl"
    assert shown("https://user:secret@host/a?sign=1") == "https://host/a"


def test_pictures_lie_beside_their_table():
    web, bucket = RemoteFolder("https://host/data"), RemoteFolder("s3://shop/items")
    assert web / "pics/a b#1.png" == "https://host/data/pics/a%20b%231.png"
    assert bucket / "./pics/a b#1.png" == "s3://shop/items/pics/a b#1.png"
    assert (web / "/mnt/a.png", bucket.around("red/metadata.csv") / "a.png") == (
        "/mnt/a.png",
        "s3://shop/items/red/a.png",
    )
