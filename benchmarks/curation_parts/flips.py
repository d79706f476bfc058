"""Single flipped bits in the pixel data of pictures: how many each proof of `pull` sees, and how many libjpeg's warnings show.

Photographs made by the run, in several encodings; one bit anywhere in a JPEG's scans, or in the middle nine tenths of another
file. Beside what is seen: how far the pictures are off whose flip the decoder does not see, in grey levels of 255.
libjpeg's warnings are read through simplejpeg (`pip install simplejpeg`, not needed otherwise); without it they are left out.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

ENCODINGS: dict[str, dict[str, Any]] = {
    "JPEG 4:2:0, quality 85": {"format": "JPEG", "quality": 85},
    "JPEG 4:4:4, quality 95": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "JPEG optimised, quality 75": {"format": "JPEG", "quality": 75, "optimize": True},
    "JPEG progressive, quality 85": {"format": "JPEG", "quality": 85, "progressive": True},
    "PNG": {"format": "PNG"},
    "WebP, quality 80": {"format": "WEBP", "quality": 80},
    "WebP lossless": {"format": "WEBP", "lossless": True},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument("--flips", type=int, default=100, help="of each picture and encoding, one at a time")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Flip bits, ask every proof, print the table."""
    from PIL import Image

    from curation_parts.corpus import photo

    pictures, flips = (2, 5) if arguments.quick else (arguments.pictures, arguments.flips)
    strict = find_spec("simplejpeg") is not None
    photos = []
    for number in range(pictures):
        image = Image.open(io.BytesIO(photo(number)))
        image.thumbnail((640, 640))
        photos.append(image)
    rows = []
    print(
        f"{'':<30}{'flips':>7}{'structure':>11}{'decode':>9}{'libjpeg warns':>15}{'unseen: off by, median':>24}{'a tenth above':>15}"
    )
    for name, options in ENCODINGS.items():
        row = {"encoding": name, **_measured(photos, options, flips, strict)}
        rows.append(row)
        warned = "-" if row["warned"] is None else f"{row['warned']:.1%}"
        median, tenth = ("-" if row[key] is None else row[key] for key in ("off_median", "off_tenth"))
        print(
            f"{name:<30}{row['flips']:>7}{row['structure']:>11.1%}{row['decode']:>9.1%}{warned:>15}{median:>24}{tenth:>15}",
            flush=True,
        )
    packages = {name: version(name) for name in ("pillow", *(["simplejpeg"] if strict else []))}
    return {"pictures": pictures, "flips": flips, "rows": rows, "versions": packages}


def _measured(photos: list[Any], options: dict[str, Any], flips: int, strict: bool) -> dict[str, Any]:
    chance, seen, off, tried = random.Random(0), Counter[str](), list[float](), 0
    jpeg = options["format"] == "JPEG"
    for image in photos:
        out = io.BytesIO()
        image.save(out, **options)
        data = out.getvalue()
        if _refused(data, "decode") or _refused(data, "structure") or (jpeg and strict and _warned(data)):
            raise SystemExit(f"the picture is refused before a bit of it was flipped ({options})")
        places = _scans(data) if jpeg else range(len(data) // 20, len(data) - len(data) // 20)
        for place in chance.sample(places, flips):
            broken = bytearray(data)
            broken[place] ^= 1 << chance.randrange(8)
            found = {"structure": _refused(bytes(broken), "structure"), "decode": _refused(bytes(broken), "decode")}
            seen.update(how for how, refused in found.items() if refused)
            seen["warned"] += jpeg and strict and _warned(bytes(broken))
            tried += 1
            if not found["decode"]:
                off.append(_difference(data, bytes(broken)))
    off.sort()
    return {
        "flips": tried, "structure": seen["structure"] / tried, "decode": seen["decode"] / tried,
        "warned": seen["warned"] / tried if jpeg and strict else None,
        "off_median": round(statistics.median(off), 3) if off else None,
        "off_tenth": round(off[int(len(off) * 0.9)], 1) if off else None,
    }  # fmt: skip


def _refused(data: bytes, proof: str) -> bool:
    from vlmflow.curation.accept import Rejected, accept

    try:
        accept(data, 50_000_000, proof=proof)
    except Rejected:
        return True
    return False


def _warned(data: bytes) -> bool:
    import simplejpeg

    try:
        simplejpeg.decode_jpeg(data, colorspace="GRAY", min_factor=8, strict=True)
    except ValueError:
        return True
    return False


def _scans(data: bytes) -> list[int]:
    """Places of a JPEG's entropy-coded bytes."""
    places, at = list[int](), 2
    while data[at + 1] != 0xD9:
        scan = data[at + 1] == 0xDA
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        start = at
        while scan and not (data[at] == 0xFF and data[at + 1] != 0 and not 0xD0 <= data[at + 1] <= 0xD7):
            at += 1
        places += range(start, at)
    return places


def _difference(one: bytes, two: bytes) -> float:
    """Mean absolute difference of two pictures, of 255."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16) for data in (one, two))
    return float(abs(a - b).mean()) if a.shape == b.shape else 255.0
