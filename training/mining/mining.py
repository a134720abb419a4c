"""The mining of a log: the rows that can be used, the pairs of either side of a split time, and the rejects.

The query items are mined in parts, each finished before the next, so that memory is bounded by a part and not by the log.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from ibis import Table
from ibis.backends import BaseBackend
from tqdm.auto import tqdm

from training.mining.cooccurrence import (
    LAST_TIME,
    LOG_COLUMNS,
    MILLISECONDS,
    MiningArguments,
    MiningError,
    best_targets,
    check_rows,
    cooccurrences,
    count_filtered,
    items_per_user,
    make_events,
    make_filters,
    number_values,
    plan_parts,
    users_per_item,
)
from training.mining.engines import engine_errors, kept, opened, read_log
from training.mining.logs import REJECTS_LISTED, BrokenRows
from training.tables.commands.files import atomic_write, atomic_writes, scratch_folder
from training.tables.commands.outputs import Output, claimed, marked


PAIR_SCHEMA = pa.schema(
    [("query_id", pa.string()), ("target_id", pa.string()), ("score", pa.float64()), ("users", pa.int64())]
)


@dataclass(frozen=True)
class Mined:
    """What was counted on the way.

    Attributes:
        rejected: reason to number of rows of the log that were left out.
        sides: "all", or "train" and "test", to what was counted there, in order.
    """

    rejected: dict[str, int]
    sides: dict[str, dict[str, int]]


def mine(arguments: MiningArguments) -> Mined:
    """The whole job: reads the log, writes pair tables and rejects.

    Raises:
        MiningError: for a log that can't be used, or when no pair is left.
        OptionError, FileError: for outputs that can't be written to.
    """
    output = Path(arguments.output)
    places = [Output("--output", output), Output("--output", rejects_of(output))]
    if arguments.test_output:
        places.append(Output("--test_output", Path(arguments.test_output)))
    with (
        claimed(places, [arguments.interactions]),
        scratch_folder(Path(arguments.temp_directory or output.parent), "mine") as folder,
        opened(arguments, folder) as backend,
    ):
        return mine_log(backend, arguments, folder)


def mine_log(backend: BaseBackend, arguments: MiningArguments, folder: Path) -> Mined:
    """Read the log and write what belongs together: pair tables and rejects. Without pairs, the rejects alone are written.

    Args:
        folder: for what is needed meanwhile.
    """
    output, listed = Path(arguments.output), folder / "rejects.jsonl"
    with ExitStack() as stack:

        def keep(table: Table) -> Table:
            return stack.enter_context(kept(backend, table))

        try:
            rejected, usable = read_usable(backend, arguments, folder, listed, keep)
            sides = sides_of(usable, arguments)
            with atomic_writes(rejects_of(output), *(path for _, path in sides.values())) as (rejects, *places):
                logs = zip(sides, [log for log, _ in sides.values()], places, strict=True)
                counts = {name: mine_side(backend, log, arguments, place, name) for name, log, place in logs}
                shutil.copyfile(listed, rejects)
        except MiningError:
            if listed.exists():
                with atomic_write(rejects_of(output)) as rejects:
                    shutil.copyfile(listed, rejects)
            raise
    return Mined(rejected, counts)


def sides_of(usable: Table, arguments: MiningArguments) -> dict[str, tuple[Table, Path]]:
    """The log as it is mined, in whole or on either side of --split_time: name to rows and the pairs' place."""
    if arguments.split_time is None or arguments.test_output is None:
        return {"all": (usable, Path(arguments.output))}
    split = parse_time(arguments.split_time, arguments.timestamp_unit)
    return {
        "train": (usable.filter(usable.time < split), Path(arguments.output)),
        "test": (usable.filter(usable.time >= split), Path(arguments.test_output)),
    }


def read_usable(
    backend: BaseBackend, arguments: MiningArguments, folder: Path, rejects: Path, keep: Callable[[Table], Table]
) -> tuple[dict[str, int], Table]:
    """The usable rows of the log, kept (user_id, item_id, time), and the others counted by reason and listed.

    Where the engine stumbles over a file (a damaged page, bytes that aren't UTF-8), all is read anew, carefully.
    """
    for native in (True, False):
        try:
            raw = read_log(
                backend,
                arguments.interactions,
                folder,
                arguments.encoding,
                arguments.comment,
                native,
                arguments.allow_remote,
            )
            rows = check_rows(raw.rows, arguments.timestamp_unit)
            rejected = write_rejects(raw.broken, keep(rows.filter(rows.reason.notnull())), rejects)
            usable = keep(rows.filter(rows.reason.isnull()).select("user_id", "item_id", "time"))
            break
        except engine_errors(backend):
            if not native:
                raise
    if not _count(usable):
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in rejected.items())
        place = rejects_of(Path(arguments.output))
        raise MiningError(f"No row of the log is usable: {reasons or 'it is empty'}. See {place}.")
    return rejected, usable


def mine_side(backend: BaseBackend, log: Table, arguments: MiningArguments, output: Path, name: str) -> dict[str, int]:
    """Mine one log, or one side of it, into a Parquet file at `output`.

    Args:
        log: user_id, item_id, time.

    Raises:
        MiningError: when no pair is left.
    """
    with ExitStack() as stack:
        item_ids = stack.enter_context(kept(backend, number_values(log, "item_id", "item")))
        events, counts = stack.enter_context(prepared(backend, log, item_ids, arguments, name))
        parts = plan_parts(events, arguments).execute().to_dict("records")
        labels = ["pairs", *(f"  {label}" for label in make_filters(arguments))]
        best = f"  among the {arguments.top_targets} best of the query" if arguments.top_targets else "  written"
        counts |= dict.fromkeys([*labels, best], 0)
        writer = stack.enter_context(pq.ParquetWriter(output, marked(PAIR_SCHEMA)))
        total = sum(part["candidates"] for part in parts)
        bar = stack.enter_context(tqdm(total=total, desc=f"Mining ({name})", unit="candidate", unit_scale=True))
        for part in parts:
            queries = events.filter(events["item"].between(int(part["first"]), int(part["last"])))
            with kept(backend, cooccurrences(queries, events, arguments)) as pairs:
                left = count_filtered(pairs, arguments).execute().iloc[0].tolist()
                table = best_targets(pairs, item_ids, arguments).to_pyarrow()
            writer.write_table(table.cast(PAIR_SCHEMA))
            for label, count in zip([*labels, best], [*left, len(table)], strict=True):
                counts[label] += int(count)
            bar.update(int(part["candidates"]))
        if not counts[best]:
            listed = "; ".join(f"{label.strip()} {count:,}" for label, count in counts.items())
            raise MiningError(f"{arguments.interactions} ({name}): no pair is left. Counted: {listed}.")
    return counts


@contextmanager
def prepared(
    backend: BaseBackend, log: Table, item_ids: Table, arguments: MiningArguments, name: str
) -> Iterator[tuple[Table, dict[str, int]]]:
    """The interactions that can form pairs, and the counts of what they came from."""
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=5, desc=f"Reading ({name})", unit="table"))

        def step(table: Table) -> Table:
            bar.update()
            return stack.enter_context(kept(backend, table))

        numbered = log.join(number_values(log, "user_id", "user"), "user_id").join(item_ids, "item_id")
        numbered = step(numbered.select("user", "item", "time"))
        all_users = step(items_per_user(numbered))
        users = all_users.filter(all_users["items"] <= arguments.max_items_per_user)
        popularity = step(users_per_item(numbered.semi_join(users, "user")))
        items = popularity.filter(popularity.users <= arguments.most_users(_count(users)))
        counts = {
            "interactions": _count(numbered),
            "users": _count(all_users),
            "  taken for robots": _count(all_users) - _count(users),
            "items": _count(item_ids),
            "  over the popularity cap": _count(popularity) - _count(items),
        }
        bar.update()
        with kept(backend, make_events(numbered, users, items, arguments)) as events:
            bar.update()
            stack.close()  # only the events stay
            yield events, counts | {"interactions that can form pairs": _count(events)}


def write_rejects(broken: BrokenRows, rejects: Table, path: Path) -> dict[str, int]:
    """Count the rows that can't be used by reason, and list them, one JSON line for each.

    Args:
        broken: what is no row.
        rejects: rows with the reason; of either kind, the first `REJECTS_LISTED` are listed.
    """
    ids = {name: rejects[name].cast("string") for name in LOG_COLUMNS}
    rejects = rejects.select(**ids, reason=rejects.reason).order_by("reason", *LOG_COLUMNS)
    by_reason = rejects.group_by("reason").agg(rows=rejects.count()).order_by("reason").execute()
    counts = dict(sorted(broken.counts.items()))
    counts |= {reason: int(count) for reason, count in by_reason.itertuples(index=False)}
    with path.open("w", encoding="utf-8") as stream:
        for row in (*broken.listed, *rejects.limit(REJECTS_LISTED).to_pyarrow().to_pylist()):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return counts


def rejects_of(output: Path) -> Path:
    """Where the rows are listed that were left out."""
    return output.with_suffix(".rejects.jsonl")


def parse_time(text: str, unit: str) -> int:
    """Milliseconds since 1970 of a number in `unit`, or of an ISO 8601 time, in UTC where it names no zone.

    Raises:
        MiningError: when it is neither, or beyond the year 9999.
    """
    try:
        milliseconds = float(text) * MILLISECONDS[unit]
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError as error:
            raise MiningError(f"--split_time is {text!r}; expected a number or ISO 8601 (2024-05-31T12:00).") from error
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        milliseconds = moment.timestamp() * 1000
    if not abs(milliseconds) <= LAST_TIME:
        raise MiningError(f"--split_time {text} lies beyond the year 9999: is it in another --timestamp_unit?")
    return round(milliseconds)


def _count(table: Table) -> int:
    return int(table.count().execute())
