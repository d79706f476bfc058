"""The gallery as one file: a bounded choice of samples that says what was kept, what was dropped and why.

For places without a server: Kubeflow's artifact view, a mail, a ticket. Nothing in the file runs, and nothing outside of it
is loaded: pictures are embedded thumbnails, and its policy forbids scripts.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlmflow.errors import VlmflowError
from vlmflow.look import cards, query
from vlmflow.look.pictures import thumbnail
from vlmflow.look.style import CSS
from vlmflow.report.html import Safe, el, join, tiles
from vlmflow.report.numbers import count, percent

if TYPE_CHECKING:
    import duckdb

    from vlmflow.dataset.manifest import Manifest
    from vlmflow.look.query import Query
    from vlmflow.look.samples import Samples
    from vlmflow.look.table import Table

EACH = 8  # samples of a group
REASONS = 8  # groups of reasons, the commonest
SIDE = 200  # pixels of an embedded picture
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
PREFERRED = ("ppl.ppl", "dedup.distance", "judge.score", "ocr.score")  # what to sort by when nobody says


def page(manifest: Manifest, table: Table, samples: Samples, asked: Query, each: int = EACH, note: str = "") -> str:
    """The whole file: counts, the histogram of the sorted column, its lowest and highest samples, and some of every reason."""
    with table.connect() as con:
        parts = body(manifest, con, table, samples, asked, each)
    head = join([
        el("meta", charset="utf-8"), el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"), el("title", f"{manifest.name} – vlmflow"),
        Safe(f"<style>{CSS}</style>"),
    ])  # fmt: skip
    notes = [
        f"{count(manifest.samples)} samples",
        f"layers {', '.join(manifest.layers) or 'none'}",
        *([note] if note else []),
    ]
    top = el(
        "header",
        el("h1", manifest.name),
        *(el("span", text, cls="dim") for text in notes),
        el("code", manifest.digest[:12], title=manifest.digest),
        cls="top",
    )
    return (
        f"<!doctype html><html lang='en'><head>{head}</head><body>{top}<main class='one'>{parts}</main></body></html>\n"
    )


def body(
    manifest: Manifest, con: duckdb.DuckDBPyConnection, table: Table, samples: Samples, asked: Query, each: int = EACH
) -> Safe:
    """The file's content without its frame, for pages that hold more."""
    sort = asked.sort if asked.sort not in ("n", query.RANDOM) else _column(table)
    total, facets = query.count(con, table, asked), query.facets(con, table, asked)
    parts: list[Any] = [el("p", query.described(asked), cls="lead"), _counts(facets, total, table)]
    groups: list[tuple[str, Query]] = []
    if sort:
        if table.columns[sort].kind == "number":
            parts.append(el("div", cards.plot(query.histogram(con, table, asked, sort)), cls="plot"))
        ends = [(f"Lowest {sort}", "asc"), (f"Highest {sort}", "desc")]
        groups += [(title, replace(asked, sort=sort, order=order, page=1, per=each)) for title, order in ends]
    reasons = next((f.entries for f in facets if f.parameter == "reason"), [])
    for reason, number in reasons[:REASONS]:
        if reason and number:
            title = f"{reason} ({count(number)})"
            groups.append((title, replace(asked.asked("reason", [reason]), sort=query.RANDOM, order="asc", per=each)))
    errors = next((f.entries for f in facets if f.parameter == "error"), [])
    for error, number in errors[:REASONS]:
        if number:
            groups.append(
                (
                    f"failed in {error} ({count(number)})",
                    replace(asked.asked("error", [error]), sort=query.RANDOM, order="asc", per=each),
                )
            )
    if not groups:
        groups.append(("Some samples", replace(asked, sort=query.RANDOM, order="asc", per=each)))
    for title, q in groups:
        rows = query.page(con, table, q)
        shown = [cards.card(row, table, _picture(row, samples), q.sort) for row in rows]
        parts += [el("h2", title), el("div", *shown, cls="cards") if shown else el("p", "none", cls="note")]
    return join(parts)


def _column(table: Table) -> str | None:
    numbers = [c.name for c in table.columns.values() if c.kind == "number" and "." in c.name and c.layer != "sample"]
    scores = [name for name in numbers if name.rpartition(".")[2] in ("score", "distance")]
    return next((name for name in (*PREFERRED, *scores, *numbers) if name in numbers and name != "keep.rank"), None)


def _counts(facets: Sequence[query.Facet], total: int, table: Table) -> Safe:
    found = {facet.parameter: facet.entries for facet in facets}
    figures = [("samples", count(total), f"of {count(table.rows)}" if total != table.rows else "")]
    figures += [
        (state, count(number), percent(number / max(total, 1)))
        for state, number in found.get("state", [])
        if state != "undecided"
    ]
    figures += [
        (f"source {value}", count(number), percent(number / max(total, 1)))
        for value, number in found.get("source", [])[:4]
    ]
    return tiles(figures)


def _picture(row: dict[str, Any], samples: Samples) -> Safe | None:
    """An embedded thumbnail; what cannot be shown says why, because a page must not fail a finished step."""
    if row.get("sample.images") == 0:
        return None
    try:
        images = samples.images(row["shard"], row["key"])
        if not images:
            return None
        data = base64.b64encode(thumbnail(images[0], SIDE)).decode()
    except VlmflowError as error:
        return el("span", f"cannot be shown: {str(error)[:200]}", cls="text-only")
    return el("img", src=f"data:image/jpeg;base64,{data}", alt="")
