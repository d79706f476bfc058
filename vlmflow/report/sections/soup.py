"""How the soups came about: ingredients, and each decision of the greedy search."""

from __future__ import annotations

from typing import Any

from vlmflow.report.html import Safe, absent, code, el, join, note, table, tag
from vlmflow.report.numbers import percent, short
from vlmflow.report.page import Page

_COLUMNS = ("step", "candidate", "before", "after", "accepted")


def section(page: Page) -> Safe:
    soup = page.inputs.soup
    if not soup:
        return absent("No soup was made.")
    parts = [
        el("p", "Candidates start from the same aligned model and differ in one extra data set; soups are means of their "
           "weights (POINTS 3.3). Every decision uses the selection split.", cls="lead")
    ]  # fmt: skip
    rows = []
    for name, entry in (soup.get("soups") or {}).items():
        entry = entry if isinstance(entry, dict) else {}
        mean = (entry.get("selection") or {}).get("mean")
        weights = (entry.get("ref") or entry).get("weights_sha256", "")
        mark = tag("chosen", "good") if name == soup.get("chosen") else ""
        rows.append([join([name, " ", mark]), ", ".join(entry.get("ingredients") or []), percent(mean) if mean is not None else "",
                     code(weights)])  # fmt: skip
    if rows:
        parts.append(table(["soup", "mean of", "selection mean", "weights"], rows, numeric=(2,)))
    trace = soup.get("trace") or []
    parts.append(el("h3", "Greedy search, in order"))
    parts.append(_trace(trace) if trace else absent("No trace was handed in."))
    if len([t for t in trace if isinstance(t, dict) and t.get("accepted")]) == 1:
        parts.append(note("Greedy kept one candidate only, so the greedy soup is that candidate."))
    return join(parts)


def _trace(trace: list[Any]) -> Safe:
    steps = [step if isinstance(step, dict) else {"step": step} for step in trace]
    present = dict.fromkeys(key for step in steps for key in step)
    columns = [c for c in _COLUMNS if c in present] + [c for c in present if c not in _COLUMNS]
    rows = []
    for step in steps:
        cells: list[Any] = []
        for column in columns:
            value = step.get(column)
            if column in ("accepted", "kept"):
                cells.append(tag("accepted", "good") if value else tag("rejected"))
            elif isinstance(value, float):
                cells.append(percent(value, 2) if 0 <= value <= 1 else short(value))
            elif isinstance(value, list | tuple):
                cells.append(", ".join(map(str, value)))
            else:
                cells.append(short(value))
        rows.append(cells)
    return table([column.replace("_", " ") for column in columns], rows)
