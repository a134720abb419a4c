"""How the experiments write their tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from training.tables.commands.files import atomic_write
from training.tables.commands.outputs import marked


def write_rows(rows: Sequence[dict[str, Any]], features: datasets.Features, path: Path) -> None:
    """Write rows as a Parquet file that `datasets` reads with these features and that says who wrote it."""
    table = datasets.Dataset.from_list(list(rows), features=features).data.table
    with atomic_write(path) as place:
        pq.write_table(table.cast(marked(table.schema)), place)
