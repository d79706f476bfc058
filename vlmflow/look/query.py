"""What a person asks of the wide table: filters, an order, a page. Read from a URL, written as SQL.

Names come from the table's own list of columns and values travel as parameters, so no text of a URL becomes SQL.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from vlmflow.errors import DataError
from vlmflow.look.sql import kind_sql, quoted
from vlmflow.look.table import Column, Table

if TYPE_CHECKING:
    pass

PER_PAGE = 50
MOST_PER_PAGE = 200
FACETS = {"source": "source", "state": "state", "reason": "reason_kind"}  # parameter -> column
ORDERS = ("asc", "desc")
RANDOM = "random"

Pairs = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Query:
    """Filters, order and page.

    Attributes:
        equal: (parameter, values) of which one must hold: `source`, `state`, `reason`, `error` or `is.COLUMN`.
        least, most: (column, bound), both inclusive.
        text: is looked for in all texts, or in the column `within`; upper and lower case are the same.
        sort: a column, "n" (order of the dataset) or "random" (the same every time); ties follow the order of the dataset.
        page: from 1.
        hits: table with the numbers of the samples that hold the text, when it was looked for before (`search`).
        show: layers whose texts and scores cards have (`sample`: the samples' own JSON); empty = all.
    """

    equal: Pairs = ()
    least: tuple[tuple[str, float], ...] = ()
    most: tuple[tuple[str, float], ...] = ()
    text: str = ""
    within: str = ""
    sort: str = "n"
    order: str = "asc"
    page: int = 1
    per: int = PER_PAGE
    show: tuple[str, ...] = ()
    hits: str = ""

    def values(self, parameter: str) -> tuple[str, ...]:
        """Values asked for of a parameter; empty = any."""
        return dict(self.equal).get(parameter, ())

    def toggled(self, parameter: str, value: str) -> Query:
        """The same question with a value of a facet taken in or out, from its first page."""
        held = self.values(parameter)
        wanted = tuple(v for v in held if v != value) if value in held else (*held, value)
        return self.asked(parameter, wanted)

    def asked(self, parameter: str, values: Sequence[str]) -> Query:
        """The same question with other values of a parameter, from its first page."""
        others = {name: held for name, held in self.equal if name != parameter}
        if values:
            others[parameter] = tuple(values)
        return replace(self, equal=tuple(sorted(others.items())), page=1)

    def filters(self) -> Query:
        """The question without order and page: what counts depend on."""
        return replace(self, sort="n", order="asc", page=1, per=PER_PAGE, show=())

    def url(self, **changes: Any) -> str:
        """The query string of this question, shortest form; `changes` are attributes."""
        q = replace(self, **changes) if changes else self
        pairs: list[tuple[str, Any]] = [(name, value) for name, values in q.equal for value in values]
        pairs += [
            (f"min.{name}", f"{value:g}" if float(f"{value:g}") == value else repr(value)) for name, value in q.least
        ]
        pairs += [
            (f"max.{name}", f"{value:g}" if float(f"{value:g}") == value else repr(value)) for name, value in q.most
        ]
        pairs += [("show", layer) for layer in q.show]
        plain = Query()
        for name, key in (
            ("text", "q"),
            ("within", "in"),
            ("sort", "sort"),
            ("order", "order"),
            ("page", "page"),
            ("per", "per"),
        ):
            if getattr(q, name) != getattr(plain, name):
                pairs.append((key, getattr(q, name)))
        return "?" + urlencode(pairs)


def parse(pairs: Iterable[tuple[str, str]], table: Table) -> Query:
    """A question from a URL's parameters.

    Raises:
        DataError: a parameter, column or value that there is not; it names those there are.
    """
    equal: dict[str, list[str]] = {}
    bounds: dict[str, dict[str, float]] = {"min": {}, "max": {}}
    plain: dict[str, str] = {}
    show: dict[str, None] = {}
    for name, value in pairs:
        head, _, column = name.partition(".")
        if name in FACETS or name == "error":
            equal.setdefault(name, []).append(value)
        elif head == "is" and column:
            _of_kind(table, column, ("category", "flag", "list"), name)
            equal.setdefault(name, []).append(value)
        elif head in bounds and column:
            if value.strip():
                _of_kind(table, column, ("number",), name)
                bounds[head][column] = _number(name, value)
        elif name == "show":
            if value not in (there := table.layers):
                raise DataError(f"show: there is no layer '{value}'; the dataset has {', '.join(there)}")
            show[value] = None
        elif name in ("q", "in", "sort", "order", "page", "per"):
            plain[name] = value
        else:
            raise DataError(
                f"parameter '{name}' is not known: use source, state, reason, error, is.COLUMN, min.COLUMN, max.COLUMN, q, in, sort, "
                "order, page, per or show"
            )
    within, sort = plain.get("in", ""), plain.get("sort") or "n"
    if within:
        _of_kind(table, within, ("text", "category", "json"), "in")
    if sort != RANDOM:
        _of_kind(table, sort, ("number", "flag", "category", "text"), "sort")
    order = plain.get("order") or "asc"
    if order not in ORDERS:
        raise DataError(f"order '{order}' is not one of {list(ORDERS)}")
    return Query(
        tuple(sorted((name, tuple(dict.fromkeys(values))) for name, values in equal.items())),
        tuple(sorted(bounds["min"].items())), tuple(sorted(bounds["max"].items())),
        plain.get("q", "").strip(), within, sort, order,
        _whole("page", plain.get("page", "1"), 10**9), _whole("per", plain.get("per", str(PER_PAGE)), MOST_PER_PAGE),
        tuple(show),
    )  # fmt: skip


def _of_kind(table: Table, name: str, kinds: tuple[str, ...], parameter: str) -> Column:
    column = table.column(name)
    if column.kind not in kinds:
        fit = [c.name for c in table.columns.values() if c.kind in kinds]
        raise DataError(
            f"{parameter}: column '{name}' is a {column.kind}; this takes a {' or '.join(kinds)}: {', '.join(fit)}"
        )
    return column


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{name}: '{text[:40]}' is no number")
    return value


def _whole(name: str, text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= most):
        raise DataError(f"{name}: '{text[:40]}' is not a whole number from 1 to {most}")
    return int(text)


def where(table: Table, query: Query, without: str = "") -> tuple[str, list[Any]]:
    """The WHERE clause and its parameters; `without` leaves out one parameter's filter (a facet counts its other values)."""
    clauses: list[str] = []
    values: list[Any] = []
    for parameter, wanted in query.equal:
        if parameter == without:
            continue
        marks = ", ".join("?" for _ in wanted)
        if parameter in FACETS:
            clauses.append(f"{quoted(FACETS[parameter])} IN ({marks})")
        elif parameter == "error":
            clauses.append(f"list_has_any(errors, [{marks}]::VARCHAR[])")
        else:
            column = table.column(parameter.removeprefix("is."))
            if column.kind == "list":
                clauses.append(f"list_has_any({items_sql(column)}, [{marks}]::VARCHAR[])")
            else:
                clauses.append(f"coalesce({column.quoted}::VARCHAR, '') IN ({marks})")
        values += wanted
    for bounds, sign in ((query.least, ">="), (query.most, "<=")):
        for name, value in bounds:
            clauses.append(f"{table.column(name).quoted} {sign} ?")
            values.append(value)
    if query.hits:
        clauses.append(f"n IN (SELECT n FROM {quoted(query.hits)})")
    elif query.text:
        columns = [table.column(query.within)] if query.within else searched(table)
        clauses.append("(" + " OR ".join(f"contains(lower({c.quoted}), ?)" for c in columns) + ")")
        values += [query.text.lower()] * len(columns)
    return (" WHERE " + " AND ".join(clauses) if clauses else ""), values


def searched(table: Table) -> list[Column]:
    """Columns that a search without `in` looks into: the key and every text."""
    skip = {"sample.sha256", "reason", "reason_kind", "state", "source"}
    return [c for c in table.columns.values() if c.kind in ("text", "category", "json") and c.name not in skip]


def items_sql(column: Column) -> str:
    """A list's items as SQL, numbers in them aside."""
    return f"list_transform({column.quoted}, lambda x: {kind_sql('x::VARCHAR')})"


def described(query: Query) -> str:
    """A question in words, for a page's heading."""
    parts = [
        f"{name.removeprefix('is.')}: {' or '.join(v or '(none)' for v in values)}" for name, values in query.equal
    ]
    parts += [f"{name} ≥ {value:g}" for name, value in query.least] + [
        f"{name} ≤ {value:g}" for name, value in query.most
    ]
    if query.text:
        parts.append(f"“{query.text}” in {query.within or 'any text'}")
    return ", ".join(parts)
