"""Decides what every row of the demo's tables and benchmarks is, from one seed.

The split comes first: each of UCI's 1797 digit scans belongs to exactly one of seed, web, sft and benchmark, and the
benchmarks have their own fonts. Then each row gets its own random generator, so that changing the size of one table
leaves the others as they were.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vlmflow.demo import draw, wording
from vlmflow.evaluation.prompts import build
from vlmflow.evaluation.tsv import Question

SPLITS = {"seed": 0.18, "web": 0.23, "sft": 0.42, "benchmark": 0.17}
"""Share of the digit scans that each part of the demo may draw."""
DIGIT_PLACES, WORD_PLACES = (0, 3, 6), (1, 2, 4, 5)
"""Which of every eight rows of a caption table are digits and words; the eighth is a plot."""


@dataclass(frozen=True)
class Sizes:
    """Rows of each table and benchmark."""

    seed: int = 1200
    texts: int = 400
    web: int = 900
    base: int = 1000
    charts: int = 200
    pairs: int = 200
    describe: int = 200
    digits: int = 300
    words: int = 150
    mcq: int = 160
    yesno: int = 160
    broken: float = 0.06
    planted: float = 0.12


@dataclass
class Row:
    """One row of a table or benchmark before it is written: the picture, what it shows, and the row's fields."""

    kind: str
    label: str
    image: bytes
    fields: dict = field(default_factory=dict)


class Plan:
    """Draws every row. `seed` is the only source of chance."""

    def __init__(self, sizes: Sizes | None = None, seed: int = 17) -> None:
        self.sizes = sizes or Sizes()
        self.seed = seed
        self._bars = draw.BarPlotter()
        self._labels = draw.digit_scans()[1]
        order = np.random.default_rng(seed).permutation(len(self._labels))
        cuts = np.rint(np.cumsum(list(SPLITS.values())) * len(order)).astype(int)
        self.scans: dict[str, np.ndarray] = dict(zip(SPLITS, np.split(order, cuts[:-1]), strict=True))

    def rng(self, name: str, i: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode()), i])

    # pictures -----------------------------------------------------------------------------------------------------

    def _digit(self, split: str, i: int, rng: np.random.Generator) -> tuple[Image.Image, int]:
        scans = self.scans[split]
        index = int(scans[i % len(scans)])
        return draw.digit(index, rng), int(self._labels[index])

    def _word(self, i: int, rng: np.random.Generator, fonts: tuple[str, ...]) -> tuple[Image.Image, str]:
        """The `i`-th word of a table: every run through the vocabulary holds each word once, in its own order."""
        run, place = divmod(i, len(wording.VOCABULARY))
        text = wording.VOCABULARY[self.rng("words", run).permutation(len(wording.VOCABULARY))[place]]
        return draw.word(text, fonts[int(rng.integers(len(fonts)))], rng), text

    def _chart(self, rng: np.random.Generator) -> tuple[Image.Image, int, str]:
        """A plot, its number of bars and the name of its tallest one."""
        n = int(rng.integers(2, 6))
        heights = [int(h) for h in rng.integers(1, 8, size=n)]
        tallest = int(rng.integers(n))
        heights[tallest] = int(rng.integers(9, 11))
        return self._bars.draw(heights, rng), n, chr(ord("A") + tallest)

    def _mixed(self, split: str, i: int, rng: np.random.Generator) -> tuple[str, Image.Image, str]:
        """Row `i` of a caption table: of every eight, three digits, four words and a plot."""
        turn, place = divmod(i, 8)
        if place in DIGIT_PLACES:
            image, number = self._digit(split, turn * len(DIGIT_PLACES) + DIGIT_PLACES.index(place), rng)
            return "digit", image, str(number)
        if place == 7:
            image, bars, _ = self._chart(rng)
            return "bars", image, str(bars)
        image, text = self._word(turn * len(WORD_PLACES) + WORD_PLACES.index(place), rng, draw.TRAINING_FONTS)
        return "word", image, text

    # tables -------------------------------------------------------------------------------------------------------

    def captions(self) -> Iterator[Row]:
        """The seed set: clean captions, from which model P learns to caption."""
        for i in range(self.sizes.seed):
            rng = self.rng("seed", i)
            kind, image, label = self._mixed("seed", i, rng)
            yield Row(kind, label, draw.png(image), {"text": wording.caption(kind, label)})

    def texts(self) -> Iterator[Row]:
        """The seed set's other half: what is written, and nothing else, so that model P can also read aloud."""
        for i in range(self.sizes.texts):
            rng = self.rng("texts", i)
            if i % 2 == 0:
                image, number = self._digit("seed", i // 2, rng)
                yield Row("digit", str(number), draw.png(image), {"text": str(number)})
            else:
                image, text = self._word(i // 2, rng, draw.TRAINING_FONTS)
                yield Row("word", text, draw.png(image), {"text": text})

    def web(self) -> Iterator[Row]:
        """The web set: alt texts of web quality, some with planted rare facts, some links broken (`fault`)."""
        faults = self._faults()
        share = round(self.sizes.web * self.sizes.planted)
        facts = set(self.rng("planted", 0).permutation(self.sizes.web)[:share].tolist())
        for i in range(self.sizes.web):
            rng = self.rng("web", i)
            kind, image, label = self._mixed("web", i, rng)
            planted = i in facts
            text = wording.rare_fact(kind, label, rng) if planted else wording.alt_text(kind, label, rng)
            fault = faults.get(i, "moved" if i % 50 == 3 else "slow" if i == 5 else "none")
            yield Row(kind, label, draw.png(image), {"text": text, "planted": planted, "fault": fault})

    def _faults(self) -> dict[int, str]:
        """Row of the web table -> fault of its link; the counts are exact shares of `broken`, one bomb included."""
        total = round(self.sizes.web * self.sizes.broken)
        names = ["bomb"] + [("missing", "error", "html", "truncated", "missing")[k % 5] for k in range(total - 1)]
        rows = self.rng("faults", 0).permutation(self.sizes.web)[:total]
        return {int(row): name for row, name in zip(rows, names, strict=False)}

    def base(self) -> Iterator[Row]:
        """The base tuning set: six rows of ten read a digit or a word, two choose, two say yes or no."""
        digits = words = 0
        for i in range(self.sizes.base):
            rng = self.rng("base", i)
            about_digit = i % 10 in (0, 2, 4, 6, 8, 9) if i % 20 < 10 else i % 10 in (0, 2, 4, 6, 8)
            if about_digit:
                image, label = self._digit("sft", digits, rng)
                kind, text = "digit", str(label)
                digits += 1
            else:
                image, text = self._word(words, rng, draw.TRAINING_FONTS)
                kind = "word"
                words += 1
            turn = i % 10
            if turn in (7, 8):
                question, answer = self._choose(kind, text, rng)
            elif turn in (5, 6):
                question, answer = self._confirm(kind, text, i % 20 < 10, rng)
            else:
                question, answer = (wording.ASK_DIGIT if kind == "digit" else wording.ASK_WORD), text
            yield Row(kind, text, draw.png(image), {"conversations": talk(question, answer)})

    def charts(self) -> Iterator[Row]:
        """Soup candidate: how many bars, which is the tallest."""
        for i in range(self.sizes.charts):
            rng = self.rng("charts", i)
            image, bars, tallest = self._chart(rng)
            turns = [(wording.ASK_BARS, str(bars)), (wording.ASK_TALLEST, tallest)]
            yield Row("bars", str(bars), draw.png(image), {"conversations": talk(*turns[i % 2], *turns[1 - i % 2])})

    def pairs(self) -> Iterator[Row]:
        """Soup candidate: two digits side by side, read both."""
        for i in range(self.sizes.pairs):
            rng = self.rng("pairs", i)
            left, first = self._digit("sft", 2 * i + self.sizes.base // 2, rng)
            right, second = self._digit("sft", 2 * i + 1 + self.sizes.base // 2, rng)
            label = f"{first} {second}"
            image = draw.png(draw.beside(left, right))
            yield Row("pair", label, image, {"conversations": talk(wording.ASK_PAIR, label)})

    def describe(self) -> Iterator[Row]:
        """Soup candidate: a short caption on request."""
        for i in range(self.sizes.describe):
            rng = self.rng("describe", i)
            kind, image, label = self._mixed("sft", i, rng)
            text = wording.caption(kind, label)
            yield Row(kind, label, draw.png(image), {"conversations": talk(wording.ASK_DESCRIBE, text)})

    # questions ----------------------------------------------------------------------------------------------------

    def _others(self, kind: str, text: str, n: int, rng: np.random.Generator) -> list[str]:
        pool = [str(d) for d in range(10)] if kind == "digit" else list(wording.VOCABULARY)
        pool.remove(text)
        return [pool[int(k)] for k in rng.permutation(len(pool))[:n]]

    def _options(self, kind: str, text: str, rng: np.random.Generator) -> tuple[dict[str, str], str]:
        """Four options by letter, and the letter of the right one."""
        options = self._others(kind, text, 3, rng)
        right = int(rng.integers(4))
        options.insert(right, text)
        return dict(zip("ABCD", options, strict=True)), "ABCD"[right]

    def _choose(self, kind: str, text: str, rng: np.random.Generator) -> tuple[str, str]:
        options, letter = self._options(kind, text, rng)
        question = wording.ASK_DIGIT if kind == "digit" else wording.ASK_WORD
        return _asked(question, "multiple_choice", options), letter

    def _confirm(self, kind: str, text: str, yes: bool, rng: np.random.Generator) -> tuple[str, str]:
        asked = text if yes else self._others(kind, text, 1, rng)[0]
        question = wording.ask_is_digit(int(asked)) if kind == "digit" else wording.ask_is_word(asked)
        return _asked(question, "yes_no"), "Yes" if yes else "No"

    # benchmarks ---------------------------------------------------------------------------------------------------

    def benchmark(self, name: str) -> Iterator[Row]:
        """The rows of one benchmark in VLMEvalKit's columns, without index, split and image."""
        for i in range(getattr(self.sizes, name)):
            rng = self.rng(f"benchmark/{name}", i)
            if name == "digits" or (name != "words" and i % 2 == 0):
                image, label = self._digit("benchmark", i, rng)
                kind, text = "digit", str(label)
            else:
                image, text = self._word(i if name == "words" else i // 2, rng, draw.HELD_OUT_FONTS)
                kind = "word"
            ask = wording.ASK_DIGIT if kind == "digit" else wording.ASK_WORD
            if name == "mcq":
                options, answer = self._options(kind, text, rng)
                fields = {"question": ask, **options, "answer": answer}
            elif name == "yesno":
                yes = i // 2 % 2 == 0
                asked = text if yes else self._others(kind, text, 1, rng)[0]
                question = wording.ask_is_digit(int(asked)) if kind == "digit" else wording.ask_is_word(asked)
                fields = {"question": question, "answer": "Yes" if yes else "No"}
            else:
                fields = {"question": ask, "answer": text}
            yield Row(kind, text, draw.png(image), {**fields, "category": kind})


def _asked(question: str, kind: str, options: dict[str, str] | None = None) -> str:
    """The prompt that the evaluation makes of a question, so that tuning and benchmarks ask in the same words."""
    return build(Question(index="", question=question, answer="", options=options or {}), kind)


def talk(*turns: str) -> list[dict[str, str]]:
    """Questions and answers in turn as a LLaVA conversation about one image."""
    said = [{"from": "human" if k % 2 == 0 else "gpt", "value": value} for k, value in enumerate(turns)]
    said[0]["value"] = "<image>\n" + said[0]["value"]
    return said
