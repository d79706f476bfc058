"""How long each step took, on one time axis."""

from __future__ import annotations

from vlmflow.report import charts
from vlmflow.report.html import Safe, absent, join, note
from vlmflow.report.numbers import seconds
from vlmflow.report.page import Page


def section(page: Page) -> Safe:
    timings = page.timings
    if not timings:
        return absent("No step of this run has recorded its time.")
    starts = [timing.started for timing in timings]
    bars = []
    if all(start is not None for start in starts):
        first = min(start for start in starts if start is not None)
        bars = [(t.step, (t.started or 0.0) - first, t.seconds) for t in timings]
        span = max(start + length for _, start, length in bars)
        text = (
            f"{seconds(sum(t.seconds for t in timings))} in steps within {seconds(span)} from the first start to the last end; \
the rest is starting processes, and pauses if the run was interrupted."
        )
    else:
        at = 0.0
        for timing in timings:
            bars.append((timing.step, at, timing.seconds))
            at += timing.seconds
        text = f"{seconds(at)} in steps; only durations are known, so the bars follow each other."
    return join(
        [
            charts.gantt(bars),
            note(text + " A step that found its finished output counts with the time it took to find it."),
        ]
    )
