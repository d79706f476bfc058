"""Questions of the report split with the chosen model's replies, right and wrong ones, taken evenly."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

from vlmflow import storage
from vlmflow.errors import DataError
from vlmflow.evaluation.table_file import table_of
from vlmflow.evaluation.tsv import Table
from vlmflow.report.html import Safe, absent, el, join, tag
from vlmflow.report.page import READ_ERRORS, Page, thumbnail
from vlmflow.report.sections.gallery import spread

A_BENCHMARK = 8
TABLE_LIMIT = 64 << 20  # bytes of a benchmark file that is read for its pictures; larger ones are shown without


def section(page: Page) -> Safe:
    if page.chosen is None or page.chosen not in page.inputs.scores:
        return absent("No chosen model was evaluated.")
    parts = [
        el("p", f"{page.name(page.chosen)}, report split: questions spaced evenly, not picked by hand.", cls="lead")
    ]
    for benchmark in page.benchmarks:
        score = page.score(page.chosen, benchmark)
        if not score:
            continue
        parts.append(el("h3", benchmark))
        try:
            parts.append(_answers(page, benchmark, score))
        except READ_ERRORS as error:
            parts.append(absent(f"The replies cannot be read: {error}"))
    return join(parts)


def _answers(page: Page, benchmark: str, score: dict[str, Any]) -> Safe:
    uri = score.get("predictions")
    if not uri:
        return absent("No replies were stored.")
    import pyarrow.parquet as pq

    rows = pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
    shown = spread(rows, A_BENCHMARK)
    pictures = _pictures(page, benchmark, {str(row["index"]) for row in shown})
    items = []
    for row in shown:
        right = bool(row.get("correct"))
        picture = pictures.get(str(row["index"]))
        prompt = row.get("prompt") or row.get("question") or ""
        items.append(
            el(
                "div",
                thumbnail(picture, f"{benchmark} {row['index']}")
                if picture
                else el("span", "picture not at hand", cls="small"),
                el("div", prompt, cls="q"),
                el("div", row.get("reply") or "(empty reply)", cls="a"),
                el(
                    "div",
                    tag("right" if right else "wrong", "good" if right else "bad"),
                    el("small", f" gold: {row.get('answer')}"),
                ),
                cls="item",
            )
        )
    return el("div", *items, cls="grid")


def _pictures(page: Page, benchmark: str, wanted: set[str]) -> dict[str, bytes]:
    """Pictures of some questions from the benchmark's file, where it can be reached; otherwise none."""
    spec = page.ctx.recipe.evaluation.benchmarks.get(benchmark)
    if spec is None:
        return {}
    try:
        path = table_of(page.ctx, spec)
        if path.stat().st_size > TABLE_LIMIT:
            return {}
        table = Table(path, spec.kind, benchmark)
    except READ_ERRORS:
        return {}
    found = {}
    for question in table:
        if question.index in wanted and question.images:
            buffer = io.BytesIO()
            with suppress(DataError):  # shown as "picture not at hand"
                table.images(question)[0].save(buffer, "PNG")
                found[question.index] = buffer.getvalue()
    return found
