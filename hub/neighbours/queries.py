"""A query that is no item of an index: an item in a JSON file, embedded by the model that encoded the index."""

import json
from pathlib import Path

import numpy as np

from hub.catalogue.encoder import ItemEncoder, Place
from hub.catalogue.encoding import describe_model, find_model, model_changes
from hub.catalogue.shards import VISUAL_EMBEDDING
from hub.neighbours.index import Index
from modeling_notellm2.texts_notellm2 import CellError
from training.tables.columns import item_of


def encode_item(
    path: Path, index: Index, model: str | None, dtype: str = "auto", allow_remote: str | None = None
) -> np.ndarray:
    """Vector `(1, d)` of an item in a JSON file, by the model that encoded the index.

    Args:
        dtype: of the model's weights; "auto": that of the index's own vectors.
        allow_remote: what may be asked for the item's pictures.

    Raises:
        ValueError: for a file that holds no item, an item that can't be encoded, or another model.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: an item is a JSON object, this is a {type(raw).__name__}.")
    known = index.settings["model"]
    folder = find_model(model or known["source"], None if model else known["revision"])
    check_model(index, folder)
    visual = index.settings["embedding"] == VISUAL_EMBEDDING
    encoder = ItemEncoder(str(folder), index.settings["dtype"] if dtype == "auto" else dtype, visual=visual)
    try:
        item = item_of(raw, path.parent, allow_remote)
    except CellError as error:
        raise ValueError(f"{path}: {error}.") from error
    block = encoder.embed(encoder.prepare(0, [(Place(item["item_id"] or path.stem, path.name, 0), item)]))
    if not block.item_ids:
        raise ValueError(f"{path}: {block.rejects[0].reason}.")
    if visual and not block.has_image[0]:
        raise ValueError(f"{path}: this index holds visual embeddings and the item has no image.")
    chosen = block.visual_embeddings if visual else block.embeddings
    assert chosen is not None
    return chosen


def check_model(index: Index, folder: Path) -> None:
    """Let no other model than an index's own make queries for it.

    Raises:
        ValueError: naming the files that differ.
    """
    if changed := model_changes(index.settings["model"]["files"], describe_model(folder)):
        raise ValueError(f"{folder} is not the model of this index: {', '.join(changed)} differs.")
