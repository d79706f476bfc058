"""Rendered pages of mixed size with known English text, the same on every machine that has the same fonts."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

COMMON = """the of and a to in is it you that he was for on are with as they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would other into
has more her two like him see time could no make than first been its who now people my made over did down only way find use may
water long little very after words called just where most know get through back much before go good new write our used me man
too any day same right look think also around another came come work three word must because does part even place well such here
take why things help put years different away again off went old number great tell men say small every found still between name
should home big give air line set own under read last never us left end along while might next sound below saw something thought
both few those always looked show large often together asked house world going want school important until form food keep
children feet land side without boy once animals life enough took sometimes four head above kind began almost live page got earth
need far hand high year mother light parts country father let night following picture being study second eyes soon times story
boys since white days ever paper hard near sentence better best across during today others however sure means knew try told young
miles sun ways thing whole hear example heard several change answer room sea against top turned learn point city play toward five
using himself usually money seen car morning body upon family later turn move face door cut done group true half red fish plants
living wanted black eat short United run book gave order open ground cold really table remember tree course front American space
inside ago sad early learned Friday Monday London river market 1987 2026 42 15% $300 7,500 e.g. kilometre"""
WORDS = COMMON.split()

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "/System/Library/Fonts")
WANTED = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "LiberationSans-Regular.ttf", "LiberationSerif-Regular.ttf", "Arial.ttf")


@dataclass(frozen=True)
class Kind:
    """One sort of page. `size` in pixels, `font` in pixels, `lines` of text a column."""

    name: str
    size: tuple[int, int]
    font: int = 0
    lines: int = 0
    columns: int = 1
    paper: bool = False
    share: int = 1  # pages of this kind in every round: photos outnumber documents, as on the web


KINDS = (
    Kind("textless photo", (640, 480), share=8),
    Kind("textless photo, large", (1280, 853), share=4),
    Kind("photo, 3 lines", (800, 600), font=30, lines=3, share=8),
    Kind("photo, 2 lines, portrait", (720, 1080), font=44, lines=2, share=4),
    Kind("banner", (468, 120), font=26, lines=2, share=6),
    Kind("A4-like page", (1240, 1754), font=27, lines=38, paper=True),
    Kind("dense page, two columns", (1240, 1754), font=20, lines=56, columns=2, paper=True),
)


@dataclass
class Page:
    """An image as a JPEG and the lines that stand on it, in reading order."""

    kind: str
    jpeg: bytes
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def fonts() -> list[str | None]:
    """Files of the fonts found on this machine; None stands for the one that Pillow carries."""
    found = {path.name: str(path) for folder in FOLDERS for path in Path(folder).rglob("*.ttf")}
    return [None, *(found[name] for name in WANTED if name in found)]


def pages(rounds: int, seed: int = 0) -> list[Page]:
    """`rounds` times every kind by its share, shuffled: what a shard of a web crawl looks like."""
    rng = np.random.default_rng(seed)
    faces = fonts()
    made = [_page(kind, rng, faces) for _ in range(rounds) for kind in KINDS for _ in range(kind.share)]
    return [made[i] for i in rng.permutation(len(made))]


def _page(kind: Kind, rng: np.random.Generator, faces: list[str | None]) -> Page:
    from PIL import ImageDraw, ImageFont

    scale = 1.0 if kind.paper else float(rng.uniform(0.8, 1.2))
    width, height = int(kind.size[0] * scale), int(kind.size[1] * scale)
    image = _paper(width, height, rng) if kind.paper else _photo(width, height, rng)
    lines: list[str] = []
    if kind.lines:
        face = faces[int(rng.integers(len(faces)))]
        font: Any = ImageFont.truetype(face, kind.font) if face else ImageFont.load_default(kind.font)
        pen = ImageDraw.Draw(image)
        margin = 70 if kind.paper else 24
        column = (width - margin * (kind.columns + 1)) // kind.columns
        step = (height - 2 * margin) / kind.lines if kind.paper else kind.font * 1.7
        top = margin if kind.paper else float(rng.uniform(8, max(9, height - kind.lines * step - 8)))
        for c in range(kind.columns):
            for n in range(kind.lines):
                full = kind.paper and n % 9 != 8
                line = _line(font, column if full else int(column * rng.uniform(0.4, 0.9)), rng)
                place = (margin + c * (column + margin), top + n * step)
                edge: Any = {} if kind.paper else {"stroke_width": 2, "stroke_fill": (10, 10, 10)}
                pen.text(place, line, font=font, fill=(25, 25, 25) if kind.paper else (250, 250, 245), **edge)
                lines.append(line)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return Page(kind.name, out.getvalue(), lines)


def _line(font: Any, width: int, rng: np.random.Generator) -> str:
    words = [WORDS[int(rng.integers(len(WORDS)))].capitalize()]
    while font.getlength(" ".join([*words, "something."])) < width:
        comma = "," if rng.random() < 0.1 else ""
        words.append(WORDS[int(rng.integers(len(WORDS)))] + comma)
    return " ".join(words).rstrip(",") + "."


def _paper(width: int, height: int, rng: np.random.Generator) -> Any:
    from PIL import Image

    pixels = rng.normal(246, 2, (height, width, 1)).clip(0, 255).astype("uint8")
    return Image.fromarray(np.repeat(pixels, 3, axis=2))


def _photo(width: int, height: int, rng: np.random.Generator) -> Any:
    """Soft colours, blobs and grain: no text, no sharp shapes that look like letters."""
    from PIL import Image, ImageFilter

    coarse = rng.integers(40, 190, (9, 12, 3)).astype("uint8")
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(6))
    grain = rng.normal(0, 5, (height, width, 1))
    return Image.fromarray((np.asarray(image, dtype=float) + grain).clip(0, 255).astype("uint8"))


def character_error_rate(pairs: list[tuple[str, str]]) -> float:
    """Edits needed to turn what was read into the truth, over the characters of the truth; white space runs count as one."""
    edits = sum(_distance(" ".join(truth.split()), " ".join(read.split())) for truth, read in pairs)
    return edits / max(1, sum(len(" ".join(truth.split())) for truth, _ in pairs))


def _distance(one: str, other: str) -> int:
    """Levenshtein distance, a row at a time: deletions and substitutions at once, insertions by a running minimum."""
    a, b = np.array([*map(ord, one)]), np.array([*map(ord, other)])
    row = np.arange(len(b) + 1)
    for n, char in enumerate(a, 1):
        best = np.concatenate([[n], np.minimum(row[:-1] + (b != char), row[1:] + 1)])
        row = np.minimum.accumulate(best - np.arange(len(best))) + np.arange(len(best))
    return int(row[-1])
