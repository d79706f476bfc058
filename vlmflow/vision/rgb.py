"""Any picture as 8-bit RGB, in the one way in which training, curation, evaluation and an exported model see it.

This file imports only NumPy and Pillow: it travels unchanged inside an exported Hugging Face model folder.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """A new 8-bit RGB picture, upright: orientation tags are applied, transparent pictures lie on white, 16-bit and float
    greyscale is scaled to 8 bits. The image must be loaded or loadable; Pillow's errors pass through."""
    image = ImageOps.exif_transpose(image)  # always a copy
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith("I;16") or mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if mode == "F":
            low, high = float(values.min()), float(values.max())
            values = (values - low) / (high - low) * 255.0 if high > low else np.zeros_like(values)
        elif mode != "I" or values.max() > 255:
            values = values / 257.0  # 16 bits: 65535 -> 255
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")
