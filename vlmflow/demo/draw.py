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

_INKS = ((12, 12, 14), (24, 28, 56), (52, 24, 20))
_PAPERS = ((255, 255, 255), (250, 246, 236), (240, 244, 250))


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
    """Scan `index` enlarged smoothly to 56x56, ink on paper; its variety is that of the people who wrote it."""
    ink = Image.fromarray((digit_scans()[0][index] * 255).astype(np.uint8))
    return _print(ink.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC), rng)


def word(text: str, font: str, rng: np.random.Generator) -> Image.Image:
    """`text` on one line in the middle of 112x56 pixels, as large as fits up to a random size, slightly noisy."""
    width = 2 * HEIGHT
    size = int(rng.integers(26, 33))
    while True:
        left, top, right, bottom = _font(font, size).getbbox(text)
        if right - left <= width - 8:
            break
        size -= 1
    mask = Image.new("L", (width, HEIGHT), 0)
    x = (width - (right - left)) // 2 - left + int(rng.integers(-2, 3))
    y = (HEIGHT - (bottom - top)) // 2 - top + int(rng.integers(-2, 3))
    ImageDraw.Draw(mask).text((x, y), text, fill=255, font=_font(font, size))
    return _print(mask, rng)


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
