"""Perceptual hashes: 64 bits that stay nearly the same when a picture is scaled, compressed or made brighter.

The hash is the sign of the low frequencies: the picture as 32x32 greys, its discrete cosine transform, the 8x8 lowest
frequencies without the mean (whose bit is always 0), each against their median. Two copies of a picture differ in at most
6 bits, different pictures in 12 or more; a border or a mirror image defeats it, which is why the hashes of the picture
without its border and of its mirror image stand beside it (spec/data-eval-soup.md 7.6).

A picture without contrast has no low frequencies but noise. Its hash is 0, `FLAT`, which says nothing about likeness.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FLAT = 0
"""Hash of a picture of one grey: not comparable."""
GRID = 32  # greys a side that are transformed
LOW = 8  # frequencies a side that are kept
READ = 128  # pixels a side to which a JPEG is shrunk while it is decoded, at the least
CONTRAST = 1.0  # standard deviation of the greys (0 to 255) below which a picture is flat
BORDER = 24  # greys by which the pixels of a border may differ from its colour; JPEG artefacts do
LEAST = 0.25  # share of a side that trimming leaves, at the least; else the border is the picture


def hashes(image: Image) -> tuple[int, int, int]:
    """64-bit DCT hashes of a picture (any mode), of it without a border of one colour, and of its mirror image.

    Returns:
        (plain, trimmed, mirrored), unsigned, below 2^63; trimmed equals plain when there is no border.
    """
    greys = np.asarray(image.convert("L"))
    small, inner = _shrunk(greys), trim(greys)
    plain = _hash(small)
    return plain, plain if inner.shape == greys.shape else _hash(_shrunk(inner)), _hash(small[:, ::-1])


def of_bytes(data: bytes, max_pixels: int | None = None) -> tuple[int, int, int]:
    """`hashes` of an encoded picture, decoded as training does, but a JPEG at the smallest scale that suffices.

    Raises:
        DataError: the bytes are no picture, or one of more than `max_pixels`.
    """
    from vlmflow.vision.image import DEFAULT_MAX_PIXELS, decode_scaled

    return hashes(decode_scaled(data, lambda *_: (READ, READ), max_pixels or DEFAULT_MAX_PIXELS).image)


def trim(greys: np.ndarray) -> np.ndarray:
    """`greys` (height, width) without rows and columns at its edges that hold one colour; all of it where little is left."""
    top, bottom = _edges(greys)
    left, right = _edges(greys[top:bottom].T)
    height, width = greys.shape
    if bottom - top < LEAST * height or right - left < LEAST * width:
        return greys
    return greys[top:bottom, left:right]


def _edges(lines: np.ndarray) -> tuple[int, int]:
    """First and end of the lines that are not of the colour of the outermost line, from either side."""
    low, high = lines.min(axis=1).astype(int), lines.max(axis=1).astype(int)

    def run(order: slice) -> int:
        first, last = low[order], high[order]
        colour = (first[0] + last[0]) // 2
        inside = np.flatnonzero((np.abs(first - colour) > BORDER) | (np.abs(last - colour) > BORDER))
        return int(inside[0]) if len(inside) else len(lines)

    start = run(slice(None))
    return (0, len(lines)) if start == len(lines) else (start, len(lines) - run(slice(None, None, -1)))


def _shrunk(greys: np.ndarray) -> np.ndarray:
    from PIL import Image

    small = Image.fromarray(np.ascontiguousarray(greys)).resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


def _hash(small: np.ndarray) -> int:
    if small.std() < CONTRAST:
        return FLAT
    basis = _cosines()
    low = (basis @ small @ basis.T).ravel()[1:]
    bits = np.concatenate([[False], low > np.median(low) + 1e-6])  # what rounding alone tells apart is equal
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """(LOW, GRID): row k holds cos(pi k (x + 1/2) / GRID), the DCT-II without its constant factors."""
    return np.cos(np.pi * np.arange(LOW)[:, None] * (np.arange(GRID) + 0.5)[None] / GRID)


def distance(a: Any, b: Any) -> Any:
    """Bits in which hashes differ; of arrays, elementwise."""
    return np.bitwise_count(np.asarray(a, dtype=np.uint64) ^ np.asarray(b, dtype=np.uint64))
