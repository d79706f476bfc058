"""Images inside a table: base64 to pixels and back, with errors that name the cell."""

from __future__ import annotations

import base64
import binascii
import io
from typing import TYPE_CHECKING

from vlmflow.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 200_000_000  # a decompression bomb, not a benchmark image


def decode_image(value: str, where: str) -> Image:
    """base64 of an image file -> RGB image. `where` starts the message of the DataError that bad input raises."""
    from PIL import Image as pil

    if value.startswith("data:") and "," in value[:100]:
        value = value.split(",", 1)[1]
    try:
        raw = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise DataError(f"{where}: {len(value)} characters are not base64 ({e}). Write the image again.") from None
    try:
        with pil.open(io.BytesIO(raw)) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise DataError(f"{where}: {image.width} x {image.height} = {pixels} pixels; at most {MAX_PIXELS}.")
            return image.convert("RGB")
    except DataError:
        raise
    except Exception as e:  # Pillow raises many kinds for broken files
        raise DataError(f"{where}: {len(raw)} bytes do not decode as an image ({type(e).__name__}: {e}).") from None


def encode_image(image: Image, format: str = "PNG") -> str:
    """An image as the base64 text that the `image` column holds."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
