"""The gallery as one file: a bounded choice of samples that says what was kept, what was dropped and why.

For places without a server: Kubeflow's artifact view, a mail, a ticket. Nothing in the file runs, and nothing outside of it
is loaded: pictures are embedded thumbnails, and its policy forbids scripts.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow.errors import VlmflowError
from vlmflow.look import answers, cards, failed, query
from vlmflow.look.build import SAMPLE, sample_facts
from vlmflow.look.pictures import thumbnail
from vlmflow.look.samples import Samples
from vlmflow.look.style import CSS
from vlmflow.look.table import Column, Table, open_table
from vlmflow.report.html import Safe, el, join, tiles
from vlmflow.report.numbers import count, percent

if TYPE_CHECKING:
    import duckdb

    from vlmflow.dataset.manifest import Manifest
    from vlmflow.look.query import Query

EACH = 8  # samples of a group
REASONS = 8  # groups of reasons, the commonest
SHARDS = 4  # that an excerpt looks at
SIDE = 200  # pixels of an embedded picture
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
PREFERRED = ("ppl.ppl", "dedup.distance", "judge.score", "ocr.score")  # what to sort by when nobody says


def page(manifest: Manifest, table: Table, samples: Samples, asked: Query, each: int = EACH, note: str = "") -> str:
    """The whole file: counts, the histogram of the sorted column, its lowest and highest samples, and some of every reason."""
    with table.open() as con:
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
    total, facets = answers.count(con, table, asked), answers.facets(con, table, asked)
    parts: list[Any] = [el("p", query.described(asked), cls="lead"), _counts(facets, total, table)]
    own = {c.name: c for c in (Column(f"{SAMPLE}.{name}", "text") for name in ("text", "talk"))}
    shown_as = replace(table, columns={**own, **table.columns})
    groups: list[tuple[str, Query]] = []
    if sort:
        if table.columns[sort].kind == "number":
            parts.append(el("div", cards.plot(answers.histogram(con, table, asked, sort)), cls="plot"))
        ends = [(f"Lowest {sort}", "asc"), (f"Highest {sort}", "desc")]
        groups += [(title, replace(asked, sort=sort, order=order, page=1, per=each)) for title, order in ends]
    else:
        groups.append(("Some samples", replace(asked, sort=query.RANDOM, order="asc", page=1, per=each)))
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
    for title, q in groups:
        rows = answers.page(con, table, q)
        if not table.with_samples:
            rows = [row | _own(row, samples) for row in rows]
        shown = [cards.card(row, shown_as, _picture(row, samples), q) for row in rows]
        parts += [el("h2", title), el("div", *shown, cls="cards") if shown else el("p", "none", cls="note")]
    if failed.total(con):
        parts += [
            el("h2", f"Rows of the tables that became no sample ({count(failed.total(con))})"),
            failed.examples(con, 3, REASONS),
        ]
    return join(parts)


def _column(table: Table, layer: str | None = None) -> str | None:
    """The column to sort by when nobody says: a score, of this layer if it has one."""
    numbers = [c.name for c in table.columns.values() if c.kind == "number" and "." in c.name and c.layer != "sample"]
    numbers = [name for name in numbers if not name.endswith(cards.NOISE)]
    mine = [name for name in numbers if name.startswith(f"{layer}.")]
    if layer != "keep" and mine:
        return mine[0]
    scores = [name for name in numbers if name.rpartition(".")[2] in ("score", "distance")]
    return next((name for name in (*PREFERRED, *scores, *numbers) if name in numbers and name != "keep.rank"), None)


def _counts(facets: Sequence[answers.Facet], total: int, table: Table) -> Safe:
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


def _own(row: dict[str, Any], samples: Samples) -> dict[str, Any]:
    """What a sample's own JSON says, when the table was made without: few are shown, so few are read."""
    try:
        return {
            f"{SAMPLE}.{name}": value for name, value in sample_facts(samples.meta(row["shard"], row["key"])).items()
        }
    except VlmflowError:  # its picture says why
        return {}


def excerpt(manifest: Manifest, scratch: Path, layer: str | None = None, each: int = 4) -> Safe:
    """The gallery's groups of at most SHARDS evenly spaced shards, for pages that must stay small; fetches no shard.

    Raises:
        DataError: a layer's part is not what was written.
    """
    total = len(manifest.shards)
    chosen = sorted({round(i * (total - 1) / max(min(SHARDS, total) - 1, 1)) for i in range(min(SHARDS, total))})
    part = manifest.model_copy(update={
        "shards": [manifest.shards[i] for i in chosen],
        "layers": {name: ref.model_copy(update={"parts": [ref.parts[i] for i in chosen]}) for name, ref in manifest.layers.items()},
    })  # fmt: skip
    samples = Samples(part, scratch)
    table = open_table(part, scratch, samples=not samples.bytes_to_fetch())
    try:
        with table.open() as con:
            asked = query.Query(sort=_column(table, layer) or "n")
            groups = body(part, con, table, samples, asked, each)
    finally:
        table.path.unlink(missing_ok=True)  # of a part of a dataset: nobody asks for it again
    told = (
        f"Samples of {len(chosen)} of {total} shards; `vlmflow data gallery` shows all." if len(chosen) < total else ""
    )
    return el("div", el("p", told, cls="note") if told else "", groups)


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
