"""Questions of the report split with the chosen model's replies, right and wrong ones, taken evenly."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from typing import Any

from vlmflow import storage
from vlmflow.evaluation.table_file import local_table
from vlmflow.report.html import Safe, absent, el, join, tag
from vlmflow.report.page import READ_ERRORS, Page, thumbnail
from vlmflow.report.sections.gallery import spread

A_BENCHMARK = 8
TABLE_LIMIT = 64 << 20  # bytes of a benchmark file that is read for its pictures; larger ones are shown without


def section(page: Page) -> Safe:
    if page.chosen is None or page.chosen not in page.inputs.scores:
        return absent("No chosen model was evaluated.")
    parts = [
        el("p", f"{page.name(page.chosen)}, report split, every so-many-th question: not picked by hand.", cls="lead")
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
        path = local_table(spec.table, page.ctx.scratch)
        if path.stat().st_size > TABLE_LIMIT:
            return {}
        return _read(path, wanted)
    except READ_ERRORS:
        return {}


def _read(path: Path, wanted: set[str]) -> dict[str, bytes]:
    found = {}
    csv.field_size_limit(1 << 30)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row.get("index") in wanted and len(row.get("image") or "") > 64:
                found[str(row["index"])] = base64.b64decode(row["image"])
    return found
