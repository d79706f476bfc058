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

DECODE_BYTES = 160 << 20  # of all decodes at a time

# Bytes a pixel at the peak, measured with Pillow 12: its own copy, the decoder's canvases, and what is made of them.
_DECODED = {"PNG": 4, "WEBP": 16, "GIF": 14, "BMP": 12, "TIFF": 14}
_MADE_OF_IT = 8  # upright, without transparency, in RGB: two more copies before a picture is small


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
    pixels = image.width * image.height
    if kind != "JPEG":
        return pixels * (_DECODED[kind] + (_MADE_OF_IT if resize else 0))
    several_scans = not whole or "progressive" in image.info or "progression" in image.info
    layers = getattr(image, "layer", ())
    most = max((part[1] * part[2] for part in layers), default=1)
    coefficients = 2 * pixels * sum(part[1] * part[2] for part in layers) // most if several_scans else 0
    if resize is None:
        return coefficients + pixels // 16  # decoded at 1/8
    shrink = 1
    while shrink < 8 and max(image.width, image.height) >= 2 * shrink * 2 * resize.side:
        shrink *= 2
    return coefficients + pixels // shrink**2 * (4 + _MADE_OF_IT)
