"""From embeddings to a page to look at: queries with their nearest neighbours, by each way of embedding the items.

The page is one HTML file without scripts or outside resources: pictures are in it, and every text of an item is escaped.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from modeling_notellm2.images_notellm2 import image_sources
from training.tables.commands.files import write_text
from training.tables.images import first_picture


TEMPLATE = "gallery.html.jinja"
SMALL, LARGE = 208, 400
"""Longest sides of pictures in pixels: twice what neighbours and queries have on the page, for sharp screens."""
MOST_TEXT = 600
"""Characters of a text that go into the page."""

Item = Mapping[str, Any]


@dataclass(frozen=True)
class GalleryView:
    """One way of embedding the items.

    Attributes:
        name: heads its row of neighbours.
        note: what it compares, in a few words.
        absent: what a query says that this view can't embed.
        embeddings: `(n, d)` float32, L2-normalised.
        usable: `(n,)` bool, the items that it can embed; the others are neither asked nor found.
    """

    name: str
    note: str
    absent: str
    embeddings: np.ndarray
    usable: np.ndarray


@dataclass(frozen=True)
class GalleryNeighbour:
    """An item found: its position among all items, and its cosine similarity to the query."""

    position: int
    score: float


def nearest(view: GalleryView, query: int, k: int) -> list[GalleryNeighbour]:
    """The `k` most similar usable items other than the query, best first; none if the query itself is not usable.

    Exact: every item is compared. Items of equal score come in order of their positions.
    """
    if not view.usable[query]:
        return []
    scores = torch.from_numpy(view.embeddings @ view.embeddings[query])
    scores[torch.from_numpy(~view.usable)] = -torch.inf
    scores[query] = -torch.inf
    order = scores.sort(descending=True, stable=True).indices[: min(k, int(view.usable.sum()) - 1)].tolist()
    return [GalleryNeighbour(position, float(scores[position])) for position in order]


def write_gallery(
    output: Path,
    item_ids: Sequence[str],
    load_item: Callable[[int], Item],
    views: Sequence[GalleryView],
    queries: Sequence[int],
    k: int = 8,
    *,
    title: str = "Nearest neighbours",
    description: str = "",
    labels: Sequence[str | None] | None = None,
    label_name: str = "label",
    partners: Mapping[int, set[int]] | None = None,
    footer: Sequence[str] = (),
) -> None:
    """Write the page, whole or not at all.

    Args:
        output: the HTML file; an earlier one is replaced.
        item_ids: n ids.
        load_item: an item with its pictures by its position in 0..n-1; called for the items that are shown, with the first of
            their pictures that can be read.
        views: rows of each query.
        queries: positions of the items to ask with, in the order of the page.
        k: neighbours in each row.
        title, description: head of the page.
        labels: of the n items; neighbours with their query's label are marked. None: an item without one.
        label_name: what a label is called on the page.
        partners: positions of each item's true partners, which are marked.
        footer: lines for the end of the page.
    """
    neighbours = {(query, at): nearest(view, query, k) for query in queries for at, view in enumerate(views)}
    shown = sorted({near.position for row in neighbours.values() for near in row})
    small = {
        position: _card(item_ids[position], load_item(position), SMALL, _at(labels, position))
        for position in tqdm(shown, desc="Pictures", unit="item")
    }
    marks = {key: [_mark(key[0], near, labels, partners or {}) for near in row] for key, row in neighbours.items()}
    rows = [
        {
            "item": _card(item_ids[query], load_item(query), LARGE, _at(labels, query)),
            "views": [
                {
                    "name": view.name,
                    "note": _note(view, query, marks[query, at], labels, label_name),
                    "neighbours": [
                        {"item": small[near.position], "score": f"{near.score:.3f}", **mark}
                        for near, mark in zip(neighbours[query, at], marks[query, at], strict=True)
                    ],
                }
                for at, view in enumerate(views)
            ],
        }
        for query in queries
    ]
    html = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            title=title,
            description=description,
            queries=rows,
            summary=[_summary(at, view, queries, marks, labels, partners or {}) for at, view in enumerate(views)],
            k=k,
            has_labels=labels is not None,
            has_partners=partners is not None,
            label_name=label_name,
            footer=list(footer),
        )
    )
    # Half a surrogate pair, which a CSV or JSON table can hold, has no UTF-8.
    write_text(html.encode("utf-8", "replace").decode(), output)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # whatever the template's name ends with
        undefined=jinja2.StrictUndefined,
    )


def _card(item_id: str, item: Item, side: int, label: str | None) -> dict[str, Any]:
    """What the template shows of an item: texts, and its first picture as a data URI."""
    title, content = (str(item.get(field) or "").strip()[:MOST_TEXT] for field in ("title", "content"))
    topics = ", ".join(item.get("topics") or [])[:MOST_TEXT]
    sources = image_sources(item.get("image"))
    card = {
        "item_id": item_id,
        "name": title or content[:120] or topics[:120] or item_id,
        "content": content if title else "",  # else it is the name
        "topics": topics,
        "words": content or topics or title,
        "label": label,
        "pictures": len(sources),
        "picture": None,
    }
    picture = first_picture(item)
    if picture is not None:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        card |= {"picture": _data_uri(picture), "width": picture.width, "height": picture.height}
    return card


def _data_uri(picture: Image.Image) -> str:
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def _at(labels: Sequence[str | None] | None, position: int) -> str | None:
    return None if labels is None else labels[position]


def _mark(
    query: int, near: GalleryNeighbour, labels: Sequence[str | None] | None, partners: Mapping[int, set[int]]
) -> dict[str, bool]:
    label = _at(labels, query)
    return {
        "same": label is not None and label == _at(labels, near.position),
        "partner": near.position in partners.get(query, ()),
    }


def _note(
    view: GalleryView, query: int, marks: list[dict[str, bool]], labels: Sequence[str | None] | None, label_name: str
) -> str:
    """The line beside a view's name: what it compares, and how many neighbours have the query's label."""
    if not view.usable[query]:
        return view.absent
    if not marks:
        return f"{view.note}; there is no other item"
    if _at(labels, query) is None:
        return view.note
    return f"{view.note}; {sum(mark['same'] for mark in marks)} of {len(marks)} of the same {label_name}"


def _summary(
    at: int,
    view: GalleryView,
    queries: Sequence[int],
    marks: Mapping[tuple[int, int], list[dict[str, bool]]],
    labels: Sequence[str | None] | None,
    partners: Mapping[int, set[int]],
) -> dict[str, str]:
    """A view's row of the table at the head: over the queries that it can embed."""
    asked = [query for query in queries if view.usable[query]]
    with_partner = [query for query in asked if partners.get(query)]
    hits = sum(any(mark["partner"] for mark in marks[query, at]) for query in with_partner)
    labelled = [mark["same"] for query in asked if _at(labels, query) is not None for mark in marks[query, at]]
    return {
        "name": view.name,
        "partners": f"{hits} of {len(with_partner)} queries" if with_partner else "no query has one",
        "same": f"{sum(labelled) / len(labelled):.0%} of {len(labelled)}" if labelled else "no query has one",
    }
