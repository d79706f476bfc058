"""CATTY: consistent-aspect-ratio tiling for high-resolution images (POINTS 3.1), on PIL and NumPy in uint8.

An image is resized with its own aspect ratio kept, cut by an overlapping window into a grid of square tiles, and a
thumbnail is appended last. The pure size plan is separate from the pixels because training needs the number of
visual tokens of a sample long before its image is decoded; both go through the same function, so they agree.

This file imports only NumPy and Pillow: it travels unchanged inside an exported Hugging Face model folder.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image


class CattyPlan(NamedTuple):
    """Where CATTY cuts an image. Sizes in pixels; `columns * rows + 1` tiles come out (the last is the thumbnail)."""

    columns: int  # windows across (nw)
    rows: int  # windows down (nh)
    shrunk: tuple[int, int]  # (width, height) after the extreme-ratio step; the input size when the ratio is normal
    resized: tuple[int, int]  # (width, height) of the picture that is cut
    stride: tuple[int, int]  # (x, y) step between windows; the tile side where there is a single window

    @property
    def tiles(self) -> int:
        """Number of tiles including the thumbnail."""
        return self.columns * self.rows + 1


@lru_cache(maxsize=64)
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All ordered (columns, rows) with columns * rows <= max_tiles, smallest area first."""
    pairs = [(w, area // w) for area in range(1, max_tiles + 1) for w in range(1, area + 1) if area % w == 0]
    return tuple(pairs)


@lru_cache(maxsize=65536)
def catty_plan(width: int, height: int, tile: int = 336, max_tiles: int = 8) -> CattyPlan:
    """Plan the tiles of a `width` x `height` image from its size alone.

    Rules (official code `wepoints/utils/images/catty.py`; the equation printed in the paper is inverted):
    a ratio beyond `max_tiles` is first reduced to exactly that by shrinking the long side; the reference grid is the
    nearest ratio on the more elongated side, so that windows overlap and never leave gaps; among grids of equal ratio
    the one with the nearest area wins.

    Raises ValueError for sizes or limits below one.
    """
    if width < 1 or height < 1:
        raise ValueError(f"CATTY needs an image of at least 1x1 pixels, got {width}x{height}")
    if tile < 1 or max_tiles < 1:
        raise ValueError(f"CATTY needs tile >= 1 and max_tiles >= 1, got tile={tile}, max_tiles={max_tiles}")
    if width > max_tiles * height:
        width = max_tiles * height
    elif height > max_tiles * width:
        height = max_tiles * width
    # All comparisons are in exact integers: |nw/nh - w/h| * (nh * h) and |nw*nh*tile^2 - w*h|.
    candidates = [
        (columns, rows)
        for columns, rows in _grids(max_tiles)
        if (width == height)
        or (width < height and columns * height <= width * rows)
        or (width > height and columns * height >= width * rows)
    ]
    columns, rows = candidates[0]
    for c, r in candidates[1:]:
        # |c/r - w/h| < |columns/rows - w/h|, both multiplied by r * rows * h
        new, old = abs(c * height - r * width) * rows, abs(columns * height - rows * width) * r
        if new < old or (
            new == old
            and abs(c * r * tile * tile - width * height) < abs(columns * rows * tile * tile - width * height)
        ):
            columns, rows = c, r
    if width < height:
        target_width = columns * tile
        target_height = height * target_width // width
    else:
        target_height = rows * tile
        target_width = width * target_height // height
    stride_x, columns = _windows(target_width, tile, columns)
    stride_y, rows = _windows(target_height, tile, rows)
    return CattyPlan(columns, rows, (width, height), (target_width, target_height), (stride_x, stride_y))


def _windows(side: int, tile: int, count: int) -> tuple[int, int]:
    """(stride, windows) along one axis; the stride is the tile side where there is a single window.

    A picture that outgrows the tile by fewer pixels than there are steps has stride 0; the official loop then makes
    one window there (it happens with few tiles, e.g. 1000x1001 at max_tiles 4, never at 8 or 12).
    """
    stride = (side - tile) // (count - 1) if count > 1 else 0
    return (stride, count) if stride else (tile, 1)


def catty_count(width: int, height: int, tile: int = 336, max_tiles: int = 8) -> int:
    """Number of tiles (thumbnail included) that `catty_tiles` returns for an image of this size."""
    return catty_plan(width, height, tile, max_tiles).tiles


def catty_pixels(width: int, height: int, tile: int = 336, max_tiles: int = 8) -> tuple[int, int]:
    """Size to which `catty_tiles` brings an image of this size before it cuts: more pixels are not needed."""
    return catty_plan(width, height, tile, max_tiles).resized


def catty_tiles(
    image: Image.Image, tile: int = 336, max_tiles: int = 8, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Cut `image` into CATTY tiles: uint8 array [tiles, tile, tile, 3], windows row by row, thumbnail last.

    `size` is that of the whole picture when `image` was decoded at a smaller scale (at least `catty_pixels`); it is then
    resized once, also where an extreme ratio is mended.

    The thumbnail is the resized picture squashed to a square, and is there even for a single window (official code).
    Resampling is PIL bilinear. Normalisation is the model's work, on the device.
    """
    if image.mode != "RGB":
        image = image.convert("RGB")
    whole = size or image.size
    plan = catty_plan(*whole, tile, max_tiles)
    if plan.shrunk != whole == image.size:
        image = image.resize(plan.shrunk, Image.Resampling.BILINEAR)
    if plan.resized != image.size:
        image = image.resize(plan.resized, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    out = np.empty((plan.tiles, tile, tile, 3), dtype=np.uint8)
    step_x, step_y = plan.stride
    index = 0
    for row in range(plan.rows):
        for column in range(plan.columns):
            top, left = row * step_y, column * step_x
            out[index] = pixels[top : top + tile, left : left + tile]
            index += 1
    out[index] = np.asarray(image.resize((tile, tile), Image.Resampling.BILINEAR))
    return out
