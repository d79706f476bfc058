"""Numbers written as words, for reading benchmarks whose recipe says that "seven" answers 7 (`numbers: true`)."""

from __future__ import annotations

import re
from fractions import Fraction

_ONE_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
"""
_TEN_WORDS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety"
_ONES = {word: i for i, word in enumerate(_ONE_WORDS.split())}
_TENS = {word: 10 * i for i, word in enumerate(_TEN_WORDS.split()) if word != "_"}
_SCALES = {"thousand": 1_000, "million": 1_000_000}
_HAN = {c: i for i, c in enumerate("零一二三四五六七八九十")}


def number(text: str) -> Fraction | None:
    """The value of a decimal numeral ("7", "007", "3.50", "-2") or of English number words below a thousand million
    ("seven", "twenty-one", "one hundred and five"), or of one Chinese digit; None when the text is anything else."""
    text = text.strip().casefold()
    if re.fullmatch(r"[-+]?\d+(\.\d+)?|[-+]?\.\d+", text):
        return Fraction(text)
    if text in _HAN:
        return Fraction(_HAN[text])
    return _words(re.split(r"[\s-]+", text))


def _words(words: list[str]) -> Fraction | None:
    total, group, last = 0, 0, ""
    for word in words:
        if word == "and" and last in ("hundred", *_SCALES):
            pass
        elif word in _ONES and (last in ("", "and", "hundred", *_SCALES) or (last in _TENS and 0 < _ONES[word] < 10)):
            group += _ONES[word]
        elif word in _TENS and last in ("", "and", "hundred", *_SCALES):
            group += _TENS[word]
        elif word == "hundred" and last in _ONES and 0 < group < 10:
            group *= 100
        elif word in _SCALES and group and (last in _ONES or last in _TENS or last == "hundred"):
            total, group = total + group * _SCALES[word], 0
        else:
            return None
        last = word
    return None if last in ("", "and") else Fraction(total + group)
