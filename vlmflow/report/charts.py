"""The page's plots as inline SVG: pure functions from numbers to markup.

Colours are the CSS variables of `style.py`, so a plot follows the page's light or dark scheme. Every mark carries its
value in a `<title>`, which browsers show as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from vlmflow.report.html import Safe, el, join
from vlmflow.report.numbers import count, log_ticks, percent, seconds, short, ticks, time_ticks

Point = tuple[float, float]


def _svg(width: int, height: int, label: str, *children: Safe) -> Safe:
    return el(
        "svg", *children, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=label,
        cls="chart",
    )  # fmt: skip


def _text(x: float, y: float, text: str, anchor: str = "start", cls: str = "t") -> Safe:
    return el("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, cls=cls)


def _line(x1: float, y1: float, x2: float, y2: float, cls: str) -> Safe:
    return el("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", cls=cls)


def _rect(x: float, y: float, w: float, h: float, cls: str, title: str = "") -> Safe:
    inner = [el("title", title)] if title else []
    box = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{max(w, 0):.1f}", "height": f"{max(h, 0):.1f}"}
    return el("rect", *inner, cls=cls, rx="1.5", **box)


def legend(names: Sequence[str], classes: Sequence[str] | None = None) -> Safe:
    """Names beside their colours; `classes` default to the series colours in order."""
    keys = classes or [f"s{i % 8}" for i in range(len(names))]
    items = (el("span", el("i", cls=f"key {key}"), name) for name, key in zip(names, keys, strict=True))
    return el("div", *items, cls="legend")


def lines(
    series: Mapping[str, Sequence[Point]],
    label: str,
    log: bool = False,
    width: int = 520,
    height: int = 216,
    faint: str = "",
) -> Safe:
    """Curves over steps. `log`: logarithmic y axis. Points that are not finite (or not positive on a log axis) are left
    out. `faint`: name of the curve that is drawn pale, in the colour of the next."""
    shown = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)] for name, points in series.items()
    }
    every = [point for points in shown.values() for point in points]
    if not every:
        return el("p", f"{label}: no values", cls="note")
    left, right, top, bottom = 56, 10, 20, 40
    low, high = min(y for _, y in every), max(y for _, y in every)
    low, high = (low, high * 1.05) if log else (min(low, 0.0), high * 1.05 if high > 0 else 1.0)
    if not high > low:
        low, high = low * 0.9, low * 1.1 or 1.0
    first, last = min(x for x, _ in every), max(max(x for x, _ in every), min(x for x, _ in every) + 1)

    def sx(x: float) -> float:
        return left + (x - first) / (last - first) * (width - left - right)

    def sy(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return height - bottom - share * (height - top - bottom)

    marks: list[Safe] = [_text(left, 12, label, cls="t strong")]
    for y in (log_ticks(low, high) if log else ticks(low, high, 4)) or [low]:
        marks += [
            _line(left, sy(y), width - right, sy(y), "grid"),
            _text(left - 6, sy(y) + 3.5, short(float(y)), "end"),
        ]
    for x in ticks(first, last, 6):
        if x == int(x):
            marks.append(_text(sx(x), height - bottom + 16, str(int(x)), "middle"))
    marks.append(_text(width - right, height - 6, "optimizer step", "end"))
    number = 0
    for name, points in shown.items():
        path = " ".join(f"{sx(x):.1f},{sy(y):.1f}" for x, y in points)
        ends = f"{name}: {short(float(points[0][1]))} → {short(float(points[-1][1]))}" if points else name
        if name == faint:
            marks.append(el("polyline", el("title", ends), points=path, cls=f"line faint s{number % 8}"))
            continue
        marks.append(el("polyline", el("title", ends), points=path, cls=f"line s{number % 8}"))
        if points:
            x, y = points[-1]
            marks.append(
                el("circle", el("title", ends), cx=f"{sx(x):.1f}", cy=f"{sy(y):.1f}", r="3", cls=f"dot s{number % 8}")
            )
        number += 1
    return _svg(width, height, label, *marks)


def histograms(
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    cut: float | None,
    axis: str,
    bins: int = 44,
    width: int = 1060,
) -> Safe:
    """One histogram a group, one above the other on a common logarithmic x axis, with the cut through all of them.

    A group is (kept values, removed values), positive; a bar stacks the two by what became of the samples, because a bin may
    hold both. Each panel has its own y scale, named at its left, because the groups differ in size.
    """
    shown = {name: [[v for v in part if v > 0 and math.isfinite(v)] for part in both] for name, both in groups.items()}
    values = [v for both in shown.values() for part in both for v in part]
    if not values:
        return el("p", "no values", cls="note")
    low, high = min(values) / 1.02, max(values) * 1.02
    if cut and cut > 0:
        low, high = min(low, cut), max(high, cut)
    left, right, top, panel, gap, bottom = 52, 14, 22, 104, 30, 38
    height = top + len(groups) * (panel + gap) - gap + bottom

    def sx(v: float) -> float:
        return left + math.log(v / low) / math.log(high / low) * (width - left - right)

    edges = [low * (high / low) ** (k / bins) for k in range(bins + 1)]
    marks: list[Safe] = []
    for row, (name, both) in enumerate(shown.items()):
        base = top + row * (panel + gap) + panel
        counts = [[0] * bins for _ in both]
        for k, part in enumerate(both):
            for v in part:
                counts[k][min(int(math.log(v / low) / math.log(high / low) * bins), bins - 1)] += 1
        most = max(map(sum, zip(*counts, strict=True))) or 1
        marks.append(_text(left, base - panel - 6, f"{name} ({count(sum(map(len, both)))})", cls="t strong"))
        for y in sorted({t for t in ticks(0, most, 3) if t == int(t)}):
            sy = base - y / most * panel
            marks += [_line(left, sy, width - right, sy, "grid"), _text(left - 6, sy + 3.5, str(int(y)), "end")]
        for k in range(bins):
            x, y, span = sx(edges[k]), float(base), f"{short(edges[k])} to {short(edges[k + 1])}"
            for cls, word, counted in (("kept", "kept", counts[0]), ("gone", "removed", counts[1])):
                if n := counted[k]:
                    y -= n / most * panel
                    marks.append(
                        _rect(x + 0.6, y, sx(edges[k + 1]) - x - 1.2, n / most * panel, cls, f"{span}, {word}: {n}")
                    )
        marks.append(_line(left, base, width - right, base, "axis"))
    floor = height - bottom
    for v in log_ticks(low, high):
        marks += [_line(sx(v), floor, sx(v), floor + 4, "axis"), _text(sx(v), floor + 16, short(float(v)), "middle")]
    marks.append(_text(width - right, floor + 32, axis, "end"))
    if cut and low <= cut <= high:
        x = sx(cut)
        marks.append(_line(x, top - 4, x, floor, "cut"))
        side = "end" if x > width * 0.75 else "start"
        clear = max(x + 6, left + 170)  # right of the first group's name
        marks.append(_text(x - 6 if side == "end" else clear, 12, f"cut at {short(float(cut))}", side, "t strong"))
    return _svg(width, height, axis, *marks)


def binned(
    edges: Sequence[float],
    series: Sequence[tuple[str, str, Sequence[int]]],
    label: str,
    log: bool = False,
    href: Callable[[float, float], str] | None = None,
    width: int = 900,
    height: int = 130,
) -> Safe:
    """A histogram that was counted elsewhere: (name, class, counts) stacked on bins between `edges`.

    `log`: the bins are equal on a logarithmic axis. `href`: address behind a bar, from its two edges.
    """
    if len(edges) < 2:
        return el("p", f"{label}: no values", cls="note")
    left, right, top, bottom = 52, 18, 8, 20
    base, step = height - bottom, (width - left - right) / (len(edges) - 1)
    totals = [sum(counts[i] for _, _, counts in series) for i in range(len(edges) - 1)]
    most = max(totals) or 1

    def sx(value: float) -> float:
        start, end = edges[0], edges[-1]
        share = math.log(value / start) / math.log(end / start) if log else (value - start) / (end - start)
        return left + share * (width - left - right)

    marks: list[Safe] = []
    for y in sorted({t for t in ticks(0, most, 3) if t == int(t)}):
        sy = base - y / most * (base - top)
        marks += [_line(left, sy, width - right, sy, "grid"), _text(left - 6, sy + 3.5, short(int(y)), "end")]
    for i, total in enumerate(totals):
        if not total:
            continue
        shares = ", ".join(f"{count(counts[i])} {name}" for name, _, counts in series if counts[i])
        title, pieces = f"{short(edges[i])} to {short(edges[i + 1])}: {shares}", []
        floor: float = base
        for _, cls, counts in series:
            tall = counts[i] / most * (base - top)
            floor -= tall
            pieces.append(_rect(left + i * step + 0.5, floor, step - 1, tall, cls, title))
        marks.append(el("a", *pieces, href=href(edges[i], edges[i + 1])) if href else join(pieces))
    marks.append(_line(left, base, width - right, base, "axis"))
    for x in log_ticks(edges[0], edges[-1]) if log else ticks(edges[0], edges[-1], 8):
        marks += [_line(sx(x), base, sx(x), base + 4, "axis"), _text(sx(x), base + 16, short(float(x)), "middle")]
    return _svg(width, height, label, *marks)


def gantt(bars: Sequence[tuple[str, float, float]], width: int = 1060) -> Safe:
    """Steps as (name, start, duration) in seconds, top to bottom, on one time axis."""
    left, right, row, bottom = 190, 74, 19, 24
    total = max(start + length for _, start, length in bars) or 1.0
    height = len(bars) * row + bottom + 4
    scale = (width - left - right) / total
    marks = []
    for x in time_ticks(total):
        marks += [_line(left + x * scale, 0, left + x * scale, height - bottom, "grid")]
        marks.append(_text(left + x * scale, height - 8, seconds(x) if x else "0", "middle"))
    for i, (name, start, length) in enumerate(bars):
        y = i * row + 3
        marks.append(_text(left - 8, y + 11, name, "end"))
        marks.append(
            _rect(left + start * scale, y, max(length * scale, 2), row - 6, "bar", f"{name}: {seconds(length)}")
        )
        marks.append(_text(left + start * scale + max(length * scale, 2) + 5, y + 11, seconds(length), cls="t dim"))
    return _svg(width, height, "time of each step", *marks)


def bars(items: Sequence[tuple[str, float, str]], width: int = 640) -> Safe:
    """Counts as horizontal bars: (name, value, class)."""
    left, right, row = 190, 120, 22
    most = max((value for _, value, _ in items), default=0) or 1
    total = sum(value for _, value, _ in items) or 1
    marks = []
    for i, (name, value, cls) in enumerate(items):
        y, length = i * row + 3, value / most * (width - left - right)
        marks.append(_text(left - 8, y + 12, name, "end"))
        marks.append(_rect(left, y, max(length, 2), row - 8, cls, f"{name}: {count(value)}"))
        marks.append(
            _text(left + max(length, 2) + 6, y + 12, f"{count(value)} ({percent(value / total)})", cls="t dim")
        )
    return _svg(width, len(items) * row + 6, "counts", *marks)


def interval(value: float, low: float, high: float, chance: float | None, width: int = 132) -> Safe:
    """A share in [0, 1] as a dot with its interval and the chance level as a tick: small enough for a table cell."""
    height, pad = 14, 3

    def sx(share: float) -> float:
        return pad + min(max(share, 0.0), 1.0) * (width - 2 * pad)

    marks = [_line(sx(0), 7, sx(1), 7, "grid"), _line(sx(low), 7, sx(high), 7, "whisker")]
    if chance is not None:
        marks.append(_line(sx(chance), 2, sx(chance), 12, "chance"))
    title = f"{percent(value)}, 95 % interval {percent(low)} to {percent(high)}"
    marks.append(el("circle", el("title", title), cx=f"{sx(value):.1f}", cy="7", r="3.2", cls="dot s0"))
    return el("svg", join(marks), viewBox=f"0 0 {width} {height}", width=width, height=height, cls="mini", role="img",
              aria_label=title)  # fmt: skip
