"""The language of text that was read in a picture, by its script."""

from __future__ import annotations

import unicodedata

SCRIPTS = {
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CJK": "zh",
    "CYRILLIC": "ru",
    "ARABIC": "ar",
    "GREEK": "el",
    "THAI": "th",
    "DEVANAGARI": "hi",
    "HEBREW": "he",
    "LATIN": "en",
}
SHARE = 0.1  # of the letters: a script that is rarer is a foreign word


def language(text: str) -> str | None:
    """ISO 639-1 code of the language that most letters' script stands for; None without letters of a known script.

    A script is not a language: French and Vietnamese are Latin and get `en`, Bulgarian is Cyrillic and gets `ru`. It tells
    apart what a mixture of OCR text is divided by (spec/points.md 3.2: the split of languages). Japanese mixes kana with Chinese
    characters, so a tenth of kana makes a text Japanese; a tenth of hangul makes it Korean.
    """
    counts: dict[str, int] = {}
    for char in text:
        if char.isalpha() and (code := _script(char)):
            counts[code] = counts.get(code, 0) + 1
    if not counts:
        return None
    letters = sum(counts.values())
    for code in ("ja", "ko"):
        if "zh" in counts and counts.get(code, 0) >= SHARE * letters:
            return code
    return max(counts, key=lambda code: (counts[code], code))


def _script(char: str) -> str | None:
    words = unicodedata.name(char, "").replace("-", " ").split(" ", 2)
    # HALFWIDTH KATAKANA LETTER, FULLWIDTH LATIN CAPITAL LETTER
    word = words[1] if words[0] in ("HALFWIDTH", "FULLWIDTH") and len(words) > 1 else words[0]
    return SCRIPTS.get(word)
