"""In which order a person would read the text boxes of a page.

The OCR encoder of POINTS learns to write down the text of an image, so the label's order matters: lines from top to bottom,
boxes of a line from left to right, and columns one after the other instead of line by line across the page. The paper does
not give its joining rule (spec/points.md 3.2); this one is geometric and needs no model:

1. the page is turned upright by the median slope of its boxes;
2. a gutter, a vertical strip that almost no box crosses, splits it into columns when both sides hold running text (long
   lines, several of them, side by side); boxes that do cross it (a title) split the page into bands, read in turn;
3. without a gutter, boxes whose heights overlap form a line. A table of short cells is thus read row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_LINES = 3  # a column has at least this many lines
MIN_ASPECT = 4.0  # and its lines are this much longer than high (median); cells of tables are not
MIN_GUTTER = 0.8  # gutter width in line heights
MAX_CROSSING = 0.25  # share of boxes that may cross a gutter (titles, footers, wide captions)
SAME_LINE = 0.5  # overlap of heights, as a share of the smaller one, that makes two boxes one line


@dataclass(frozen=True)
class _Box:
    index: int
    left: float
    right: float
    top: float
    bottom: float

    @property
    def height(self) -> float:
        return self.bottom - self.top


def lines_in_order(polygons: Sequence[Sequence[Sequence[float]]] | np.ndarray) -> list[list[int]]:
    """Order text boxes for reading.

    Args:
        polygons: [N, 4, 2] corners in pixels, clockwise from the top left (what PP-OCR gives).

    Returns:
        Lines in reading order, each a list of box indices from left to right; every index appears once.
    """
    points = np.asarray(polygons, dtype=float).reshape(-1, 4, 2)
    if not len(points):
        return []
    upright = points @ _rotation(points)
    low, high = upright.min(axis=1), upright.max(axis=1)
    boxes = [_Box(i, low[i, 0], high[i, 0], low[i, 1], high[i, 1]) for i in range(len(points))]
    return [[box.index for box in line] for line in _order(boxes)]


def _rotation(points: np.ndarray) -> np.ndarray:
    """[2, 2] matrix that turns row vectors by minus the median slope of the wider boxes' top edges."""
    edges = points[:, 1] - points[:, 0]
    lengths = np.hypot(edges[:, 0], edges[:, 1])
    wide = lengths >= np.median(lengths)
    angle = float(np.median(np.arctan2(edges[wide, 1], edges[wide, 0])))
    if abs(angle) > math.pi / 6:  # vertical or rotated text: slope says nothing about the page
        angle = 0.0
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _order(boxes: list[_Box]) -> list[list[_Box]]:
    gutter = _gutter(boxes)
    if gutter is None:
        return _lines(boxes)
    crossing = sorted((b for b in boxes if b.left < gutter < b.right), key=lambda b: (b.top, b.left))
    rest = [b for b in boxes if b not in crossing]
    ordered: list[list[_Box]] = []
    for wide in crossing:
        above = [b for b in rest if b.top + b.bottom < wide.top + wide.bottom]
        rest = [b for b in rest if b not in above]
        ordered += _columns(above, gutter)
        ordered.append([wide])
    return ordered + _columns(rest, gutter)


def _columns(boxes: list[_Box], gutter: float) -> list[list[_Box]]:
    left = [b for b in boxes if b.right <= gutter]
    right = [b for b in boxes if b.right > gutter]
    return [*(_order(left) if left else []), *(_order(right) if right else [])]


def _gutter(boxes: list[_Box]) -> float | None:
    """The x of the clearest gutter, or None. Candidates are the gaps between boxes; fewest crossings win, then width."""
    if len(boxes) < 2 * MIN_LINES:
        return None
    height = float(np.median([b.height for b in boxes]))
    left, right = np.array([b.left for b in boxes]), np.array([b.right for b in boxes])
    best: tuple[int, float, float] | None = None
    for edge in np.unique(right):
        x = edge + 1e-6
        crosses = (left < x) & (right > x)
        if crosses.sum() > MAX_CROSSING * len(boxes):
            continue
        sides = [
            [b for b, c in zip(boxes, crosses, strict=True) if not c and (b.right <= x) == is_left]
            for is_left in (True, False)
        ]
        if not sides[0] or not sides[1]:
            continue
        width = min(b.left for b in sides[1]) - edge
        if width < MIN_GUTTER * height or not all(map(_running_text, sides)) or not _side_by_side(*sides):
            continue
        middle = edge + width / 2
        if ((left < middle) & (right > middle)).sum() != crosses.sum():
            continue
        key = (-int(crosses.sum()), float(width), float(middle))
        best = key if best is None or key > best else best
    return None if best is None else best[2]


def _running_text(boxes: list[_Box]) -> bool:
    if len(_lines(boxes)) < MIN_LINES:
        return False
    return float(np.median([(b.right - b.left) / max(b.height, 1e-6) for b in boxes])) >= MIN_ASPECT


def _side_by_side(one: list[_Box], other: list[_Box]) -> bool:
    """Whether two groups share at least half of the height of the lower one."""
    tops, bottoms = [min(b.top for b in g) for g in (one, other)], [max(b.bottom for b in g) for g in (one, other)]
    shared = min(bottoms) - max(tops)
    return shared >= 0.5 * min(bottoms[0] - tops[0], bottoms[1] - tops[1])


def _lines(boxes: list[_Box]) -> list[list[_Box]]:
    """Boxes grouped by overlapping heights, top to bottom, each line left to right."""
    lines: list[list[_Box]] = []
    for box in sorted(boxes, key=lambda b: (b.top + b.bottom, b.left, b.index)):
        for line in reversed(lines[-3:]):
            top, bottom = float(np.mean([b.top for b in line])), float(np.mean([b.bottom for b in line]))
            overlap = min(bottom, box.bottom) - max(top, box.top)
            if overlap >= SAME_LINE * min(bottom - top, box.height) and overlap > 0:
                line.append(box)
                break
        else:
            lines.append([box])
    return [sorted(line, key=lambda b: (b.left, b.index)) for line in lines]
