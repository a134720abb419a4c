"""What runs the mining expressions: DuckDB in this process, or Spark; and how each reads the files of a log alike."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
from ibis import Table
from ibis.backends import BaseBackend
from ibis.expr.types import StringValue

from training.mining.cooccurrence import IDS, LOG_COLUMNS, MiningArguments, MiningError
from training.mining.java import provide_java
from training.mining.logs import BrokenRows, LogFiles, check_allowed, is_integer, open_log
from training.tables.texts import BLANKS


_names = count()


@dataclass(frozen=True)
class RawLog:
    """A log as it stands in its files.

    Attributes:
        rows: `LOG_COLUMNS`; ids are trimmed text, or integers where all files have such.
        broken: what is no row.
    """

    rows: Table
    broken: BrokenRows = field(default_factory=BrokenRows)


@contextmanager
def opened(arguments: MiningArguments, spill: Path) -> Iterator[BaseBackend]:
    """The engine that the arguments name. Spark is left running, for it may be the caller's.

    Args:
        spill: folder for what exceeds DuckDB's memory.

    Raises:
        MiningError: for what the engine raises within the block: an unreadable file, no memory or disk left.
    """
    if arguments.engine == "pyspark":
        from pyspark.errors import PySparkException  # only for those who ask for it

        try:
            yield _spark(arguments.spark_master)
        except PySparkException as error:
            raise MiningError(f"Spark: {error}") from error
        return
    backend = ibis.duckdb.connect(
        memory_limit=arguments.memory_limit,
        temp_directory=str(spill),
        autoinstall_known_extensions=False,  # nothing is fetched unasked
        preserve_insertion_order=False,  # keeping the log's order would cost memory; results are ordered at the end
    )
    backend.settings["enable_progress_bar"] = False  # there is one over all parts
    backend.settings["TimeZone"] = "UTC"
    try:
        yield backend
    except duckdb.OutOfMemoryException as error:
        advice = "raise --memory_limit, lower --candidates_per_part, or give --temp_directory more room"
        raise MiningError(f"DuckDB: {error}; {advice}") from error
    except duckdb.Error as error:
        raise MiningError(f"DuckDB: {error}") from error
    finally:
        backend.disconnect()


def engine_errors(backend: BaseBackend) -> tuple[type[Exception], ...]:
    """What the engine raises for a file that it can't read."""
    if backend.name == "pyspark":
        from pyspark.errors import PySparkException  # only for those who ask for it

        return (PySparkException,)
    return (duckdb.InvalidInputException, duckdb.IOException, duckdb.ConversionException, duckdb.SerializationException)


def _spark(master: str) -> BaseBackend:
    from pyspark.sql import SparkSession

    provide_java()
    builder = SparkSession.builder.appName("notellm2-mine").master(master).config("spark.ui.enabled", "false")
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return ibis.pyspark.connect(session)


@contextmanager
def kept(backend: BaseBackend, table: Table) -> Iterator[Table]:
    """The table's rows, computed once and held by the engine (which may spill them) until the block ends."""
    if backend.name == "pyspark":
        with table.cache() as held:
            yield held
        return
    # Not ibis' cache: with some releases of sqlglot it can't drop its tables.
    name = f"kept_{next(_names)}"
    yield backend.create_table(name, table, temp=True)
    backend.raw_sql(f"DROP TABLE {name}")


def read_log(
    backend: BaseBackend,
    source: str,
    folder: Path,
    encoding: str | None = None,
    comment: str | None = None,
    native: bool = True,
    allow_remote: str | None = None,
) -> RawLog:
    """Open a log; see `training.mining.logs.open_log`.

    Args:
        folder: for files that are brought to Parquet first; needed as long as the log is.

    Raises:
        MiningError: when there is no such file, it is of another type, or no file has a column.
    """
    if backend.name == "pyspark" and "://" in source and Path(source).suffix.lower() not in (".csv", ".jsonl"):
        check_allowed(source, allow_remote)
        return RawLog(_of_cluster(backend.read_parquet(source), source))
    groups, broken = open_log(source, folder, encoding, comment, native, allow_remote)
    integer_ids = [name for name in IDS if all(is_integer(group.types[name]) for group in groups)]
    same_times = len({str(group.types["timestamp"]) for group in groups}) == 1
    tables = []
    for group in groups:
        table = _parquet(backend, group)
        columns = {}
        for name in IDS:
            if name in integer_ids:
                columns[name] = table[name].cast("int64")
            else:
                text = table[name].cast("string")
                columns[name] = text if group.trimmed else _trimmed(backend, text)
        time = table["timestamp"] if same_times else table["timestamp"].cast("string")
        if time.type().is_string() and not group.trimmed:
            time = _trimmed(backend, time)
        tables.append(table.select(**columns, timestamp=time))
    return RawLog(ibis.union(*tables) if len(tables) > 1 else tables[0], broken)


def _parquet(backend: BaseBackend, files: LogFiles) -> Table:
    """`LOG_COLUMNS` of files of one schema; null where they lack one."""
    lacking = [name for name, kind in files.types.items() if pa.types.is_null(kind)]
    view = f"log_{next(_names)}"
    if backend.name == "pyspark":
        from pyspark.sql import SparkSession

        # Spark takes names for globs; ibis reads one of them only.
        paths = [re.sub(r"[][{}*?\\]", r"\\\g<0>", path) for path in files.paths]
        SparkSession.active().read.parquet(*paths).createOrReplaceTempView(view)
        table = backend.table(view)
    else:
        listed = ", ".join("'" + path.replace("'", "''") + "'" for path in files.paths)
        columns = [name for name in LOG_COLUMNS if name not in lacking]
        time = files.types["timestamp"]
        if pa.types.is_timestamp(time) and time.tz is not None:  # ibis doesn't know nanoseconds with a zone
            columns = [name if name in IDS else f"CAST({name} AS TIMESTAMPTZ) AS {name}" for name in columns]
        files_read = f"read_parquet([{listed}], hive_partitioning = false)"
        backend.raw_sql(f"CREATE TEMP VIEW {view} AS SELECT {', '.join(columns)} FROM {files_read}")
        table = backend.table(view)
    return table.mutate(**{name: ibis.null("string") for name in lacking}).select(*LOG_COLUMNS)


def _of_cluster(table: Table, source: str) -> Table:
    """A log that only the cluster's machines see.

    Raises:
        MiningError: for a column that is missing, or ids that are neither text nor integers.
    """
    missing = [name for name in LOG_COLUMNS if name not in table.columns]
    if missing:
        raise MiningError(f"{source}: no column {', '.join(missing)}; it has {', '.join(table.columns)}.")
    for name in IDS:
        if not (table[name].type().is_string() or table[name].type().is_integer()):
            raise MiningError(f"{source}: {name} is {table[name].type()}; write ids as text or integers.")
    return table.select(*LOG_COLUMNS)


@ibis.udf.scalar.builtin(name="trim")
def _duckdb_trim(text: str, characters: str) -> str:  # type: ignore[empty-body]
    """Without some characters at both ends."""


@ibis.udf.scalar.builtin(name="btrim")
def _spark_trim(text: str, characters: str) -> str:  # type: ignore[empty-body]
    """The same on Spark."""


@ibis.udf.scalar.builtin(name="is_valid_utf8")
def _spark_is_text(text: str) -> bool:  # type: ignore[empty-body]
    """Whether the bytes are UTF-8; DuckDB refuses the file where they aren't."""


def _trimmed(backend: BaseBackend, text: StringValue) -> StringValue:
    """Text without the blanks around it, of every kind that an id's rule knows; null for what is no text."""
    if backend.name == "pyspark":
        return _spark_trim(ibis.ifelse(_spark_is_text(text), text, None), BLANKS)
    return _duckdb_trim(text, BLANKS)
