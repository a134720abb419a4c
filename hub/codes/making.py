"""From an encoded catalogue to the ids of its items; the order of the catalogue's rows changes nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import xxhash

from hub.catalogue.catalogue import Catalogue, new_folder, vectors_at
from hub.catalogue.encoding import model_changes
from hub.catalogue.shards import EMBEDDING, VISUAL_EMBEDDING
from hub.codes.codebooks import Codebooks
from hub.codes.quality import POOL, measure
from hub.codes.table import SemanticIds, with_digits
from training.tables.commands.bounds import AtLeastOne, Bounds, check_bounds
from training.tables.commands.handler import OptionError
from training.tables.commands.outputs import Output, claimed


@dataclass
class SemanticIdsArguments:
    """Whose ids, and of how many codes."""

    embeddings: str = field(metadata={"help": "Folder that hub/encode.py wrote."})
    output: str = field(metadata={"help": "Folder to write. Earlier ids there are replaced."})
    earlier: str | None = field(
        default=None,
        metadata={
            "help": "Folder of earlier ids of the same model: its codebooks are taken, known items keep their ids, new ones "
            "get theirs without training."
        },
    )
    visual: bool = field(default=False, metadata={"help": "Of the visual embeddings, of items with an image."})
    levels: Annotated[int, Bounds(1, 16)] = field(
        default=3, metadata={"help": "Codes of an id, beside its last digit."}
    )
    codes: Annotated[int, Bounds(2, 65_536)] = field(default=256, metadata={"help": "Of each level."})
    seed: Annotated[int, Bounds(0, 2**31 - 1)] = field(default=0, metadata={"help": "Of items and centroids drawn."})
    iterations: AtLeastOne = field(default=20, metadata={"help": "Of k-means on each level."})
    training_items: AtLeastOne = field(
        default=262_144,
        metadata={"help": "Items that the codebooks are learned from, drawn at random; they are in memory."},
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.earlier and Path(self.earlier).resolve() == Path(self.output).resolve():
            raise OptionError("--earlier and --output are one folder: write new ids into another.")


def make_ids(arguments: SemanticIdsArguments) -> dict[str, Any]:
    """Learn or take codebooks, encode all items, measure, write; what semantic_ids.json holds.

    Raises:
        ValueError: for embeddings or earlier ids that can't be relied on or don't belong together, or too few items.
    """
    inputs = (arguments.embeddings, arguments.earlier)
    with claimed([Output("--output", Path(arguments.output))], inputs), new_folder(Path(arguments.output)) as folder:
        catalogue = Catalogue.open(arguments.embeddings)
        column = VISUAL_EMBEDDING if arguments.visual else EMBEDDING
        earlier = None if arguments.earlier is None else SemanticIds.load(arguments.earlier)
        if earlier is not None:
            check_earlier(earlier, catalogue, column, arguments.earlier or "")
        item_ids = [item_id for batch in catalogue.batches(column) for item_id in batch.item_ids.to_pylist()]
        if not item_ids:
            raise ValueError(f"{arguments.embeddings}: no item has an image.")
        drawn = in_random_order(item_ids, arguments.seed)
        codebooks = earlier.codebooks if earlier else learn(arguments, catalogue, column, drawn)
        codes = np.concatenate([codebooks.encode(batch.vectors) for batch in catalogue.batches(column)])
        order = np.array(sorted(range(len(item_ids)), key=item_ids.__getitem__))
        codes, sorted_ids = codes[order], pa.array([item_ids[row] for row in order], pa.string())
        # From the other end of the random order: of a large catalogue, items that weren't trained on.
        quality = measure(codebooks, codes, vectors_at(catalogue, column, drawn[::-1][:POOL]))
        digits = with_digits(sorted_ids, codes, earlier)
        settings = settings_of(arguments, catalogue, column, earlier)
        counted = {"items": len(item_ids), "last_digits": int(digits[:, -1].max()) + 1}
        return SemanticIds({**settings, **counted, "quality": quality}, codebooks, sorted_ids, digits).save(folder)


def learn(arguments: SemanticIdsArguments, catalogue: Catalogue, column: str, drawn: np.ndarray) -> Codebooks:
    """Codebooks of the first items drawn."""
    vectors = vectors_at(catalogue, column, drawn[: arguments.training_items])
    return Codebooks.train(vectors, arguments.levels, arguments.codes, arguments.seed, arguments.iterations)


def settings_of(
    arguments: SemanticIdsArguments, catalogue: Catalogue, column: str, earlier: SemanticIds | None
) -> dict[str, Any]:
    """What the codebooks were made of: those of `earlier` of its own settings."""
    names = ("levels", "codes", "seed", "iterations", "training_items")
    made = {name: getattr(arguments, name) for name in names}
    job = catalogue.manifest["job"]
    return {
        **(made if earlier is None else {name: earlier.settings[name] for name in names}),
        "embedding": column,
        "width": catalogue.width,
        "model": job["model"],
        "dtype": job["settings"]["dtype"],
    }


def check_earlier(earlier: SemanticIds, catalogue: Catalogue, column: str, name: str) -> None:
    """Let codebooks encode vectors of their own model alone.

    Raises:
        ValueError: naming what differs.
    """
    if earlier.settings["embedding"] != column or earlier.settings["width"] != catalogue.width:
        raise ValueError(
            f"{name} has ids of {earlier.settings['embedding']}s of {earlier.settings['width']} dimensions, these are "
            f"{column}s of {catalogue.width}: leave out --earlier."
        )
    if changed := model_changes(earlier.settings["model"]["files"], catalogue.manifest["job"]["model"]["files"]):
        raise ValueError(
            f"{name} has ids by another model ({', '.join(changed)} differs): its codebooks say nothing of these vectors; "
            f"leave out --earlier."
        )


def in_random_order(item_ids: list[str], seed: int) -> np.ndarray:
    """Rows in an order that hangs on ids and seed alone, not on where the rows stand."""
    drawn = [(xxhash.xxh3_64_intdigest(item_id.encode(), seed), item_id) for item_id in item_ids]
    return np.array(sorted(range(len(drawn)), key=drawn.__getitem__))
