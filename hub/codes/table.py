"""The table of an id's codes: those of the codebooks, and a last digit that tells items of the same codes apart."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hub.catalogue.shards import write_parquet
from hub.codes.codebooks import Codebooks
from training.tables.commands.files import write_json
from training.tables.commands.handler import about
from training.tables.commands.hashes import changes, file_xxh3
from training.tables.commands.outputs import GENERATOR


CODES_FILE, CODEBOOKS_FILE, RECORD = "codes.parquet", "codebooks.safetensors", "semantic_ids.json"
HASHED = (CODES_FILE, CODEBOOKS_FILE)


@dataclass(frozen=True)
class SemanticIds:
    """A folder of hub/semantic_ids.py; made by `load`.

    Attributes:
        settings: what semantic_ids.json holds.
        codebooks: those of the ids.
        item_ids: n strings, sorted.
        codes: `(n, levels + 1)` int32; the last one is the digit.
    """

    settings: dict[str, Any]
    codebooks: Codebooks
    item_ids: pa.Array
    codes: np.ndarray

    @classmethod
    def load(cls, folder: str | Path) -> "SemanticIds":
        """Read a folder whose files belong together.

        Raises:
            ValueError: when it is none, or a file of it has changed.
        """
        folder = Path(folder)
        missing = [name for name in (RECORD, *HASHED) if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder}: {', '.join(missing)} is missing; pass a folder that hub/semantic_ids.py wrote."
            )
        with about(folder, "A file in it was edited or damaged: write it again."):
            settings = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if changed := changes(settings["hashes"], folder):
                raise ValueError(" and ".join(changed))
            table = pq.read_table(folder / CODES_FILE)
            codes = table.column("codes").combine_chunks()
            wide = codes.flatten().to_numpy().reshape(len(table), codes.type.list_size)
        return cls(settings, Codebooks.load(folder / CODEBOOKS_FILE), table.column("item_id").combine_chunks(), wide)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write into an empty folder; what semantic_ids.json holds."""
        flat = pa.array(self.codes.reshape(-1), pa.int32())
        codes = pa.FixedSizeListArray.from_arrays(flat, self.codes.shape[1])
        write_parquet(pa.table({"item_id": self.item_ids, "codes": codes}), folder / CODES_FILE)
        self.codebooks.save(folder / CODEBOOKS_FILE)
        record = {**GENERATOR, **self.settings, "hashes": {name: file_xxh3(folder / name) for name in HASHED}}
        write_json(record, folder / RECORD)
        return record


def with_digits(item_ids: pa.Array, codes: np.ndarray, earlier: SemanticIds | None = None) -> np.ndarray:
    """Codes with a last digit that no other item of the same codes has: `(n, levels + 1)` int32.

    Digits count from 0 in the order of the rows. An item whose codes are as in `earlier` keeps its digit, and no digit of
    `earlier` goes to another item, gone ones included: a recommender may have learned it.

    Args:
        item_ids: n strings.
        codes: `(n, levels)`.
        earlier: ids by the same codebooks.
    """
    digits = np.full(len(codes), -1, np.int64)
    before = np.zeros((0, codes.shape[1] + 1), codes.dtype) if earlier is None else earlier.codes
    if earlier is not None:
        rows = pc.index_in(item_ids, value_set=earlier.item_ids)
        known = np.flatnonzero(pc.is_valid(rows).to_numpy(zero_copy_only=False))
        were = before[rows.take(pa.array(known)).to_numpy()]
        unchanged = (were[:, :-1] == codes[known]).all(axis=1)
        digits[known[unchanged]] = were[unchanged, -1]
    _, groups = np.unique(np.concatenate([before[:, :-1], codes]), axis=0, return_inverse=True)
    groups = groups.reshape(-1)
    first_free = np.zeros(groups.max() + 1, np.int64)
    np.maximum.at(first_free, groups[: len(before)], before[:, -1] + 1)
    new = np.flatnonzero(digits < 0)
    of_new = groups[len(before) :][new]
    order = np.argsort(of_new, kind="stable")
    starts = np.searchsorted(of_new[order], of_new[order])
    digits[new[order]] = first_free[of_new[order]] + np.arange(len(new)) - starts
    return np.column_stack([codes, digits]).astype(np.int32)
