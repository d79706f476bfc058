"""Answers of the wide table to a question: how many, a page of rows, facets with counts, histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlmflow.look.query import FACETS, RANDOM, Query, items_sql, where
from vlmflow.look.sql import quoted
from vlmflow.look.table import Column, Table

if TYPE_CHECKING:
    import duckdb

ENTRIES = 12  # of a facet, the commonest
BINS = 40


def search(con: duckdb.DuckDBPyConnection, table: Table, query: Query, name: str) -> None:
    """Look for a question's text once, and keep the numbers of the samples that hold it as a table of this name."""
    clause, values = where(table, Query(text=query.text, within=query.within))
    con.execute(f"CREATE TABLE {quoted(name)} AS SELECT n FROM rows{clause}", values)


def count(con: duckdb.DuckDBPyConnection, table: Table, query: Query) -> int:
    """How many samples a question finds."""
    clause, values = where(table, query)
    return con.execute(f"SELECT count(*) FROM rows{clause}", values).fetchall()[0][0]


def page(con: duckdb.DuckDBPyConnection, table: Table, query: Query) -> list[dict[str, Any]]:
    """The rows of a page. First their numbers alone are found, so that sorting a million rows moves no texts."""
    clause, values = where(table, query)
    by = "hash(key)" if query.sort == RANDOM else quoted(query.sort)
    numbers = con.execute(
        f"SELECT n FROM rows{clause} ORDER BY {by} {query.order} NULLS LAST, n LIMIT {query.per} OFFSET {(query.page - 1) * query.per}",
        values,
    ).fetchall()
    return rows_of(con, [n for (n,) in numbers])


def rows_of(con: duckdb.DuckDBPyConnection, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Whole rows by their numbers, in the order given."""
    if not numbers:
        return []
    marks = ", ".join(str(int(n)) for n in numbers)
    found = con.execute(f"SELECT * FROM rows WHERE n IN ({marks})")
    names = [entry[0] for entry in found.description]
    by_number = {row[0]: dict(zip(names, row, strict=True)) for row in found.fetchall()}
    return [by_number[n] for n in numbers]


@dataclass(frozen=True)
class Facet:
    """Counts of a column's values among the samples found; `distinct` is how many values there are."""

    parameter: str
    title: str
    entries: list[tuple[str, int]] = field(default_factory=list)


def facets(con: duckdb.DuckDBPyConnection, table: Table, query: Query) -> list[Facet]:
    """Values and counts to filter by, the commonest ENTRIES of each; a facet does not filter itself."""
    named = {**FACETS, **{f"is.{c.name}": c.name for c in table.columns.values() if _is_facet(c)}}
    columns = {parameter: f"coalesce({quoted(name)}::VARCHAR, '')" for parameter, name in named.items()}
    found: dict[str, list[tuple[str, int]]] = {}
    together = [parameter for parameter in columns if not query.values(parameter)]
    if together:  # one scan for all of them
        clause, values = where(table, query)
        selected = ", ".join(f"{columns[p]} AS f{i}" for i, p in enumerate(together))
        sets = ", ".join(f"(f{i})" for i in range(len(together)))
        groups = ", ".join(f"f{i}" for i in range(len(together)))
        rows = con.execute(
            f"SELECT {groups}, count(*) FROM (SELECT {selected} FROM rows{clause}) GROUP BY GROUPING SETS ({sets})",
            values,
        ).fetchall()
        for row in rows:
            i = next((i for i, value in enumerate(row[:-1]) if value is not None), None)
            if i is not None:
                found.setdefault(together[i], []).append((row[i], row[-1]))
    for parameter in columns:
        if query.values(parameter):
            clause, values = where(table, query, without=parameter)
            found[parameter] = con.execute(
                f"SELECT {columns[parameter]} AS f, count(*) FROM rows{clause} GROUP BY f", values
            ).fetchall()
    lists = {
        "error": "errors",
        **{f"is.{c.name}": items_sql(c) for c in table.columns.values() if c.kind == "list" and c.name != "errors"},
    }
    for parameter, items in lists.items():
        clause, values = where(table, query, without=parameter)
        found[parameter] = con.execute(
            f"SELECT f, count(*) FROM (SELECT unnest({items}) AS f FROM rows{clause}) WHERE f IS NOT NULL GROUP BY f "
            f"ORDER BY count(*) DESC, f LIMIT {4 * ENTRIES}",
            values,
        ).fetchall()
    made = []
    for parameter in [*FACETS, "error", *(p for p in found if p not in FACETS and p != "error")]:
        entries = sorted(found.get(parameter, []), key=lambda e: (-e[1], e[0]))
        chosen = query.values(parameter)
        says_something = any(value for value, _ in entries) and (len(entries) > 1 or not parameter.startswith("is."))
        if chosen or says_something:
            shown = [e for i, e in enumerate(entries) if i < ENTRIES or e[0] in chosen]
            shown += [(value, 0) for value in chosen if value not in {v for v, _ in entries}]
            made.append(Facet(parameter, parameter.removeprefix("is."), shown))
    return made


def _is_facet(column: Column) -> bool:
    skip = {*FACETS.values(), "key", "reason", "keep.keep", "keep.reason", "sample.sha256", "sample.id"}
    return column.kind in ("category", "flag") and column.name not in skip and not column.name.endswith(".error")


def histogram(
    con: duckdb.DuckDBPyConnection, table: Table, query: Query, name: str, bins: int = BINS
) -> dict[str, Any]:
    """Counts of a number over equal bins, on a logarithmic axis when its values are positive and spread over decades.

    Returns:
        `column`, `log`, `edges` (bins + 1), `counts` by state, `count`, `missing` (null or not finite).
    """
    column = table.column(name)
    clause, values = where(table, query)
    finite = f"isfinite({column.quoted}::DOUBLE)"
    low, high, middle, seen, total = con.execute(
        f"SELECT min(v), max(v), approx_quantile(v, 0.5), count(v), count(*) FROM "
        f"(SELECT CASE WHEN {finite} THEN {column.quoted}::DOUBLE END AS v FROM rows{clause})",
        values,
    ).fetchall()[0]
    made: dict[str, Any] = {
        "column": name,
        "log": False,
        "edges": [],
        "counts": {},
        "count": seen,
        "missing": total - seen,
    }
    if not seen:
        return made
    made["log"] = low > 0 and high / low > 50 and (high - middle) > 3 * (middle - low)
    whole = con.execute(f"SELECT typeof({column.quoted}) FROM rows LIMIT 1").fetchall()[0][0] not in ("DOUBLE", "FLOAT")
    if made["log"]:
        edges = [low * (high / low) ** (i / bins) for i in range(bins + 1)]
    elif whole and high - low < bins:  # one bin a value
        edges = [low + i for i in range(int(high - low) + 2)]
    else:
        width = (high - low) / bins or 1.0
        edges = [low + i * width for i in range(bins + 1)]
    made["edges"] = [float(f"{edge:.12g}") for edge in edges]
    last = len(edges) - 2
    position = (
        f"least({last}, greatest(0, floor((ln(v) - ln({low!r})) / {math.log(high / low) / bins!r})::INTEGER))"
        if made["log"]
        else f"least({last}, greatest(0, floor((v - {low!r}) / {edges[1] - edges[0]!r})::INTEGER))"
    )
    rows = con.execute(
        f"SELECT state, {position} AS b, count(*) FROM (SELECT state, {column.quoted}::DOUBLE AS v FROM rows{clause}"
        f"{' AND' if clause else ' WHERE'} {finite}) GROUP BY ALL",
        values,
    ).fetchall()
    for state, position, number in rows:
        made["counts"].setdefault(state, [0] * (last + 1))[position] += number
    return made
