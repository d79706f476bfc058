"""DuckDB for looking: connections that are bounded and reach nothing but tables, and names and texts as SQL."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow.errors import DataError, NoSpace

if TYPE_CHECKING:
    import duckdb

MEMORY = "2GB"  # of DuckDB; what does not fit is spilled to the scratch folder
THREADS = 2
NUMBER = r"[\w.-]+-\d{8}\b|[-+]?\d+([.,]\d+)*(e[-+]?\d+)?"  # or the key of a sample
_SHELL: dict[str, Any] = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}


def attach(paths: Mapping[str, Path]) -> duckdb.DuckDBPyConnection:
    """A connection with the rows of tables as read-only views of the names given; it reaches nothing but their files.

    Raises:
        DataError: a file cannot be read.
    """
    import duckdb

    con = duckdb.connect(":memory:", config=limits(next(iter(paths.values())).parent))
    try:
        for path in dict.fromkeys(paths.values()):  # a file cannot be attached twice
            con.execute(f"ATTACH {literal(str(path))} AS {quoted(path.name)} (READ_ONLY)")
        for name, path in paths.items():
            con.execute(f"CREATE VIEW {quoted(name)} AS SELECT * FROM {quoted(path.name)}.main.rows")
        con.execute("SET enable_external_access = false")
        con.execute("SET lock_configuration = true")
    except duckdb.Error as error:
        con.close()
        raise DataError(
            f"{', '.join(map(str, paths.values()))} cannot be read ({error}); it is only a cache: delete it and run the command again"
        ) from error
    return con


def quoted(name: str) -> str:
    """A name as an SQL identifier, whatever it holds."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as an SQL literal, whatever it holds."""
    return "'" + text.replace("'", "''") + "'"


def kind_sql(expression: str) -> str:
    """SQL that gives reasons which differ in numbers or keys one name: `perplexity 8.1 is beyond ...` -> `perplexity # is ...`."""
    return f"regexp_replace({expression}, '{NUMBER}', '#', 'g')"


def limits(folder: Path) -> dict[str, Any]:
    """DuckDB's settings: memory and threads bounded, what does not fit is spilled into `folder`, nothing is downloaded."""
    return {
        **_SHELL,
        "memory_limit": MEMORY,
        "threads": min(THREADS, os.cpu_count() or 1),
        "temp_directory": str(folder / f".spill-{secrets.token_hex(8)}"),  # its own: other processes spill too
    }


@contextmanager
def answering(folder: Path) -> Iterator[None]:
    """Say what DuckDB could not do inside the context.

    Raises:
        NoSpace: neither memory nor the disk of `folder` sufficed.
        DataError: anything else that it refused.
    """
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:  # also of the disk that is spilled to
        raise NoSpace(f"{folder}: DuckDB's {MEMORY} and the disk behind them do not suffice: {error}") from error
    except duckdb.Error as error:
        raise DataError(f"DuckDB cannot answer over the tables in {folder}, which are only a cache: {error}") from error
