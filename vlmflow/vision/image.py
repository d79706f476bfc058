"""Bytes to an RGB picture, safely: images come from the open web, so nothing about them is believed.

The size is read from the header and checked before any pixel is decoded (decompression bombs), orientation tags are
applied, and every colour mode ends as 8-bit RGB in the same way wherever vlmflow decodes an image.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from vlmflow.errors import DataError
from vlmflow.vision.rgb import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Pillow's own hard limit. Images of shards met the recipe's limit (pull.max_pixels) when they were pulled; a lower one
# here would let a training stop in the middle at a picture that the recipe allows.
DEFAULT_MAX_PIXELS = 178_956_970


_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 lie on their side


class Scaled(NamedTuple):
    """A picture that may have been decoded smaller than it is stored, and its stored (width, height), upright."""

    image: Image.Image
    size: tuple[int, int]


def decode(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode `data` to an RGB image, upright.

    Takes the first frame of an animation; puts transparent pictures on white; scales 16-bit and float greyscale to
    8 bits. Raises DataError when the bytes are no image of a known format, declare more than `max_pixels` pixels, or
    are truncated. Pillow's global bomb limit is left alone and still applies to larger sizes.
    """
    return decode_scaled(data, None, max_pixels).image


def decode_scaled(
    data: bytes, least: Callable[[int, int], tuple[int, int]] | None, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Scaled:
    """Decode `data` no larger than needed: a JPEG at 1/2, 1/4 or 1/8 of its size where that is still enough.

    libjpeg then leaves out the high frequencies that a resize would average away: several times faster with the resize
    that follows. Pixels after that resize differ from whole decoding by 0.3 to 2 of 255 on average, so nothing that
    must agree to the bit with another decoder may use it. Whoever cuts the picture takes `Scaled.size` for its size.

    Args:
        least: stored (width, height), upright, to the smallest that will do; None decodes whole.

    Raises: as `decode`.
    """
    if not data:
        raise DataError("the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"the image declares {width}x{height} = {width * height} pixels, over the limit of {max_pixels}; "
                    "not decoded, because such files can exhaust memory"
                )
            image.seek(0)
            size = None
            if least and isinstance(image, JpegImageFile):
                turned = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
                size = (height, width) if turned else (width, height)
                wanted = least(*size)
                image.draft(None, wanted[::-1] if turned else wanted)
            image.load()
            picture = to_rgb(image)  # a copy, independent of the buffer
            return Scaled(picture, size or picture.size)
    except DataError:
        raise
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, ValueError, struct.error, bombs
        raise DataError(
            f"cannot decode the image ({len(data)} bytes): {type(error).__name__}: {error}; "
            "the file is truncated, damaged or of an unknown format"
        ) from error
