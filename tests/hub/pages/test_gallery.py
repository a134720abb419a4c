"""The gallery: exact neighbours with the right marks, hostile texts, and how the page comes out in a real browser."""

import html
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from hub.gallery import GalleryArguments, gallery, main
from hub.pages.gallery import GalleryView, nearest, write_gallery
from tests.support.browser import open_page


HOSTILE = [
    "<script>window.ran = 1</script>",
    "</style><img src=x onerror='window.ran = 1'>",
    '" onmouseover="window.ran = 1" x="',
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; 'quoted' <!--",
    "日本語のとても長いタイトル 🐼 مرحبا ",
    "w" * 300,
]


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).resize(size, Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def rows() -> list[dict]:
    """14 usable items, two without picture, two without text, and two rows that can't be used."""
    items = []
    for number in range(14):
        title = HOSTILE[number] if number < len(HOSTILE) else f"item {number}"
        item = {"item_id": f"i{number}", "title": title, "kind": f"kind <{number % 3}>", "image": picture(number)}
        if number in (3, 7):
            item |= {"image": None, "content": "words " * 40}
        if number in (5, 8):
            item |= {"title": None}
        items.append(item)
    broken = {"item_id": "broken <b>", "title": "x", "image": b"no picture", "kind": None}
    return [*items, broken, {"item_id": "empty", "title": None, "image": None, "kind": "kind <0>"}]


def write_table(path: Path) -> Path:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = [{**row, "image": row["image"] and {"bytes": row["image"], "path": None}} for row in rows()]
    fields = {"item_id": pa.string(), "title": pa.string(), "content": pa.string(), "image": image, "kind": pa.string()}
    pq.write_table(pa.Table.from_pylist(table, pa.schema(fields)), path)
    return path


@pytest.fixture(scope="module")
def page(tiny_model_folder, tmp_path_factory) -> Path:
    """The page of all usable items with labels and partners."""
    folder = tmp_path_factory.mktemp("gallery")
    items = write_table(folder / "items.parquet")
    (folder / "pairs.csv").write_text("query_id,target_id\ni0,i9\ni10,i0\ni1,elsewhere\n")
    gallery(
        GalleryArguments(
            str(tiny_model_folder),
            str(items),
            str(folder / "page.html"),
            query_ids=[f"i{number}" for number in range(14)],
            neighbours=6,
            label_column="kind",
            pairs=str(folder / "pairs.csv"),
            title="A & B <look>",
            dtype="float32",
        )
    )
    return folder / "page.html"


def read_page(path: Path) -> dict[str, dict[str, list[tuple[str, str, float]]]]:
    """Of each query and view: ids, marks and scores of the neighbours."""
    result = {}
    for article in path.read_text().split('<article class="query">')[1:]:
        query = html.unescape(re.search(r'class="soft id">(.*?)</p>', article)[1])
        result[query] = {}
        for section in article.split('<section class="view">')[1:]:
            found = re.findall(r'<li class="(\w*)" title="[^"]* \(([^"]*)\)">.*?<span>([-\d.]+)</span>', section, re.S)
            result[query][re.search("<h3>(.*?)</h3>", section)[1]] = [(i, mark, float(s)) for mark, i, s in found]
    return result


def test_nearest_is_exact_and_leaves_out_what_a_view_lacks():
    generator = np.random.default_rng(0)
    embeddings = generator.standard_normal((200, 16)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    embeddings[17] = embeddings[4]  # a twin
    usable = generator.random(200) < 0.8
    usable[[3, 4, 17]] = False, True, True
    view = GalleryView("v", "", "", embeddings, usable)
    assert nearest(view, 3, 5) == []
    for query in np.flatnonzero(usable)[:20]:
        scores = embeddings @ embeddings[query]
        others = [at for at in np.argsort(-scores, kind="stable") if usable[at] and at != query]
        given = nearest(view, int(query), 7)
        assert [near.position for near in given] == others[:7]
        np.testing.assert_allclose([near.score for near in given], scores[others[:7]], atol=1e-6)
    assert nearest(view, 4, 1)[0].position == 17
    assert len(nearest(view, 4, 1000)) == usable.sum() - 1


def test_each_row_shows_what_the_model_finds_with_those_fields(page, tiny_model_folder):
    model = AutoModel.from_pretrained(tiny_model_folder).eval()
    processor = AutoProcessor.from_pretrained(tiny_model_folder)
    items = {row["item_id"]: {key: row.get(key) for key in ("title", "content", "image")} for row in rows()[:14]}
    image = {i: {"image": item["image"]} for i, item in items.items() if item["image"]}
    text = {i: {**item, "image": None} for i, item in items.items() if item["title"] or item["content"]}
    shown = read_page(page)
    assert list(shown) == list(items)
    cases = [("Picture and text", items, 0), ("Picture alone", image, 0), ("Text alone", text, 0)]
    for name, part, which in [*cases, ("Visual embedding", image, 1)]:
        with torch.no_grad():
            output = model(**processor(list(part.values()), return_tensors="pt"))
        embeddings = (output.embeddings, output.visual_embeddings)[which]
        scores = embeddings @ embeddings.T
        for query in items:
            found = shown[query][name]
            assert len(found) == (6 if query in part else 0)
            if found:
                of_query = dict(zip(part, scores[list(part).index(query)].tolist(), strict=True))
                expected = sorted((score for i, score in of_query.items() if i != query), reverse=True)[:6]
                np.testing.assert_allclose([score for _, _, score in found], expected, atol=6e-4)
                np.testing.assert_allclose([of_query[i] for i, _, _ in found], expected, atol=1e-5)


def test_marks_are_true_partners_and_equal_labels(page):
    kind = {row["item_id"]: row["kind"] for row in rows()}
    partners = {"i0": {"i9", "i10"}, "i9": {"i0"}, "i10": {"i0"}}
    marks = set()
    for query, views in read_page(page).items():
        for found in views.values():
            for item_id, mark, _ in found:
                same = "same" if kind[item_id] == kind[query] else ""
                assert mark == ("partner" if item_id in partners.get(query, ()) else same)
                marks.add(mark)
    assert marks == {"partner", "same", ""}


def test_texts_are_escaped_and_nothing_comes_from_outside(page):
    text = page.read_text()
    assert re.findall(r"<(script|link|iframe|object|embed|base|form)\b", text) == []
    assert all(source.startswith("data:image/webp;base64,") for source in re.findall(r'src="([^"]*)"', text))
    assert not re.search(r"(href=|url\(|@import|https?://)", text)
    assert text.count("<style>") == text.count("</style>") == 1
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    for row in rows()[:14]:
        assert (
            row["title"] is None
            or html.escape(row["title"]).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
        )
    assert "<title>A &amp; B &lt;look&gt;</title>" in text
    assert "This item has no picture." in text
    assert "This item has no text." in text


def test_rows_left_out_are_listed(page):
    rejects = [json.loads(line) for line in page.with_suffix(".rejects.jsonl").read_text().splitlines()]
    assert [(reject["item_id"], reject["row"]) for reject in rejects] == [("broken <b>", 14), ("empty", 15)]
    assert "2 rows of the table could not be used." in page.read_text()


def test_mistakes_end_with_what_to_do(tiny_model_folder, tmp_path, monkeypatch, capsys):
    items = write_table(tmp_path / "items.parquet")
    (tmp_path / "pairs.jsonl").write_text('{"query_id": "a", "target_id": "b"}\n')
    common = ["--model", str(tiny_model_folder), "--items", str(items), "--output", str(tmp_path / "page.html")]
    for options, message in [
        (["--query_ids", "i0", "broken <b>"], "No usable item 'broken <b>': image can't be read"),
        (["--query_ids", "i99"], "the table has no such id"),
        (["--label_column", "colour"], "no column colour"),
        (["--pairs", str(tmp_path / "pairs.jsonl")], "no pair is between two usable items"),
        (["--items", str(tmp_path / "none.parquet")], "none.parquet: no such table"),
    ]:
        monkeypatch.setattr(sys, "argv", ["hub/gallery.py", *common, *options])
        with pytest.raises(SystemExit, match=re.escape(message)):
            main()
    monkeypatch.setattr(sys, "argv", ["hub/gallery.py", *common, "-k", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
    monkeypatch.setattr(sys, "argv", ["hub/gallery.py", *common, "--queries", "3", "-k", "2"])
    main()
    assert "2 rows left out" in capsys.readouterr().out
    shown = read_page(tmp_path / "page.html")
    assert len(shown) == 3
    assert all(len(views["Picture and text"]) == 2 for views in shown.values())


def test_a_page_that_fails_leaves_the_old_one(tmp_path):
    (tmp_path / "page.html").write_text("old")

    def load(position):
        raise OSError("gone")

    view = GalleryView("v", "", "", np.eye(3, dtype=np.float32), np.ones(3, dtype=bool))
    with pytest.raises(OSError, match="gone"):
        write_gallery(tmp_path / "page.html", ["a", "b", "c"], load, [view], [0])
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


LAYOUT = """() => {
  const wide = [...document.body.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > innerWidth + 1);
  const covers = [...document.querySelectorAll(".frame")].map(e => e.getBoundingClientRect());
  return {
    width: innerWidth, page: document.documentElement.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 200)),
    images: [...document.images].map(i => i.naturalWidth), scripts: document.scripts.length, ran: window.ran ?? 0,
    handlers: [...document.querySelectorAll("[onerror], [onmouseover]")].length,
    narrowest: Math.min(...covers.map(c => c.width)), unsquare: covers.filter(c => Math.abs(c.width - c.height) > 1).length,
  };
}"""


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(page, tmp_path, width):
    """On a desk and on a phone: every picture is there, nothing sticks out, no script of an item runs."""
    text = page.read_text()
    # A copy without the content security policy: whatever script an item smuggled in could run there.
    open_copy = re.sub(r"<meta http-equiv[^>]*>", "", text)
    assert open_copy.count("<meta") == text.count("<meta") - 1
    (tmp_path / "open.html").write_text(open_copy)
    with open_page(width, 2000) as browser:
        browser.goto((tmp_path / "open.html").as_uri())
        browser.wait_for_timeout(200)
        seen = browser.evaluate(LAYOUT)
        browser.goto(page.as_uri())
        browser.screenshot(path=tmp_path / "shot.png")
    assert seen["width"] == width
    assert seen["page"] <= width and seen["wide"] == []
    assert len(seen["images"]) == text.count("<img ") > 100
    assert min(seen["images"]) > 0
    assert (seen["ran"], seen["handlers"], seen["scripts"]) == (0, 0, 0)
    assert seen["narrowest"] > 60 and seen["unsquare"] == 0
    colours = Image.open(tmp_path / "shot.png").convert("RGB").getcolors(2**24)
    assert len(colours) > 1000  # pictures and text, not an empty or an error page
