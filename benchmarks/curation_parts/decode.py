"""JPEGs decoded at the scale that tiling needs (`decode_scaled`) against whole decoding, both to the same tiles.

Photographs of 1300x850 and larger, made by the run. A tiling says to which size it brings a picture before it cuts it;
where that is at most half, libjpeg decodes at 1/2, 1/4 or 1/8. Tiles must agree in number and nearly in pixels first.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

SIZES = ((1300, 850), (2000, 1500), (4000, 3000))
TILINGS = (
    (336, 8),
    (336, 4),
    (336, 1),
    (224, 1),
    (56, 4),
)  # POINTS; the loader's benchmark; single tiles; the tiny recipe
MOST_DIFFERENT = 3.0  # of 255, mean over a picture's tiles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--pictures", type=int, default=None, help="of the smallest size; default 12, with --quick 2")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured; the median counts")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the pictures, check the tiles, measure CPU milliseconds, print the table."""
    from vlmflow.vision.catty import catty_pixels, catty_tiles
    from vlmflow.vision.image import decode, decode_scaled

    pictures = arguments.pictures or (2 if arguments.quick else 12)
    rounds = 1 if arguments.quick else arguments.rounds
    rows = []
    print(
        f"{'picture':<12}{'tiling':<10}{'cut from':<12}{'decoded at':<12}{'decode ms':>18}{'':>7}{'with tiles ms':>18}{'':>7}{'difference':>12}"
    )
    for size in SIZES[:1] if arguments.quick else SIZES:
        fewer = max(2, pictures * SIZES[0][0] * SIZES[0][1] // (size[0] * size[1]))  # as many pixels of each size
        stored = [photo(*size, seed) for seed in range(fewer)]
        for tile, max_tiles in TILINGS:

            def least(width: int, height: int, tile: int = tile, max_tiles: int = max_tiles) -> tuple[int, int]:
                return catty_pixels(width, height, tile, max_tiles)

            def whole(data: bytes, tile: int = tile, max_tiles: int = max_tiles) -> Any:
                return catty_tiles(decode(data), tile, max_tiles)

            def scaled(data: bytes, least: Any = least, tile: int = tile, max_tiles: int = max_tiles) -> Any:
                picture, full = decode_scaled(data, least)
                return catty_tiles(picture, tile, max_tiles, full)

            difference = max(_difference(whole(data), scaled(data)) for data in stored)
            if difference > MOST_DIFFERENT:
                raise SystemExit(
                    f"tiles of {size} differ by {difference:.2f} of 255 on average, more than {MOST_DIFFERENT}"
                )
            alone = _versus(decode, partial(decode_scaled, least=least), stored, rounds)
            tiled = _versus(whole, scaled, stored, rounds)
            at = decode_scaled(stored[0], least).image.size
            row = {
                "picture": list(size),
                "tile": tile,
                "max_tiles": max_tiles,
                "cut_from": list(least(*size)),
                "decoded_at": list(at),
                "decode_ms": alone,
                "with_tiles_ms": tiled,
                "mean_difference": round(difference, 2),
            }
            rows.append(row)
            print(
                f"{_by(size):<12}{f'{tile} x {max_tiles}':<10}{_by(least(*size)):<12}{_by(at):<12}{_pair(alone):>25}{_pair(tiled):>25}{difference:>12.2f}",
                flush=True,
            )
    return {"pictures": pictures, "rounds": rounds, "rows": rows, "versions": {"pillow": version("pillow")}}


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG that costs a decoder what a photograph does: noise of many sizes, about 1 bit a pixel at quality 88."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for octave in range(1, 8):
        shape = (max(2, height * 2**octave // 512), max(2, width * 2**octave // 512), 3)
        cells = Image.fromarray(chance.integers(0, 256, shape, dtype=np.uint8))
        total += np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / octave
    total = (total - total.min()) / (total.max() - total.min()) * 255
    buffer = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _difference(one: Any, two: Any) -> float:
    """Mean absolute difference of two sets of tiles, of 255. Ends the run when their number differs."""
    if one.shape != two.shape:
        raise SystemExit(f"whole decoding gives {one.shape} tiles, scaled decoding {two.shape}")
    return float(abs(one.astype("int16") - two).mean())


def _versus(one: Callable[[bytes], Any], two: Callable[[bytes], Any], stored: list[bytes], rounds: int) -> list[float]:
    """CPU milliseconds a picture of both, in turns (A/B, B/A); the median of the rounds."""
    found: dict[int, list[float]] = {0: [], 1: []}
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            began = time.process_time()
            for data in stored:
                (one, two)[which](data)
            found[which].append((time.process_time() - began) / len(stored) * 1e3)
    return [round(statistics.median(found[which]), 2) for which in (0, 1)]


def _by(size: Any) -> str:
    return f"{size[0]}x{size[1]}"


def _pair(times: list[float]) -> str:
    return f"{times[0]:.1f} -> {times[1]:.1f} ({times[0] / times[1]:.2f}x)"
