"""Is this an image we may train on? Decided from the bytes alone, before anything big is decoded.

A server's Content-Type is a claim. The kind is sniffed from the first bytes, the size read from the header (a 2.6 MB PNG
of 30,000 x 30,000 pixels costs 5 GB to decode, spec/data-eval-soup.md 1.2), and only then is the picture decoded once to
prove that it is whole; JPEG at 1/8 scale, which reads the whole bit stream for a third of the time. A bit that flipped inside
a JPEG's pixel data stays unseen: its decoder only warns, and Pillow does not pass the warning on; PNG has checksums.

Kept are the bytes as they came, with orientation tag and colour profile. What is another file at the same time (an archive,
page or script inside an image) is refused: such files are made to be served as that other thing.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from vlmflow.curation.decode_memory import DECODING, decode_bytes
from vlmflow.curation.proof import jpeg, plain_jpeg, png, png_checked
from vlmflow.curation.resize import resized, target
from vlmflow.digest import sha256_bytes
from vlmflow.vision.rgb import to_rgb

if TYPE_CHECKING:
    from PIL import Image

    from vlmflow.recipe.data import ResizeSpec

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # stored as they came
CONVERTED = {"GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}  # first frame stored as PNG, lossless
_MAGIC = [
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
]
_STRUCTURE: dict[str, Callable[[bytes], bool]] = {"JPEG": jpeg, "PNG": png}
_ORIENTATION = 0x0112  # EXIF tag
_LARGE = 4_000_000  # pixels from which it matters that a JPEG's structure says how much memory a decode takes
_PNG_TURNS = (b"eXIf", b"Raw profile type", b"tiff:Orientation")  # Pillow decodes a whole PNG to look for them
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_SCRIPT = re.compile(rb"<(?:!doctype html|html|script|\?php)", re.IGNORECASE)
_SCRIPT_EDGE = 64 << 10  # bytes at the beginning, and a sixteenth of it at the end, in which scripts are looked for
_RAR_ENDS = (b"\xc4\x3d\x7b\x00\x40\x07\x00", b"\x1d\x77\x56\x51\x03\x05\x04\x00")


class Rejected(Exception):
    """The bytes are refused: `reason` is a code, `detail` a sentence for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Accepted:
    """An image fit for a shard. Width and height in pixels as displayed, i.e. after EXIF orientation.

    The last three are set where `data` are not the bytes that came: the format they had, their sha256, and their size.
    """

    data: bytes
    format: str
    width: int
    height: int
    converted_from: str | None = None
    source_sha256: str | None = None
    resized_from: tuple[int, int] | None = None

    def about(self, sha256: str) -> dict[str, Any]:
        """The image's entry in a sample's ``meta["images"]``; `sha256` is that of `data`."""
        entry: dict[str, Any] = {"sha256": sha256, "width": self.width, "height": self.height, "format": self.format}
        for name in ("converted_from", "source_sha256", "resized_from"):
            if (value := getattr(self, name)) is not None:
                entry[name] = list(value) if isinstance(value, tuple) else value
        return entry


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format that the first bytes announce, or None."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def accept(data: bytes, max_pixels: int, resize: ResizeSpec | None = None, proof: str = "decode") -> Accepted:
    """Check one image; convert it to PNG where its format is not one that shards keep, or shrink it as `resize` asks.

    `proof` is how a JPEG is shown to be whole: "decode" it at 1/8, or by its "structure" where that is plain
    (`vlmflow.curation.proof`). PNG is always judged by its checksums. Decoders wait for their share of memory.

    Raises:
        Rejected: not_an_image, polyglot, too_many_pixels or corrupt.
    """
    from PIL import Image

    kind = sniff(data)
    if kind is None:
        head = data[:256].lstrip().lower()
        looks = (
            "HTML" if b"<html" in head or head.startswith(b"<!doctype") else "SVG" if b"<svg" in head else "other data"
        )
        raise Rejected("not_an_image", f"the first bytes announce {looks}, not JPEG, PNG, WebP, GIF, BMP or TIFF")
    if other := _other_file(data):
        raise Rejected("polyglot", f"a {kind} that is {other} too")
    if kind == "JPEG" and proof == "structure" and resize is None:
        plain = plain_jpeg(data)
        if plain and not plain[2] and plain[0] * plain[1] <= max_pixels:  # most pictures end here, without Pillow
            return Accepted(data, "jpg", *plain[:2])
    _quiet()
    formats = ["JPEG", "MPO"] if kind == "JPEG" else [kind]
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise Rejected(
                    "too_many_pixels", f"{width} x {height} = {width * height} pixels, the limit is {max_pixels}"
                )
            looked_at = kind == "PNG" or proof == "structure" or width * height > _LARGE
            whole = looked_at and kind in _STRUCTURE and _STRUCTURE[kind](data)
            if whole and not resize and kind == "PNG" and not any(mark in data for mark in _PNG_TURNS):
                return Accepted(data, KEPT[kind], width, height)
            if kind == "PNG" and not whole and not png_checked(data):
                raise Rejected("corrupt", "PNG with a chunk that was cut or has a wrong checksum")
            need = decode_bytes(image, kind, resize, whole)
            if need > DECODING.total:
                if whole and not resize:  # the structure is all that can be looked at
                    turned = kind == "JPEG" and image.getexif().get(_ORIENTATION, 1) in _TURNED
                    return Accepted(data, KEPT[kind], *((height, width) if turned else (width, height)))
                text = f"{width} x {height}: this {kind} takes {need >> 20} MiB to decode, the limit is {DECODING.total >> 20}"
                raise Rejected("too_many_pixels", text)
            with DECODING.share(need):
                return _decoded(image, kind, data, resize, whole and (kind == "PNG" or proof == "structure"))
    except Rejected:
        raise
    except Image.DecompressionBombError as error:  # Pillow looks first, and names the number of pixels
        found = re.search(r"\((\d+) pixels\)", str(error))
        count = found[1] if found else f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)}"
        raise Rejected("too_many_pixels", f"{count} pixels, the limit is {max_pixels}") from None
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged input
        raise Rejected("corrupt", f"{kind} that does not decode ({type(error).__name__})") from error


def _decoded(image: Any, kind: str, data: bytes, resize: ResizeSpec | None, proved: bool) -> Accepted:
    """What becomes of an opened picture; decodes it unless it is `proved` whole and stays as it is."""
    width, height = image.size
    if kind != "TIFF" and image.getexif().get(_ORIENTATION, 1) in _TURNED:  # Pillow turns TIFF itself
        width, height = height, width
    if resize and (size := target(width, height, resize)):
        shrunk = resized(image, size, resize)
        before = CONVERTED.get(kind)
        return Accepted(shrunk, resize.format, *size, before, sha256_bytes(data), (width, height))
    if kind in CONVERTED:
        return Accepted(_to_png(image), "png", width, height, CONVERTED[kind], sha256_bytes(data))
    if not proved:
        if kind == "JPEG":
            # in grey, which reads the colours' bits all the same, and in one piece: a tenth less time
            image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
            image.decodermaxblock = max(len(data), image.decodermaxblock)
        image.load()
    return Accepted(data, KEPT[kind], width, height)


@cache
def _quiet() -> None:
    """Pillow's warning about many pixels is our own check."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _other_file(data: bytes) -> str | None:
    """What else the bytes of an image are, by the marks that the other format's readers go by; None for nothing."""
    end = data.rfind(
        b"PK\x05\x06", max(0, len(data) - 65557)
    )  # a ZIP's directory ends the file, after its comment's length
    if end >= 0 and end + 22 + int.from_bytes(data[end + 20 : end + 22], "little") == len(data):
        return "a ZIP archive"
    if b"%PDF-" in data[:1024]:
        return "a PDF"
    if data.endswith(_RAR_ENDS):
        return "a RAR archive"
    found = _SCRIPT.search(data, 0, _SCRIPT_EDGE) or _SCRIPT.search(data, max(0, len(data) - _SCRIPT_EDGE // 16))
    return f"a page or script ({found[0].decode()})" if found else None


def _to_png(image: Image.Image) -> bytes:
    """The first frame, lossless in 8 bits and in 16-bit grey; what PNG cannot hold (32-bit, float) as training sees it."""
    from PIL import ImageOps

    image.seek(0)
    still = ImageOps.exif_transpose(image)
    if still.mode == "I;16B":
        still = still.convert("I").convert("I;16")
    if "transparency" in still.info or still.mode in ("PA", "RGBa", "La"):
        still = still.convert("RGBA")
    elif still.mode not in ("1", "L", "LA", "RGB", "RGBA", "I;16"):
        still = to_rgb(still)
    out = io.BytesIO()
    still.save(out, "PNG")
    return out.getvalue()
