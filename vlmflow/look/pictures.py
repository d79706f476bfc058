"""Small pictures made when they are looked at, held in a cache of bounded size."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

from vlmflow.errors import DataError
from vlmflow.vision.image import decode_scaled

SIDE = 320  # pixels, longer side; shown at about half of that
CACHE_BYTES = 64 << 20
DECODERS = 2  # pictures decoded at a time: one of the largest allowed takes half a GiB


class Thumbnails:
    """JPEG thumbnails by name; the least recently used are forgotten. Threads may share it."""

    def __init__(self, limit: int = CACHE_BYTES, side: int = SIDE) -> None:
        self.limit, self.side, self.held = limit, side, 0
        self._made: OrderedDict[object, bytes] = OrderedDict()
        self._lock, self._decoders = threading.Lock(), threading.BoundedSemaphore(DECODERS)

    def found(self, name: object) -> bytes | None:
        """The thumbnail of this name, if it is still held."""
        with self._lock:
            if name in self._made:
                self._made.move_to_end(name)
            return self._made.get(name)

    def make(self, name: object, data: bytes) -> bytes:
        """The thumbnail of encoded `data`. Raises DataError when they do not decode."""
        with self._decoders:
            made = thumbnail(data, self.side)
        with self._lock:
            self.held += len(made) - len(self._made.pop(name, b""))
            self._made[name] = made
            while self.held > self.limit and len(self._made) > 1:
                self.held -= len(self._made.popitem(last=False)[1])
        return made


def thumbnail(data: bytes, side: int = SIDE) -> bytes:
    """A JPEG of at most `side` pixels. Raises DataError when the bytes do not decode."""
    small = decode_scaled(data, lambda *_: (side, side)).image
    small.thumbnail((side, side))
    out = io.BytesIO()
    try:
        small.save(out, "JPEG", quality=82)
    except (OSError, ValueError) as error:
        raise DataError(f"a picture of {small.size[0]}x{small.size[1]} cannot be made a thumbnail: {error}") from error
    return out.getvalue()
