"""What a gallery shows: a table's items embedded whole, by picture and by text alone; the items to ask with; true partners."""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from hub.catalogue.encoder import ItemEncoder, Place, items_between
from hub.pages.gallery import GalleryView
from training.tables.items import Item, ItemTable
from training.tables.pairs import pair_positions
from training.tables.rejects import Reject


ROWS_PER_BLOCK = 256
TEXT_FIELDS = ("title", "topics", "content")
BOTH, IMAGE, TEXT, VISUAL = "Picture and text", "Picture alone", "Text alone", "Visual embedding"
NOTES = {
    BOTH: ("what the model finds", ""),
    IMAGE: ("all texts left out", "This item has no picture."),
    TEXT: ("all pictures left out", "This item has no text."),
    VISUAL: ("of the pictures, read out before the text", "This item has no picture."),
}


@dataclass(frozen=True)
class EmbeddedItems:
    """The usable items of a table and their embeddings.

    Attributes:
        item_ids: n ids, in order of the table.
        positions: of each among the table's items.
        views: ways of embedding them.
        rejects: rows left out.
    """

    item_ids: list[str]
    positions: list[int]
    views: list[GalleryView]
    rejects: list[Reject]


def embed_catalogue(items: ItemTable, encoder: ItemEncoder) -> EmbeddedItems:
    """Every item whole, without its texts, and without its pictures.

    Raises:
        ValueError: when no item can be used.
    """
    ids: list[str] = []
    rejects: list[Reject] = []
    blocks: dict[str, list[tuple[list[str], np.ndarray]]] = defaultdict(list)
    rows = len(items.table)
    with tqdm(total=rows, desc="Embedding", unit="row") as bar:
        for start in range(0, rows, ROWS_PER_BLOCK):
            block = list(items_between(items, start, min(start + ROWS_PER_BLOCK, rows)))
            whole = encoder.embed(encoder.prepare(0, block))
            ids += whole.item_ids
            rejects += whole.rejects
            blocks[BOTH].append((whole.item_ids, whole.embeddings))
            if whole.visual_embeddings is not None:
                seen = [item_id for item_id, has in zip(whole.item_ids, whole.has_image, strict=True) if has]
                blocks[VISUAL].append((seen, whole.visual_embeddings[whole.has_image]))
            usable = set(whole.item_ids)
            for name, left_out in ((IMAGE, TEXT_FIELDS), (TEXT, ("image",))):
                # What has nothing left is rejected here, and then is no item of this view.
                part = encoder.embed(encoder.prepare(0, _without(block, left_out, usable)))
                blocks[name].append((part.item_ids, part.embeddings))
            bar.update(min(ROWS_PER_BLOCK, rows - start))
    if not ids:
        raise ValueError(f"{items.table.source}: no row can be used; the first: {rejects[0].reason}.")
    views = [_view(name, ids, blocks[name]) for name in (BOTH, IMAGE, TEXT, VISUAL) if name in blocks]
    positions = items.item_ids.positions(pa.array(ids, pa.string())).tolist()
    return EmbeddedItems(ids, positions, [view for view in views if view.usable.any()], rejects)


def choose_queries(
    catalogue: EmbeddedItems,
    query_ids: Sequence[str] | None,
    count: int,
    seed: int,
    partners: Mapping[int, set[int]] | None,
) -> list[int]:
    """Positions of the items to ask with: those of `query_ids`, else `count` drawn by `seed`, with partners if there are any.

    Raises:
        ValueError: for an id that is not among the usable items, naming the reason if its row was left out.
    """
    if query_ids:
        position_of = {item_id: position for position, item_id in enumerate(catalogue.item_ids)}
        reasons = {"".join(reject.ids): reject.reason for reject in catalogue.rejects}
        for item_id in query_ids:
            if item_id not in position_of:
                raise ValueError(f"No usable item {item_id!r}: {reasons.get(item_id, 'the table has no such id')}.")
        return [position_of[item_id] for item_id in query_ids]
    pool = sorted(partners) if partners else range(len(catalogue.item_ids))
    return random.Random(seed).sample(pool, min(count, len(pool)))


def read_partners(source: str, items: ItemTable, encoding: str | None = None) -> dict[int, set[int]]:
    """True partners of each item by position, both ways; pairs of other items are passed over.

    Raises:
        TableError: when the table can't be read or lacks query_id or target_id.
        ValueError: when no pair is between these items.
    """
    pairs = pair_positions(source, items, encoding)
    partners: dict[int, set[int]] = defaultdict(set)
    for query, target in pairs[(pairs >= 0).all(1) & (pairs[:, 0] != pairs[:, 1])].tolist():
        partners[query].add(target)
        partners[target].add(query)
    if not partners:
        raise ValueError(f"{source}: no pair is between two usable items. Does it belong to the item table?")
    return dict(partners)


def _without(block: list[tuple[Place, Item]], fields: Iterable[str], usable: set[str]) -> Iterator[tuple[Place, Item]]:
    """The usable items of a block, without some fields."""
    for place, item in block:
        if place.item_id in usable:
            yield place, {name: value for name, value in item.items() if name not in fields}


def _view(name: str, ids: list[str], blocks: list[tuple[list[str], np.ndarray]]) -> GalleryView:
    position_of = {item_id: position for position, item_id in enumerate(ids)}
    embeddings = np.concatenate([of_block for _, of_block in blocks])
    positions = [position_of[item_id] for of_block, _ in blocks for item_id in of_block]
    everywhere = np.zeros((len(ids), embeddings.shape[1]), dtype=np.float32)
    everywhere[positions] = embeddings
    usable = np.zeros(len(ids), dtype=bool)
    usable[positions] = True
    note, absent = NOTES[name]
    return GalleryView(name, note, absent, everywhere, usable)
