"""Related items from behaviour: the co-occurrence score of NoteLLM (arXiv 2403.01744, section 4.3) as ibis expressions.

Every function takes and gives ibis tables, so that DuckDB and Spark run the same definition. It is this:

- An interaction is a user, an item and a time in whole milliseconds. How often it stands in the log changes nothing.
- User u consumed A and then B if some interaction of u with B is strictly later than one with A, by at most the window;
  A and B differ. Equal times are no "then". With sessions, both interactions lie in one session.
- s(A→B) is the sum over these users of 1/N_u, each user once however often A and B are repeated. N_u is the number of
  different items that u consumed in the whole log, or in one side of it where it is split by time.
- Symmetric: "within the window of each other", in either order or at the same time, so that s(A→B) = s(B→A).

1/N_u is rounded down to a multiple of 2^-40 (an error below 1e-12 for each user). Sums of such numbers are exact in any
order, so that every engine and every number of threads gives the same scores, and ties break alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated

import ibis
from ibis import Table
from ibis.expr.types import BooleanValue, Column, FloatingValue, IntegerValue

from training.tables.commands.bounds import MANY, AtLeastOne, Bounds, NotNegative, check_bounds
from training.tables.commands.options import allow_remote_option


IDS = ("user_id", "item_id")
LOG_COLUMNS = (*IDS, "timestamp")
UNIT = 1 << 40
"""Scores are summed as integers in units of 1 / UNIT."""

MILLISECONDS = {"s": 1000, "ms": 1, "us": 0.001}
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
MOMENT = (
    r"^[0-9]{4}([-/])[0-9]{2}[-/][0-9]{2}"
    r"([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]+)?)?"
    r"( ?(Z|UTC|GMT)|[+-](0[0-9]|1[0-4])(:?[0-5][0-9])?)?)?$"
)
"""ISO 8601, with a blank or a T before the time, and slashes in the date."""
ZONE_WORD = r" ?(Z|UTC|GMT)$"
FIRST_TIME, LAST_TIME = -62_135_596_800_000, 253_402_300_799_999
"""The years 1 to 9999. A time outside is a misread unit."""


class MiningError(ValueError):
    """A log or an option that can't be used; the message says what to change."""


@dataclass
class MiningArguments:
    """Which log, which pairs of it, and what runs the query."""

    interactions: str = field(
        metadata={
            "help": "The log, with columns user_id, item_id, timestamp: a .parquet, .csv or .jsonl file, a folder of such, "
            "a glob in quotes, or a URL."
        }
    )
    output: str = field(metadata={"help": "Parquet file for the pairs: query_id, target_id, score, users."})
    split_time: str | None = field(
        default=None,
        metadata={
            "help": "Mine what happened before this time into --output and the rest into --test_output, each on its own: "
            "a number in --timestamp_unit, or ISO 8601 (UTC where it names no zone)."
        },
    )
    test_output: str | None = field(default=None, metadata={"help": "Parquet file for the pairs from split_time on."})
    timestamp_unit: str = field(
        default="s", metadata={"help": "Unit of timestamps that are numbers, since 1970: s, ms or us."}
    )
    window_days: Annotated[float, Bounds(0, 3_652_059)] = field(
        default=7.0, metadata={"help": "B counts at most this many days after A."}
    )
    session_gap_minutes: Annotated[float, Bounds(0)] | None = field(
        default=None,
        metadata={"help": "A pause longer than this ends a session, and pairs don't reach across; none: no sessions."},
    )
    symmetric: bool = field(default=False, metadata={"help": "Count A and B within the window in either order."})
    min_users: AtLeastOne = field(default=1, metadata={"help": "Drop pairs of fewer users."})
    lower_score: Annotated[float, Bounds(0)] = field(
        default=0.0, metadata={"help": "Drop pairs with a lower score: accidents."}
    )
    upper_score: Annotated[float, Bounds(0)] = field(
        default=math.inf, metadata={"help": "Drop pairs with a higher score: outliers."}
    )
    top_targets: NotNegative = field(
        default=10, metadata={"help": "Keep this many of the best targets of each item (ties: the lower id); 0: all."}
    )
    popularity_cap: Annotated[float, Bounds(1e-9, 1)] = field(
        default=1.0,
        metadata={"help": "Items of more than this share of the users form no pairs; N_u still counts them."},
    )
    max_items_per_user: Annotated[int, Bounds(2, MANY)] = field(
        default=1000,
        metadata={"help": "Users of more different items are taken for robots: as if they were not in the log."},
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "Of .csv and .jsonl files without a byte-order mark, e.g. gb18030; none: UTF-8."},
    )
    comment: str | None = field(
        default=None, metadata={"help": "What comment lines above the header of .csv files begin with, e.g. '#'."}
    )
    allow_remote: str | None = allow_remote_option()
    candidates_per_part: AtLeastOne = field(
        default=40_000_000,
        metadata={
            "help": "About this many pairs of interactions are compared at once, unless a single item has more: bounds "
            "memory and spilling (40 million: some 3 GB)."
        },
    )
    engine: str = field(
        default="duckdb", metadata={"help": "duckdb, or pyspark for logs beyond one machine (Java 17)."}
    )
    memory_limit: str = field(default="5GB", metadata={"help": "DuckDB's memory; beyond it goes to temp_directory."})
    temp_directory: str | None = field(
        default=None, metadata={"help": "Where DuckDB spills to; none: beside the output."}
    )
    spark_master: str = field(default="local[*]", metadata={"help": "Spark's master, where no session runs yet."})

    def __post_init__(self) -> None:
        check_bounds(self)
        if (self.split_time is None) != (self.test_output is None):
            raise MiningError("--split_time and --test_output belong together: give both or neither.")
        if self.timestamp_unit not in MILLISECONDS:
            raise MiningError(f"--timestamp_unit is {self.timestamp_unit!r}; expected s, ms or us.")
        if self.engine not in ("duckdb", "pyspark"):
            raise MiningError(f"--engine is {self.engine!r}; expected duckdb or pyspark.")
        if not 0 < self.window_ms <= LAST_TIME or (self.session_gap_ms is not None and self.session_gap_ms <= 0):
            raise MiningError("--window_days and --session_gap_minutes must be at least a millisecond.")
        if self.lower_score > self.upper_score:
            raise MiningError(f"--lower_score {self.lower_score} is above --upper_score {self.upper_score}.")

    def most_users(self, users: int) -> int:
        """Users of an item at the popularity cap, exactly: 29 of 100 for 0.29, which as a float is a little less."""
        return math.floor(Fraction(str(self.popularity_cap)) * users)

    @property
    def window_ms(self) -> int:
        """The window in whole milliseconds."""
        return round(self.window_days * 86_400_000)

    @property
    def session_gap_ms(self) -> int | None:
        """The longest pause within a session, in whole milliseconds."""
        return None if self.session_gap_minutes is None else round(self.session_gap_minutes * 60_000)


def check_rows(log: Table, timestamp_unit: str) -> Table:
    """Every row of a raw log with its time, or with the reason why it can't be used.

    Args:
        log: `LOG_COLUMNS`, texts without blanks around them; ids are text or integers, a timestamp is a number, text (a
            number or ISO 8601), or a time.

    Returns:
        `LOG_COLUMNS` as they were, time (int64 milliseconds since 1970, UTC), reason (null for a usable row).
    """
    rows = log.mutate(time=_milliseconds(log.timestamp, timestamp_unit))
    lacks = [
        rows[name].isnull() | (rows[name] == "") if rows[name].type().is_string() else rows[name].isnull()
        for name in LOG_COLUMNS
    ]
    reason = ibis.cases(
        (lacks[0] & lacks[1] & lacks[2], "no readable row"),
        *((lack, f"{name} is missing") for lack, name in zip(lacks, LOG_COLUMNS, strict=True)),
        (rows.time.isnull(), "timestamp is unreadable"),
        else_=None,
    )
    return rows.mutate(reason=reason)


def number_values(table: Table, column: str, name: str) -> Table:
    """The distinct values of a column with their place (int32, from 0) in ascending order of their text.

    Spark does the numbering in one task: a sort of the distinct values, not of the log.

    Returns:
        column, `name` (the place), text.
    """
    distinct = table.select(column).distinct()
    distinct = distinct.mutate(text=distinct[column].cast("string"))
    return distinct.mutate(ibis.row_number().over(order_by=distinct.text).cast("int32").name(name))


def items_per_user(log: Table) -> Table:
    """N_u: `user` and `items`, the number of different items that it consumed."""
    return log.select("user", "item").distinct().group_by("user").agg(items=lambda t: t.count().cast("int32"))


def users_per_item(log: Table) -> Table:
    """Popularity: `item` and `users`, the number of different users that consumed it."""
    return log.select("user", "item").distinct().group_by("item").agg(users=lambda t: t.count().cast("int32"))


def make_events(log: Table, users: Table, items: Table, arguments: MiningArguments) -> Table:
    """Interactions that can form pairs.

    Args:
        log: user, item, time.
        users: user and items (N_u) of those that count.
        items: item of those that may form pairs.

    Returns:
        user, item, time, items (N_u), bucket (time in windows), and session where there are sessions.
    """
    events = log.join(users, "user").select("user", "item", "time", "items")
    if arguments.session_gap_ms is not None:
        order = {"group_by": events.user, "order_by": events.time}
        pause = events.time - events.time.lag().over(**order)
        events = events.mutate(starts=(pause > arguments.session_gap_ms).fill_null(False).cast("int32"))
        # RANGE up to the current row: interactions of one time get one session in whatever order they come.
        session = events.starts.sum().over(group_by=events.user, order_by=events.time, range=(None, 0))
        events = events.mutate(session=session.cast("int32")).drop("starts")
    events = events.filter(events.items > 1).semi_join(items, "item")
    return events.mutate(bucket=(events.time // arguments.window_ms).cast("int64"))


def plan_parts(events: Table, arguments: MiningArguments) -> Table:
    """Ranges of query items that are mined one after another: part, first, last (items, inclusive), candidates.

    `candidates` estimates the comparisons: a user's interactions in the bucket of each, for every bucket in reach. Ranges
    follow the items' order, so that the parts' results, one after another, are in order too.
    """
    density = events.group_by("user", "bucket").agg(near=lambda t: t.count())
    cost = events.join(density, ["user", "bucket"]).group_by("item").agg(cost=lambda t: t.near.sum())
    cost = cost.mutate(cost=(cost.cost * len(_reach(arguments))).cast("int64"))
    until = cost.cost.sum().over(order_by=cost.item, rows=(None, 0)) - cost.cost
    parts = cost.mutate(part=(until // arguments.candidates_per_part).cast("int64"))
    parts = parts.group_by("part").agg(
        first=lambda t: t.item.min(), last=lambda t: t.item.max(), candidates=lambda t: t.cost.sum()
    )
    return parts.order_by("part")


def cooccurrences(queries: Table, events: Table, arguments: MiningArguments) -> Table:
    """Scores of all pairs whose query item is in `queries`.

    A pair within the window lies in one bucket or in two neighbours, so the join compares interactions of one user and of
    buckets that touch, not a user's whole history with itself.

    Args:
        queries: the events of some items, all of them for each.
        events: as `make_events` gives them.

    Returns:
        query, target (item numbers), score (float64), users (int64).
    """
    reach = ibis.array(_reach(arguments)).unnest()
    first = queries.mutate(offset=reach)
    first = first.mutate(bucket=(first.bucket + first.offset).cast("int64"))
    then = events.view()
    window = arguments.window_ms
    starts = then.time >= first.time - window if arguments.symmetric else then.time > first.time
    conditions = [
        first.user == then.user,
        first.bucket == then.bucket,
        starts,
        then.time <= first.time + window,
        first.item != then.item,
    ]
    if arguments.session_gap_ms is not None:
        conditions.append(first.session == then.session)
    pairs = first.join(then, conditions).select(
        user=first.user, items=first["items"], query=first.item, target=then.item
    )
    pairs = pairs.distinct()
    pairs = pairs.group_by("query", "target").agg(
        units=lambda t: (ibis.literal(UNIT) // t["items"]).cast("int64").sum(), users=lambda t: t.count()
    )
    # Cast first: to Spark a literal with a point is a decimal, and decimal division rounds.
    score = pairs.units.cast("float64") / ibis.literal(UNIT, "int64")
    return pairs.select("query", "target", score=score, users=pairs.users.cast("int64"))


def make_filters(arguments: MiningArguments) -> dict[str, Callable[[Table], BooleanValue]]:
    """The conditions on pairs that are set, in the order in which they are applied and counted."""
    filters: dict[str, Callable[[Table], BooleanValue]] = {}
    if arguments.min_users > 1:
        filters[f"of at least {arguments.min_users} users"] = lambda t: t.users >= arguments.min_users
    if arguments.lower_score > 0:
        filters[f"of score {arguments.lower_score:g} or more"] = lambda t: t.score >= arguments.lower_score
    if arguments.upper_score < math.inf:
        filters[f"of score {arguments.upper_score:g} or less"] = lambda t: t.score <= arguments.upper_score
    return filters


def count_filtered(pairs: Table, arguments: MiningArguments) -> Table:
    """One row: the number of pairs, then the number left after each filter (`left_0`, `left_1`, ...), in order."""
    left: BooleanValue = ibis.literal(True)
    counts = {}
    for number, condition in enumerate(make_filters(arguments).values()):
        left = left & condition(pairs)
        counts[f"left_{number}"] = left.cast("int64").sum().fill_null(0)
    return pairs.aggregate(candidates=pairs.count(), **counts)


def best_targets(pairs: Table, items: Table, arguments: MiningArguments) -> Table:
    """The pairs that pass every filter and are among the best of their query, with ids, in the order of the output.

    Args:
        pairs: as `cooccurrences` gives them.
        items: item (number) and text (its id).

    Returns:
        query_id, target_id, score, users; ordered by query_id, then from the highest score, then target_id.
    """
    for condition in make_filters(arguments).values():
        pairs = pairs.filter(condition(pairs))
    if arguments.top_targets:
        order = [pairs.score.desc(), pairs.target.asc()]
        pairs = pairs.mutate(rank=ibis.row_number().over(group_by=pairs["query"], order_by=order))
        pairs = pairs.filter(pairs["rank"] < arguments.top_targets).drop("rank")
    names = items.select(query="item", query_id="text")
    pairs = pairs.join(names, "query").join(items.view().select(target="item", target_id="text"), "target")
    pairs = pairs.order_by("query", ibis.desc("score"), "target")
    return pairs.select("query_id", "target_id", "score", "users")


def _reach(arguments: MiningArguments) -> list[int]:
    """Where the partner's bucket may lie, from a query's own."""
    return [-1, 0, 1] if arguments.symmetric else [0, 1]


def _milliseconds(timestamp: Column, unit: str) -> IntegerValue:
    """Milliseconds since 1970 (UTC), null where they can't be read."""
    kind = timestamp.type()
    if kind.is_numeric():
        return _from_number(timestamp.cast("float64"), unit)
    if kind.is_timestamp() or kind.is_date():
        return _from_moment(timestamp)
    text = timestamp.cast("string")
    # Each engine reads words, hours alone and more of its own as times: all but numbers and ISO 8601 is kept from them.
    number = ibis.ifelse(text.re_search(NUMBER), text, None).try_cast("float64")
    moment = ibis.ifelse(text.re_search(MOMENT), text, None)
    moment = moment.replace("/", "-").re_replace(ZONE_WORD, "Z")
    to_minutes = moment.left(16)  # Spark wants seconds before an offset
    without_seconds = (moment.length() >= 16) & (moment.substr(16, 1) != ":")
    moment = ibis.ifelse(without_seconds, to_minutes + ":00" + moment.substr(16), moment)
    return ibis.coalesce(_from_number(number, unit), _from_moment(moment.try_cast("timestamp('UTC')")))


def _from_number(value: FloatingValue, unit: str) -> IntegerValue:
    milliseconds = value * MILLISECONDS[unit]
    known = milliseconds.between(
        float(FIRST_TIME), float(LAST_TIME)
    )  # false for NaN and infinity, which have no integer
    return ibis.ifelse(known & ~_is_date(value), milliseconds, None).round().cast("int64")


def _is_date(value: FloatingValue) -> BooleanValue:
    """Whether a number is a date as digits, 20240701, or one with hours and minutes, or seconds too, behind it.

    As a count since 1970 such a number would be a time that nobody meant.
    """
    dates = []
    for digits in (1, 10**4, 10**6):
        date = (value / digits).floor()
        month, day = (date / 100).floor() % 100, date % 100
        dates.append(date.between(19000101, 21001231) & month.between(1, 12) & day.between(1, 31))
    return (value == value.floor()) & (dates[0] | dates[1] | dates[2])


def _from_moment(value: Column) -> IntegerValue:
    moment = value.cast("timestamp")
    known = moment.between(ibis.timestamp("0001-01-01"), ibis.timestamp("9999-12-31T23:59:59"))
    epoch = ibis.timestamp("1970-01-01")
    # Cut first: before 1970 the engines round a difference in opposite directions.
    return ibis.ifelse(known, moment, None).truncate("ms").delta(epoch, unit="millisecond")
