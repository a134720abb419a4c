"""What runs the mining expressions: DuckDB in this process, or Spark; and how each reads a log without losing a row.

Logs in text are read as text throughout: an id of digits stays what it is, and one odd value can't refuse a file.
"""

import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import duckdb
import ibis
from ibis import Table
from ibis.backends import BaseBackend

from training.mining.cooccurrence import LOG_COLUMNS, MiningArguments, MiningError
from training.mining.java import provide_java


CORRUPT = "_corrupt_record"
Keep = Callable[[Table], Table]
_names = count()


@dataclass(frozen=True)
class RawLog:
    """A log as it stands in its files.

    Attributes:
        rows: `LOG_COLUMNS`, of any type.
        broken: `line` and `reason` of the lines that are no row. (DuckDB gives a line that is no JSON as a row of nulls.)
    """

    rows: Table
    broken: Table | None = None


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
        preserve_insertion_order=False,  # keeping the log's order would cost memory; results are ordered at the end
    )
    backend.settings["enable_progress_bar"] = False  # there is one over all parts
    try:
        yield backend
    except duckdb.OutOfMemoryException as error:
        advice = "raise --memory_limit, lower --candidates_per_part, or give --temp_directory more room"
        raise MiningError(f"DuckDB: {error}; {advice}") from error
    except duckdb.Error as error:
        raise MiningError(f"DuckDB: {error}") from error
    finally:
        backend.disconnect()


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


def read_log(backend: BaseBackend, source: str, keep: Keep) -> RawLog:
    """Open a log.

    Args:
        source: a file, a glob, or a folder of Parquet files.
        keep: as `kept` does, for as long as the log is used.

    Raises:
        MiningError: when there is no such file, it is of another type, or it lacks a column.
    """
    folder = Path(source).is_dir()
    suffix = ".parquet" if folder else Path(source).suffix.lower()
    pattern = f"{source}/**/*.parquet" if folder else source
    if "://" not in source and not glob.glob(pattern, recursive=True):
        raise MiningError(f"{source}: no such file" + (", or no .parquet file in it." if folder else "."))
    if suffix == ".parquet":
        paths = pattern if backend.name == "duckdb" else source
        log = RawLog(backend.read_parquet(paths))
    elif suffix in (".csv", ".jsonl"):
        log = _READERS[backend.name, suffix](backend, source, keep)
    else:
        raise MiningError(f"{source}: a log is .parquet, .csv or .jsonl files, or a folder of Parquet files.")
    missing = [column for column in LOG_COLUMNS if column not in log.rows.columns]
    if missing:
        raise MiningError(f"{source}: no column {', '.join(missing)}; it has {', '.join(log.rows.columns)}.")
    return RawLog(log.rows.select(*LOG_COLUMNS), log.broken)


def _duckdb_csv(backend: BaseBackend, source: str, keep: Keep) -> RawLog:
    """Read once into a table: `reject_errors` fills while the file is read, and again with every reading."""
    dialect = {"delim": ",", "quote": '"', "escape": '"', "strict_mode": True}
    rows = keep(backend.read_csv(source, all_varchar=True, ignore_errors=True, store_rejects=True, **dialect))
    backend.raw_sql(
        "CREATE TEMP TABLE broken_lines AS SELECT MAX(csv_line) AS line, "
        "'not a row: ' || LOWER(MIN(CAST(error_type AS TEXT))) AS reason FROM reject_errors GROUP BY file_id, line"
    )
    return RawLog(rows, backend.table("broken_lines"))


def _duckdb_json(backend: BaseBackend, source: str, keep: Keep) -> RawLog:
    columns = dict.fromkeys(LOG_COLUMNS, "VARCHAR")
    return RawLog(keep(backend.read_json(source, columns=columns, format="newline_delimited", ignore_errors=True)))


def _spark_csv(backend: BaseBackend, source: str, keep: Keep) -> RawLog:
    columns = backend.read_csv(source, inferSchema=False).columns
    return _split(keep(backend.read_csv(source, inferSchema=False, schema=_text_schema(columns), escape='"')))


def _spark_json(backend: BaseBackend, source: str, keep: Keep) -> RawLog:
    return _split(keep(backend.read_json(source, schema=_text_schema(LOG_COLUMNS))))


_READERS = {
    ("duckdb", ".csv"): _duckdb_csv,
    ("duckdb", ".jsonl"): _duckdb_json,
    ("pyspark", ".csv"): _spark_csv,
    ("pyspark", ".jsonl"): _spark_json,
}


def _text_schema(columns: tuple[str, ...]) -> str:
    return ", ".join(f"`{column}` STRING" for column in (*columns, CORRUPT))


def _split(lines: Table) -> RawLog:
    """Spark's lines as rows, and those that it could not read."""
    broken = lines.filter(lines[CORRUPT].notnull()).select(line=CORRUPT, reason=ibis.literal("not a row"))
    return RawLog(lines.filter(lines[CORRUPT].isnull()).drop(CORRUPT), broken)
