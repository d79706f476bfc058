"""Decoders in one process share a fixed amount of memory.

A picture of a few kilobytes may take 800 MB to decode (a WebP of 50 megapixels). What a decode will take is known from the
header, so it waits for its share; one that would never get it is not decoded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from vlmflow.recipe.data import ResizeSpec

DECODE_BYTES = 192 << 20  # of all decodes at a time

# Bytes a pixel at the peak, measured with Pillow 12 on 49-megapixel files.
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "LA": 4, "RGB": 4, "RGBA": 4, "CMYK": 4}  # of a decoded picture
_WEBP = 16  # two canvases of the decoder and two copies
_PNG_MODES = ("1", "L", "LA", "RGB", "RGBA", "I;16")
_FLAT_MODES = ("L", "RGB", "CMYK")  # resized as they are; others are first laid on white in RGB
_FLATTENED = 20
_RESAMPLED = 12  # arrays of what is left after whole steps


class Budget:
    """Bytes that threads share: `with budget.share(n)` waits until they are free."""

    def __init__(self, total: int) -> None:
        self.total, self._used = total, 0
        self._changed = threading.Condition()

    @contextmanager
    def share(self, size: int) -> Iterator[None]:
        """Hold `size` bytes, at most all of them."""
        size = min(size, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._used + size <= self.total)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


DECODING = Budget(DECODE_BYTES)


def decode_bytes(image: Image.Image, kind: str, resize: ResizeSpec | None, whole: bool) -> int:
    """Bytes that decoding an opened picture takes at most; `whole` when its structure is known to be plain."""
    pixels, longest = image.width * image.height, max(image.width, image.height)
    stored = _STORED.get(image.mode, 4)
    shrink, extra = 8, 0.0
    if resize is not None:
        while shrink > 1 and longest < shrink * resize.side:
            shrink //= 2
        rest = longest // (shrink if kind == "JPEG" else 1)
        extra = _RESAMPLED / max(1, rest // resize.side) ** 2
        if image.mode not in _FLAT_MODES or "transparency" in image.info:
            extra += _FLATTENED
    if kind == "WEBP":
        return int(pixels * (_WEBP + extra))
    if kind != "JPEG":
        if resize is None and kind != "PNG":  # becomes PNG: a copy, and another where PNG has no such mode
            extra = stored + 1 if image.mode in _PNG_MODES else stored + 9
        return int(pixels * (stored + extra))
    several_scans = not whole or "progressive" in image.info or "progression" in image.info
    layers = getattr(image, "layer", ())
    most = max((part[1] * part[2] for part in layers), default=1)
    coefficients = 2 * pixels * sum(part[1] * part[2] for part in layers) // most if several_scans else 0
    return coefficients + int(pixels // shrink**2 * (stored + extra))
