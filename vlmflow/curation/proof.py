"""Is a picture whole? Shown from its structure where that suffices, which costs a tenth of decoding it and no memory.

A decoder proves less than it seems: for libjpeg damaged pixel data is a warning that Pillow does not pass on, so a JPEG
that decodes has a readable header, usable tables, well-formed scans and an end. All of that can be looked up: `jpeg` is
true only for files that the decoder accepts (tests/test_curation_proof.py cuts and damages pictures to show it), and says
false, "let the decoder look", for anything unusual. PNG carries checksums over every byte, so `png` (checksums, inflated
length, row filters) proves more than a decode. Neither holds the pixels: a 50-megapixel PNG takes 200 MB to decode.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache

_RESTARTS = range(0xD0, 0xD8)
_MCU_BLOCKS = 10  # of an interleaved scan (ITU-T T.81, B.2.3)
_INFLATED = 1 << 20  # bytes inflated at a time
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG colour type
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def jpeg(data: bytes) -> bool:
    """Whether the structure shows that libjpeg reads this JPEG from header to end mark; False = the decoder must tell."""
    return plain_jpeg(data) is not None


def plain_jpeg(data: bytes) -> tuple[int, int, bool] | None:
    """Width, height, and whether notes of cameras and editors (EXIF, several pictures in one file) are in it, of a JPEG that
    is whole by its structure; None = the decoder must tell."""
    seen = _Jpeg()
    try:
        return (*seen.size, seen.noted) if seen.walk(data) else None
    except (IndexError, struct.error):
        return None


class _Jpeg:
    """What the markers of a JPEG have said so far."""

    def __init__(self) -> None:
        self.quantizers: set[int] = set()
        self.huffman: set[int] = set()  # table class * 16 + number
        self.parts: dict[int, tuple[int, int, int]] = {}  # component: sampling across, down, quantizer
        self.size = (0, 0)
        self.noted = False
        self.progressive = False
        self.restarts = 0
        self.scanned: set[int] = set()

    def walk(self, data: bytes) -> bool:
        place = 2
        while True:
            if data[place] != 0xFF:
                return False
            marker = data[place + 1]
            if marker == 0xD9:
                return bool(self.parts) and self.scanned == set(self.parts)
            length = int.from_bytes(data[place + 2 : place + 4], "big")
            body = data[place + 4 : place + 2 + length]
            if length < 2 or len(body) != length - 2:
                return False
            place += 2 + length
            if marker == 0xDA:
                if not self.scan(body):
                    return False
                end = _scan_end(data, place, bool(self.restarts))
                if end <= place:
                    return False
                place = end
            elif 0xE0 <= marker <= 0xEF:
                self.noted |= marker not in (0xE0, 0xE2, 0xEE) or body[:4] == b"MPF\0"
            elif marker != 0xFE and not self.table(marker, body):
                return False

    def table(self, marker: int, body: bytes) -> bool:
        """A table or frame header that is as it should be."""
        if marker == 0xDB:
            found = _quantizers(body)
            self.quantizers |= found or set()
            return found is not None
        if marker == 0xC4:
            tables = _huffman(body)
            self.huffman |= tables or set()
            return tables is not None
        if marker == 0xDD:
            self.restarts = int.from_bytes(body, "big")
            return len(body) == 2
        return marker in (0xC0, 0xC1, 0xC2) and not self.parts and self.frame(marker, body)

    def frame(self, marker: int, body: bytes) -> bool:
        precision, height, width = struct.unpack(">BHH", body[:5])
        parts = _components(body[5:])
        if precision != 8 or not height or not width or parts is None:
            return False
        self.parts, self.size, self.progressive = parts, (width, height), marker == 0xC2
        return True

    def scan(self, body: bytes) -> bool:
        """A scan header whose components and tables exist."""
        count = body[0]
        chosen, tables = body[1 : 1 + 2 * count : 2], body[2 : 2 + 2 * count : 2]
        if len(body) != 4 + 2 * count or not count or len(set(chosen)) != count or not set(chosen) <= set(self.parts):
            return False
        if count > 1 and sum(self.parts[c][0] * self.parts[c][1] for c in chosen) > _MCU_BLOCKS:
            return False
        if any(self.parts[c][2] not in self.quantizers for c in chosen):
            return False
        first, last, high, low = body[-3], body[-2], body[-1] >> 4, body[-1] & 15
        if not self.progressive:
            if (first, last, high, low) != (0, 63, 0, 0) or self.scanned or count != len(self.parts):
                return False
            self.scanned = set(chosen)
            return all(t >> 4 in self.huffman and 16 + (t & 15) in self.huffman for t in tables)
        if low > 13 or (high and low != high - 1) or (first == 0 and last) or not first <= last <= 63:
            return False
        if first == 0:
            if high == 0 and not all(t >> 4 in self.huffman for t in tables):
                return False
            self.scanned |= set(chosen)
            return True
        return count == 1 and chosen[0] in self.scanned and 16 + (tables[0] & 15) in self.huffman


def _scan_end(data: bytes, place: int, restarts: bool) -> int:
    """Where the marker after a scan's data stands, -1 for nowhere; 0xff 0x00 is data, and so are restart marks."""
    find = data.find  # by its own loop, which takes two thirds of a regular expression's time
    while (place := find(b"\xff", place)) >= 0:
        after = data[place + 1]
        if not after:
            place += 2
        elif after == 0xFF or (restarts and after in _RESTARTS):
            place += 1
        else:
            break
    return place


@lru_cache(256)
def _components(body: bytes) -> dict[int, tuple[int, int, int]] | None:
    """Components of a frame header, from their count on; by number: sampling across, down, quantizer."""
    if body[0] not in (1, 3, 4) or len(body) != 1 + 3 * body[0]:
        return None
    parts = {body[at]: (body[at + 1] >> 4, body[at + 1] & 15, body[at + 2]) for at in range(1, len(body), 3)}
    across, down = (max(part[i] for part in parts.values()) for i in (0, 1))
    usual = all(
        h in (1, 2, 4) and v in (1, 2, 4) and not across % h and not down % v and table < 4
        for h, v, table in parts.values()
    )
    return parts if usual and len(parts) == body[0] else None


@lru_cache(256)
def _quantizers(body: bytes) -> set[int] | None:
    found, at = set(), 0
    while at < len(body):
        wide, number = body[at] >> 4, body[at] & 15
        at += 1 + 64 * (wide + 1)
        if wide > 1 or number > 3 or at > len(body):
            return None
        found.add(number)
    return found


@lru_cache(256)
def _huffman(body: bytes) -> set[int] | None:
    """Table classes and numbers of a DHT segment whose codes libjpeg can build (jdhuff.c, jpeg_make_d_derived_tbl)."""
    found, at = set(), 0
    while at < len(body):
        kind, number = body[at] >> 4, body[at] & 15
        counts = body[at + 1 : at + 17]
        symbols = body[at + 17 : at + 17 + sum(counts)]
        if kind > 1 or number > 3 or len(counts) != 16 or sum(counts) > 256 or len(symbols) != sum(counts):
            return None
        code = 0
        for size, count in enumerate(counts, 1):
            code += count
            if count and code > 1 << size:
                return None
            code <<= 1
        if kind == 0 and any(symbol > 15 for symbol in symbols):
            return None
        found.add(kind * 16 + number)
        at += 17 + len(symbols)
    return found


def png(data: bytes) -> bool:
    """Whether a PNG is whole: every checksum, the inflated length and every row's filter; False = the decoder must tell
    (interlaced ones among them)."""
    place, header, palette, ended = 8, b"", False, False
    inflate = _Rows()
    while not ended:
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        body = memoryview(data)[place + 8 : place + 8 + length]
        check = data[place + 8 + length : place + 12 + length]
        if len(check) != 4 or zlib.crc32(body, zlib.crc32(name)) != int.from_bytes(check, "big"):
            return False
        place += 12 + length
        if name == b"IHDR":
            header = bytes(body)
            if len(header) != 13 or not inflate.start(*struct.unpack(">IIBBBBB", header)):
                return False
        elif name == b"IDAT" and (not header or (header[9] == 3 and not palette) or not inflate.add(body)):
            return False
        palette |= name == b"PLTE" and 0 < length <= 768 and not length % 3
        ended = name == b"IEND"
    return inflate.whole()


def png_checked(data: bytes) -> bool:
    """Whether every chunk of a PNG up to its end mark is there and has the right checksum. Pillow decodes pixel data without
    looking at theirs, and a bit that flipped is then grey noise from there on, not an error."""
    place = 8
    while place < len(data):
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        body = memoryview(data)[place + 8 : place + 8 + length]
        check = data[place + 8 + length : place + 12 + length]
        if len(check) != 4 or zlib.crc32(body, zlib.crc32(name)) != int.from_bytes(check, "big"):
            return False
        if name == b"IEND":
            break
        place += 12 + length
    return True


class _Rows:
    """The pixel rows of a PNG as they are inflated, a megabyte at a time."""

    def start(
        self, width: int, height: int, depth: int, colour: int, method: int, filters: int, interlaced: int
    ) -> bool:
        if method or filters or interlaced or depth not in _DEPTHS.get(colour, ()) or not width or not height:
            return False
        self._row = 1 + (width * depth * _CHANNELS[colour] + 7) // 8
        self._left = self._row * height
        self._at = 0  # bytes into the current row
        self._stream = zlib.decompressobj()
        return True

    def add(self, body: memoryview) -> bool:
        packed: bytes | memoryview = body
        while packed and not self._stream.eof:
            try:
                rows = self._stream.decompress(packed, _INFLATED)
            except zlib.error:
                return False
            packed = self._stream.unconsumed_tail
            self._left -= len(rows)
            heads = rows[(-self._at) % self._row :: self._row]
            if self._left < 0 or (heads and max(heads) > 4):
                return False
            self._at = (self._at + len(rows)) % self._row
        return True

    def whole(self) -> bool:
        return self._stream.eof and not self._left
