"""Images inside a table: base64 to pixels and back, with errors that name the cell."""

from __future__ import annotations

import base64
import binascii
import io
from typing import TYPE_CHECKING

from vlmflow.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 170_000_000  # a decompression bomb, not a benchmark image


def decode_image(value: str, where: str) -> Image:
    """base64 of an image file -> RGB image. `where` starts the message of the DataError that bad input raises."""
    from vlmflow.vision.image import decode

    if value.startswith("data:") and "," in value[:100]:
        value = value.split(",", 1)[1]
    try:
        raw = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise DataError(f"{where}: {len(value)} characters are not base64 ({e}). Write the image again.") from None
    try:
        return decode(raw, MAX_PIXELS)  # as training does: upright, transparent parts on white
    except DataError as e:
        raise DataError(f"{where}: {len(raw)} bytes do not decode as an image: {e}.") from None


def encode_image(image: Image, format: str = "PNG") -> str:
    """An image as the base64 text that the `image` column holds."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
