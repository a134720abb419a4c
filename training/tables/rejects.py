"""Rows that are left out: counted, listed with file, row, ids and reason, and never kept as more than numbers."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from training.tables.commands.files import atomic_write


if TYPE_CHECKING:
    from training.tables.reading import Table

AT_ONCE = 10_000


class TableError(ValueError):
    """A table that can't be used at all; the message says what it lacks."""


@dataclass(frozen=True)
class Reject:
    """A row, or a picture of it, that is left out.

    Attributes:
        table: what the user named.
        row: in its file, from 0 (in text files every line counts, empty ones too; a CSV's header does not).
        ids: of the row, as far as they can be read.
        file: of the table, or the split of a data set, that holds the row.
    """

    table: str
    row: int
    ids: list[str]
    reason: str
    file: str = ""


@dataclass(frozen=True)
class RejectedRows:
    """Rows of one table; ids and places are read when they are listed.

    Attributes:
        rows: (m,) int64 positions in the table, ascending.
        reason: the kind of reason; None: the table's own faults.
        details: (m,) what to add to it for each row; None: nothing.
        id_columns: which columns name the row.
    """

    table: "Table"
    rows: np.ndarray
    reason: str | None
    details: pa.Array | None = None
    id_columns: tuple[str, ...] = ()

    def between(self, start: int, stop: int) -> "RejectedRows":
        """Those at positions `start` to `stop`."""
        first, behind = np.searchsorted(self.rows, (start, stop)).tolist()
        details = None if self.details is None else self.details[first:behind]
        return RejectedRows(self.table, self.rows[first:behind], self.reason, details, self.id_columns)

    def reasons(self) -> Iterator[str]:
        """The reason of each row in full."""
        for start in range(0, len(self.rows), AT_ONCE):
            rows = self.rows[start : start + AT_ONCE]
            if self.reason is None:
                yield from self.table.faults(rows)
            elif self.details is None:
                yield from [self.reason] * len(rows)
            else:
                yield from (f"{self.reason}: {text}" for text in self.details[start : start + AT_ONCE].to_pylist())

    def __iter__(self) -> Iterator[Reject]:
        names = [name for name in self.id_columns if name in self.table.column_names]
        for row, reason in zip(self.rows.tolist(), self.reasons(), strict=True):
            file, number = self.table.place(row)
            ids = [text or "" for text in self.table.row(row, names).values()] if names else []
            yield Reject(self.table.source, number, ids, reason, file)


class Rejects:
    """All rows of a run that are left out. Kept as row numbers, so that millions of them fit into memory."""

    def __init__(self, *groups: RejectedRows):
        self.groups = [group for group in groups if len(group.rows)]

    def __iadd__(self, other: "Rejects") -> "Rejects":
        self.groups += other.groups
        return self

    def __len__(self) -> int:
        return sum(len(group.rows) for group in self.groups)

    def __iter__(self) -> Iterator[Reject]:
        return (reject for group in self.groups for reject in group)

    def first(self) -> Reject | None:
        """The first row of all, if there is one."""
        groups = sorted(self.groups, key=lambda group: int(group.rows[0]))
        return next(iter(groups[0])) if groups else None

    def between(self, start: int, stop: int) -> list[Reject]:
        """Those of rows `start` to `stop`, by row."""
        groups = [group.between(start, stop) for group in self.groups]
        numbered = [pair for group in groups for pair in zip(group.rows.tolist(), group, strict=True)]
        return [reject for _, reject in sorted(numbered, key=lambda pair: pair[0])]

    def counts(self) -> Counter[tuple[str, str]]:
        """Rows by source and kind of reason, which is what stands before its first colon."""
        counted: Counter[tuple[str, str]] = Counter()
        for group in self.groups:
            if group.reason is None:
                kinds = Counter(reason.split(": ")[0] for reason in group.reasons())
                counted.update({(group.table.source, kind): count for kind, count in kinds.items()})
            else:
                counted[group.table.source, group.reason] += len(group.rows)
        return counted


def write_rejects(rejects: Iterable[Reject], path: Path) -> None:
    """One JSON line for each reject, streamed; an empty file says that there was none."""
    with atomic_write(path) as place, place.open("w", encoding="utf-8") as stream:
        for reject in rejects:
            stream.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")
