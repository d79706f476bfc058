"""Is this an image we may train on? Decided from the bytes alone, before anything big is decoded.

A server's Content-Type is a claim. The kind is sniffed from the first bytes, the size read from the header (a 2.6 MB PNG
of 30,000 x 30,000 pixels costs 5 GB to decode, spec/data-eval-soup.md 1.2), and only then is the picture decoded once to
prove that it is whole; JPEG at 1/8 scale, which reads the whole bit stream for a third of the time.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

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
_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap width and height


class Rejected(Exception):
    """The bytes are refused: `reason` is a code, `detail` a sentence for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Accepted:
    """An image fit for a shard. Width and height in pixels as displayed, i.e. after EXIF orientation."""

    data: bytes
    format: str
    width: int
    height: int
    converted_from: str | None = None


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format that the first bytes announce, or None."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def accept(data: bytes, max_pixels: int) -> Accepted:
    """Check one image and, where its format is not one that shards keep, convert it to PNG.

    Raises:
        Rejected: not_an_image, too_many_pixels or corrupt.
    """
    from PIL import Image

    kind = sniff(data)
    if kind is None:
        head = data[:256].lstrip().lower()
        looks = (
            "HTML" if b"<html" in head or head.startswith(b"<!doctype") else "SVG" if b"<svg" in head else "other data"
        )
        raise Rejected("not_an_image", f"the first bytes announce {looks}, not JPEG, PNG, WebP, GIF, BMP or TIFF")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    formats = ["JPEG", "MPO"] if kind == "JPEG" else [kind]
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise Rejected(
                    "too_many_pixels", f"{width} x {height} = {width * height} pixels, the limit is {max_pixels}"
                )
            if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            if kind in CONVERTED:
                return Accepted(_to_png(image), "png", width, height, CONVERTED[kind])
            if kind == "JPEG":
                image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except Rejected:
        raise
    except Image.DecompressionBombError as error:  # Pillow looks first, and names the number of pixels
        found = re.search(r"\((\d+) pixels\)", str(error))
        count = found[1] if found else f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)}"
        raise Rejected("too_many_pixels", f"{count} pixels, the limit is {max_pixels}") from None
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged input
        raise Rejected("corrupt", f"{kind} that does not decode ({type(error).__name__})") from error
    return Accepted(data, KEPT[kind], width, height)


def _to_png(image: object) -> bytes:
    from PIL import Image, ImageOps

    assert isinstance(image, Image.Image)
    still = ImageOps.exif_transpose(image)
    if still.mode not in ("1", "L", "LA", "RGB", "RGBA", "I;16"):
        still = still.convert("RGBA" if "transparency" in still.info or still.mode in ("PA", "RGBa") else "RGB")
    out = io.BytesIO()
    still.save(out, "PNG")
    return out.getvalue()
