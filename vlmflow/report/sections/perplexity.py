"""The perplexity histogram with the cut, and what became of the planted rare facts."""

from __future__ import annotations

from collections.abc import Sequence

from vlmflow.report import charts
from vlmflow.report.html import Safe, absent, el, join, note, table, tiles
from vlmflow.report.numbers import count, number, percent, short
from vlmflow.report.page import Page, Row


def section(page: Page) -> Safe:
    scored = [(row, value) for row in page.rows if (value := number(row.get("ppl", "ppl"))) is not None]
    if not scored:
        return absent("No perplexities were computed.")
    manifest = page.curated
    assert manifest is not None
    keep = manifest.layers.get("keep")
    cut = number(keep.summary.get("threshold")) if keep else None
    source = "the keep step's threshold"
    kept_values = [value for row, value in scored if row.get("keep", "keep")]
    if cut is None and kept_values:
        cut, source = max(kept_values), "the largest kept perplexity"
    planted = [(row, value) for row, value in scored if row.planted]
    others = [(row, value) for row, value in scored if not row.planted]
    name = "all samples" if not planted else "web captions"
    groups = {name: _by_fate(others)}
    if planted:
        groups["planted rare facts"] = _by_fate(planted)
    parts = [
        el("p", "Perplexity of the fused caption's tokens and its end token under model P, lower is more familiar; the lowest "
           "share stays (POINTS eq. 3)." + (" The demo planted captions with facts that appear once, to see them go." if planted else ""),
           cls="lead"),
        charts.legend(["kept", "removed"], ["kept", "gone"]),
        charts.histograms(groups, cut, "perplexity, logarithmic"),
    ]  # fmt: skip
    if keep is None:
        parts.append(absent("The keep step has not run, so there is no cut."))
    else:
        parts.append(_counts([row for row, _ in others], [row for row, _ in planted]))
        if cut is not None:
            parts.append(note(f"The cut at {short(cut)} is {source}."))
    if len(page.rows) < manifest.samples:
        parts.append(
            note(f"Drawn from {count(len(page.rows))} of {count(manifest.samples)} samples, in shards evenly spaced.")
        )
    return join(parts)


def _by_fate(scored: Sequence[tuple[Row, float]]) -> tuple[list[float], list[float]]:
    """Perplexities of the samples that were kept, and of those that were not."""
    kept: list[float] = []
    removed: list[float] = []
    for row, value in scored:
        (kept if row.get("keep", "keep") else removed).append(value)
    return kept, removed


def _counts(others: Sequence[Row], planted: Sequence[Row]) -> Safe:
    def line(name: str, rows: Sequence[Row]) -> list[object]:
        kept = sum(bool(row.get("keep", "keep")) for row in rows)
        removed = len(rows) - kept
        return [name, count(len(rows)), count(kept), count(removed), percent(removed / len(rows)) if rows else ""]

    body = table(["samples", "scored", "kept", "removed", "share removed"], [line("web captions", others), line("planted", planted)],
                 numeric=(1, 2, 3, 4))  # fmt: skip
    if not planted:
        return join(
            [body, note("No sample carries the `planted` mark, so the filter's effect on rare facts is not measured.")]
        )
    kept = sum(bool(row.get("keep", "keep")) for row in planted)
    share = kept / max(1, kept + sum(bool(row.get("keep", "keep")) for row in others))
    before = len(planted) / (len(planted) + len(others))
    figures = tiles(
        [
            ("planted captions removed", f"{len(planted) - kept} of {len(planted)}", percent(1 - kept / len(planted))),
            ("share of planted before", percent(before), f"{len(planted)} of {len(planted) + len(others)} scored"),
            ("share of planted after", percent(share), f"{kept} left among the kept"),
        ]
    )
    return join([figures, body])
