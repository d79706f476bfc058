"""Draws the demo's pictures: scanned digits, rendered words and bar plots.

The digits are UCI's handwritten ones that scikit-learn carries in its wheel; the fonts are those inside the wheels of
matplotlib and Pillow. So every picture comes from installed packages, no download and no system font is needed, and a
picture is a pure function of its arguments (each gets its own random generator): the same bytes every time.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT = 56
"""Side of a digit and height of a word, in pixels: one tile of the tiny recipe's vision encoder."""

TRAINING_FONTS = (
    "pillow",
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralItalic",
    "cmss10",
)
"""Fonts of every training picture. "pillow" is the face that Pillow embeds."""

HELD_OUT_FONTS = ("DejaVuSans-BoldOblique", "DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralBol", "cmb10")
"""Fonts of the benchmarks only: no training picture uses them."""

_INKS = ((20, 20, 24), (16, 32, 96), (112, 16, 24), (8, 72, 40), (72, 24, 96), (84, 48, 8))
_PAPERS = ((255, 255, 255), (250, 246, 232), (236, 242, 250), (240, 248, 238), (250, 236, 238), (232, 232, 232))


def png(image: Image.Image) -> bytes:
    """The picture as PNG bytes, without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


@lru_cache(maxsize=1)
def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """UCI's 1797 scans: float32 [1797, 8, 8] with ink 0..1, and their labels int64 [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target.astype(np.int64)


def digit(index: int, rng: np.random.Generator) -> Image.Image:
    """Scan `index` enlarged smoothly to 56x56, ink on paper, shifted by up to 3 px and turned by up to 6 degrees."""
    scan = digit_scans()[0][index]
    side = int(rng.integers(42, 49))
    ink = Image.fromarray((scan * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    mask = Image.new("L", (HEIGHT, HEIGHT), 0)
    middle = (HEIGHT - side) // 2
    mask.paste(ink, (middle + int(rng.integers(-3, 4)), middle + int(rng.integers(-3, 4))))
    return _print(mask.rotate(float(rng.uniform(-6, 6)), Image.Resampling.BILINEAR), rng)


def word(text: str, font: str, rng: np.random.Generator) -> Image.Image:
    """`text` on one line, 56 px high and as wide as it needs (112, 140 or 168 px), slightly turned and noisy."""
    face = _font(font, int(rng.integers(24, 33)))
    left, top, right, bottom = face.getbbox(text)
    width = next((w for w in (112, 140, 168) if right - left + 12 <= w), 168)
    if right - left + 8 > width:
        face = _font(font, 22)
        left, top, right, bottom = face.getbbox(text)
    mask = Image.new("L", (width, HEIGHT), 0)
    x = (width - (right - left)) // 2 - left + int(rng.integers(-2, 3))
    y = (HEIGHT - (bottom - top)) // 2 - top + int(rng.integers(-3, 4))
    ImageDraw.Draw(mask).text((x, y), text, fill=255, font=face)
    return _print(mask.rotate(float(rng.uniform(-2.5, 2.5)), Image.Resampling.BILINEAR), rng)


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of the same height side by side."""
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def _print(mask: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Ink (mask 255) on paper (mask 0) in a random pair of colours, with a little sensor noise."""
    ink = np.array(_INKS[int(rng.integers(len(_INKS)))], dtype=np.float32)
    paper = np.array(_PAPERS[int(rng.integers(len(_PAPERS)))], dtype=np.float32)
    cover = np.asarray(mask, dtype=np.float32)[:, :, None] / 255.0
    pixels = cover * ink + (1 - cover) * paper + rng.normal(0, 2.0, size=(*cover.shape[:2], 1))
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), "RGB")


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == "pillow":
        face = ImageFont.load_default(size)
        assert isinstance(face, ImageFont.FreeTypeFont), "Pillow was built without FreeType; its wheels have it"
        return face
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@dataclass
class BarPlotter:
    """Draws bar plots of 2 to 5 bars with matplotlib, 112x112 px.

    One figure is kept and its bars are moved, which is several times faster than building a figure a plot.
    """

    side: int = 112
    most: int = 5

    def __post_init__(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        dpi = 80
        figure = Figure(figsize=(self.side / dpi, self.side / dpi), dpi=dpi)
        self._canvas = FigureCanvasAgg(figure)
        self._axes = figure.add_axes((0.12, 0.16, 0.82, 0.78))
        self._axes.set_ylim(0, 10.5)
        self._axes.set_yticks([0, 5, 10], labels=[""] * 3)
        self._axes.tick_params(length=2, width=0.5)
        self._bars = self._axes.bar(range(self.most), [1] * self.most)
        self._figure = figure

    def draw(self, heights: list[int], rng: np.random.Generator) -> Image.Image:
        """A plot with one bar a height (1..10), left to right A, B, C ..., in one colour on a light background."""
        hue = _BARS[int(rng.integers(len(_BARS)))]
        red, green, blue = _PAPERS[int(rng.integers(len(_PAPERS)))]
        self._figure.set_facecolor((red / 255, green / 255, blue / 255))
        for i, bar in enumerate(self._bars):
            bar.set_visible(i < len(heights))
            if i < len(heights):
                bar.set_bounds(i - 0.35, 0, 0.7, heights[i])
                bar.set_facecolor(hue)
        self._axes.set_xlim(-0.7, len(heights) - 0.3)
        names = [chr(ord("A") + i) for i in range(len(heights))]
        self._axes.set_xticks(range(len(heights)), labels=names, fontsize=8)
        self._canvas.draw()
        return Image.fromarray(np.asarray(self._canvas.buffer_rgba())[:, :, :3].copy(), "RGB")


_BARS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:gray")
