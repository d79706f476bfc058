"""Photo-like JPEGs for the pull benchmark: 1/f noise with soft shapes, sizes spread as on the web.

The numbers to match are those of spec/data-eval-soup.md 1.1: about 90 kB and 0.74 megapixels on average, so that figures
compare with the ones measured there.
"""

from __future__ import annotations

import io
from pathlib import Path


def photo(number: int) -> bytes:
    """JPEG bytes that depend on `number` alone."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(number)
    pixels = 740_000 * np.exp(rng.normal(-0.32, 0.8))  # lognormal with mean 0.74 MP
    aspect = np.exp(rng.normal(0.2, 0.25))
    width, height = (int(max(96, min(4000, (pixels * aspect**sign) ** 0.5))) for sign in (1, -1))
    field = np.zeros((height, width, 3), np.float32)
    for octave in range(7):  # amplitude halves with every doubling of the frequency: a 1/f spectrum
        cells = (max(2, height * 2**octave // 256), max(2, width * 2**octave // 256))
        noise = rng.standard_normal((*cells, 3)).astype(np.float32)
        noise = 0.7 * noise.mean(axis=2, keepdims=True) + 0.3 * noise  # colours of photos vary less than brightness
        planes = [
            np.asarray(Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC))
            for c in range(3)
        ]
        field += np.stack(planes, axis=-1) * 60.0 / 1.3**octave
    image = Image.fromarray(np.clip(field + 120.0, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 5))):
        x, y = rng.integers(0, width), rng.integers(0, height)
        box = (int(x), int(y), int(x + rng.integers(20, width)), int(y + rng.integers(20, height)))
        draw.ellipse(box, fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=int(rng.integers(70, 93)))
    return out.getvalue()


def _make(task: tuple[int, str]) -> None:
    number, folder = task
    path = Path(folder) / f"{number:05d}.jpg"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(photo(number))
        temporary.replace(path)


def corpus(folder: Path, count: int) -> list[Path]:
    """The first `count` pictures, made in `folder` where they are missing (4,000 take a few minutes on 2 cores)."""
    from concurrent.futures import ProcessPoolExecutor

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(count)]
    missing = [(number, str(folder)) for number, path in enumerate(paths) if not path.exists()]
    if missing:
        with ProcessPoolExecutor() as pool:
            list(pool.map(_make, missing, chunksize=16))
    return paths
