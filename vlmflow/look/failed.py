"""Rows of the tables that became no sample: counts by reason, and the rows themselves with URL and detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from vlmflow.errors import DataError
from vlmflow.look.cards import link
from vlmflow.report.html import Safe, el, join, table
from vlmflow.report.numbers import count

if TYPE_CHECKING:
    import duckdb

FILTERS = ("source", "reason", "host")
PER_PAGE = 100
ENTRIES = 15  # values of a filter that are shown, the commonest
MOST_CHARS = 300


def total(con: duckdb.DuckDBPyConnection) -> int:
    """How many rows became no sample."""
    return con.execute("SELECT count(*) FROM failures").fetchall()[0][0]


def examples(con: duckdb.DuckDBPyConnection, each: int, reasons: int) -> Safe:
    """For a page without a server: the commonest reasons with their counts and a few rows of each."""
    rows = con.execute(
        "SELECT reason, n, key, url, detail FROM (SELECT *, count(*) OVER (PARTITION BY reason) AS n, "
        "row_number() OVER (PARTITION BY reason ORDER BY hash(key), key) AS place FROM failures) "
        f"WHERE place <= {each} ORDER BY n DESC, reason, place LIMIT {each * reasons}"
    ).fetchall()
    shown = [[reason, count(n), key, link(_cut(url)), _cut(detail)] for reason, n, key, url, detail in rows]
    return table(["reason", "rows", "for example", "address", "detail"], shown, numeric=[1])


def body(con: duckdb.DuckDBPyConnection, pairs: Sequence[tuple[str, str]]) -> Safe:
    """The content of the served page, for a URL's parameters `source`, `reason`, `host` and `page`.

    Raises:
        DataError: a parameter that there is not, or a page that is no number.
    """
    chosen = {name: value for name, value in pairs if name in FILTERS}
    if unknown := sorted({name for name, _ in pairs} - {*FILTERS, "page"}):
        raise DataError(f"parameter '{unknown[0]}' is not known: use {', '.join(FILTERS)} or page")
    text = dict(pairs).get("page", "1")
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) < 10**9):
        raise DataError(f"page: '{text[:40]}' is not a whole number from 1")
    page = int(text)
    clause, values = _where(chosen)
    number = con.execute(f"SELECT count(*) FROM failures{clause}", values).fetchall()[0][0]
    rows = con.execute(
        f'SELECT key, source, reason, url, detail FROM failures{clause} ORDER BY source, "row" LIMIT {PER_PAGE} '
        f"OFFSET {(page - 1) * PER_PAGE}",
        values,
    ).fetchall()
    shown = [[key, source, reason, link(_cut(url)), _cut(detail)] for key, source, reason, url, detail in rows]
    steps: list[Any] = [el("span", f"{count(number)} rows of the tables became no sample", cls="dim")]
    if page > 1:
        steps.append(el("a", "‹ back", href=_url(chosen, page - 1), data_go="prev"))
    if page * PER_PAGE < number:
        steps.append(el("a", "next ›", href=_url(chosen, page + 1), data_go="next"))
    side = [_facet(con, name, chosen) for name in FILTERS]
    results = el(
        "div",
        el("div", *steps, cls="bar pager"),
        table(["key", "source", "reason", "address", "detail"], shown),
        cls="results",
    )
    return el("main", el("aside", el("p", el("a", "← gallery", href="/", data_go="back")), *side), results, cls="look")


def _where(chosen: dict[str, str]) -> tuple[str, list[str]]:
    clause = " AND ".join(f"coalesce({name}, '') = ?" for name in chosen)
    return (f" WHERE {clause}" if clause else ""), list(chosen.values())


def _facet(con: duckdb.DuckDBPyConnection, name: str, chosen: dict[str, str]) -> Safe:
    others = {key: value for key, value in chosen.items() if key != name}
    clause, values = _where(others)
    rows = con.execute(
        f"SELECT coalesce({name}, '') AS f, count(*) AS n FROM failures{clause} GROUP BY f ORDER BY n DESC, f LIMIT {ENTRIES}",
        values,
    ).fetchall()
    entries = []
    for value, number in rows:
        on = chosen.get(name) == value
        href = _url(others if on else {**others, name: value}, 1)
        entries.append(
            el(
                "a",
                el("span", value or "(none)"),
                el("span", count(number), cls="n"),
                href=href,
                cls="facet on" if on else "facet",
            )
        )
    return join([el("h3", name), *entries])


def _url(chosen: dict[str, str], page: int) -> str:
    return "/failed?" + urlencode({**chosen, **({"page": page} if page > 1 else {})})


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS] + " …"
