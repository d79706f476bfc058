"""Samples side by side through all curation steps, and what the other datasets look like."""

from __future__ import annotations

from typing import Any

from vlmflow.report.html import Safe, absent, el, join, note, tag
from vlmflow.report.numbers import short
from vlmflow.report.page import Page, Row, thumbnail

A_KIND = 8  # samples of each kind: kept, removed, planted
GROUPS = ("kept", "removed", "planted rare facts", "not scored, so not kept", "not ranked")
OTHERS = 12  # samples of each other dataset


def section(page: Page) -> Safe:
    parts: list[Safe] = []
    if page.rows:
        parts.append(_curated(page))
    else:
        parts.append(absent("No curated dataset was handed in."))
    for name, manifest in page.inputs.datasets.items():
        if manifest is page.curated or not manifest.shards:
            continue
        parts.append(el("h3", f"Dataset {name}"))
        items = [_item(sample.meta, sample.images, sample.key) for sample in page.first_samples(manifest, OTHERS)]
        parts.append(el("div", *items, cls="grid"))
    return join(parts)


def _curated(page: Page) -> Safe:
    groups: dict[str, list[Row]] = {}
    for row in page.rows:
        groups.setdefault(_group(row), []).append(row)
    head = ["image", "alt text", "OCR", "synthetic", "fused", "PPL", "kept?", "why"]
    rows: list[Safe] = []
    for label in GROUPS:
        if group := groups.get(label):
            shown = spread(sorted(group, key=_rank), A_KIND)
            order = ", from the lowest perplexity to the highest" if any(row.get("ppl", "ppl") for row in group) else ""
            title = f"{label}: {len(shown)} of {len(group)}{order}"
            rows.append(el("tr", el("td", title, colspan=len(head)), cls="group"))
            cells = [zip(head, _cells(page, row), strict=True) for row in shown]
            rows += [
                el("tr", *(el("td", cell, cls="num" if name == "PPL" else None) for name, cell in row)) for row in cells
            ]
    body = el("table", el("thead", el("tr", *(el("th", h) for h in head))), el("tbody", *rows), cls="samples")
    return join([
        el("p", "Chosen evenly over the ranking, not by hand.", cls="lead"),
        el("div", body, cls="scroll", tabindex="0"),
        note("“planted” comes from a column of the demo's table that no step reads; only this page does."),
    ])  # fmt: skip


def _group(row: Row) -> str:
    if row.planted:
        return "planted rare facts"
    if row.get("ppl", "error"):
        return "not scored, so not kept"
    keep = row.get("keep", "keep")
    return "not ranked" if keep is None else "kept" if keep else "removed"


def _rank(row: Row) -> tuple[float, str]:
    ppl = row.get("ppl", "ppl")
    return (ppl if isinstance(ppl, float | int) else float("inf"), row.key)


def spread(items: list[Any], n: int) -> list[Any]:
    """`n` items evenly spaced over the list, first and last included."""
    if len(items) <= n:
        return items
    return [items[round(k * (len(items) - 1) / (n - 1))] for k in range(n)]


def _cells(page: Page, row: Row) -> list[Any]:
    alt = join([row.meta.get("text") or "", " ", tag("planted", "warn") if row.planted else ""])
    keep = row.get("keep", "keep")
    if row.get("ppl", "error"):
        verdict = tag("not scored", "warn")
    else:
        verdict = tag("not run") if keep is None else tag("kept", "good") if keep else tag("removed", "bad")
    how = ", ".join(filter(None, [row.get("fused", "engine"), *(row.get("fused", "problems") or [])]))
    fused = join([_text(row, "fused"), *([el("br"), el("small", how)] if how else [])])
    ppl = row.get("ppl", "ppl")
    value = short(float(ppl)) if isinstance(ppl, float | int) else _text(row, "ppl", "ppl")
    rank = row.get("keep", "rank")
    why = join([row.get("keep", "reason"), *([el("br"), el("small", f"rank {rank}")] if isinstance(rank, int) else [])])
    return [page.picture(row), alt, _text(row, "ocr"), _text(row, "synthetic"), fused, value, verdict, why]


def _text(row: Row, layer: str, column: str = "text") -> Safe:
    if layer not in row.layers:
        return tag("not run")
    if row.get(layer, "error"):
        return join([tag("failed", "bad"), " ", el("small", row.get(layer, "error"))])
    value = row.get(layer, column)
    return join([value]) if value not in (None, "") else el("small", "(empty)")


def _item(meta: dict[str, Any], images: tuple[bytes, ...], key: str) -> Safe:
    pictures = [thumbnail(data, key) for data in images[:2]]
    if meta.get("conversations"):
        turns = [
            el(
                "div",
                turn.get("value", "").replace("<image>", "").strip(),
                cls="q" if turn.get("from") == "human" else "a",
            )
            for turn in meta["conversations"][:4]
        ]
    else:
        turns = [el("div", meta.get("text") or "", cls="a")]
    return el("div", *pictures, *turns, el("div", meta.get("source") or "", cls="small"), cls="item")
