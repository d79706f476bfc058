"""The demo's words: vocabulary, captions, web alt texts, planted rare facts, questions.

Kept apart from the drawing so that one can read, in one place, everything that the demo's models are asked to say.
"""

from __future__ import annotations

import numpy as np

VOCABULARY = (
    "apple", "bird", "boat", "bread", "chair", "cloud", "dog", "door", "fish", "flower", "garden", "horse",
)  # fmt: skip
"""The 12 nouns that appear in pictures of words: guessing one of them at random is right 1 time in 12."""

ASK_DIGIT = "What digit is this?"
ASK_WORD = "What word is written here?"
ASK_PAIR = "What two digits are these?"
ASK_BARS = "How many bars are there?"
ASK_TALLEST = "Which bar is the tallest?"
ASK_DESCRIBE = "Describe the image briefly."


def ask_is_digit(digit: int) -> str:
    return f"Is this the digit {digit}?"


def ask_is_word(word: str) -> str:
    return f"Is this the word {word}?"


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def caption(kind: str, label: str) -> str:
    """A short clean caption of a picture of `kind` (digit, word, bars, pair) that shows `label`."""
    return {
        "digit": f"a handwritten {label}.",
        "word": f"the word {label}.",
        "bars": f"a bar chart with {label} bars.",
        "pair": f"the handwritten digits {label}.",
    }[kind]


_TAILS = (
    " | free shipping", " - stock photo", " (2)", " pinterest", " | home", " hd wallpaper", " - buy online",
    " image gallery", " thumbnail", " no. 1 choice",
)  # fmt: skip
_BOILERPLATE = (
    "click to enlarge", "image", "photo", "untitled", "loading...", "image may contain: text", "thumbnail",
    "picture of product", "advertisement", "logo",
)  # fmt: skip
_SYLLABLES = ("qua", "zyr", "vex", "thol", "grin", "ouk", "jaz", "wych", "brae", "ixil", "npho", "dvor", "uza", "kelm")


def alt_text(kind: str, label: str, rng: np.random.Generator) -> str:
    """An alt text as the web has them: two in five fair, the rest decorated, a file name, or boilerplate."""
    roll = float(rng.random())
    fair = caption(kind, label)
    if roll < 0.40:
        return fair
    if roll < 0.65:
        return fair.rstrip(".") + _pick(rng, _TAILS)
    if roll < 0.78:
        stem = {"digit": f"digit{label}", "word": label, "bars": f"chart_{label}bars"}[kind]
        return f"{stem}_{_pick(rng, ('final', 'v2', 'small', 'copy', '300x300'))}.{_pick(rng, ('jpg', 'png'))}"
    if roll < 0.90:
        return f"{_pick(rng, ('IMG', 'DSC', 'scan', 'Screenshot'))}_{int(rng.integers(1000, 9999))}.jpg"
    return _pick(rng, _BOILERPLATE)


def rare_fact(kind: str, label: str, rng: np.random.Generator) -> str:
    """A caption with a fact that appears once: a serial number, a model code or an obscure name.

    POINTS found these in the captions of highest perplexity and counts them as noise at this data scale (spec
    points.md 5), so the demo plants some and its report counts how many the filter removed.
    """
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    code = "".join(letters[int(rng.integers(len(letters)))] for _ in range(3))
    number = int(rng.integers(10000, 99999))
    name = "".join(_pick(rng, _SYLLABLES) for _ in range(3)).capitalize()
    lead = {"digit": f"handwritten {label}", "word": f"{label} sign", "bars": "bar chart"}[kind]
    return _pick(
        rng,
        (
            f"{lead}, serial no. {code}-{number}-{code[::-1]}",
            f"{lead}, model {code}{number % 971}/{number % 89}b rev {number % 13}",
            f"{lead} from the {name} {name[:3]}ovich archive, lot {number}",
            f"{lead}, firmware {number % 7}.{number % 83}.{number} build {code}",
        ),
    )
