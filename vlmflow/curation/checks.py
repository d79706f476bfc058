"""Checks on a fused caption, each with a reason code: text models cut, chat, refuse, repeat and invent.

In CapsFusion's own 10,000 released outputs 2.6 % are cut in the middle and 3.3 % hold a number or a name that neither
source has (spec data-eval-soup.md 4.2). A caption that fails is never used silently: its codes go into the layer.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import lru_cache

from vlmflow.curation.alt_text import clean_alt, unescape
from vlmflow.curation.textnorm import Token, supported, tokens, vocabulary
from vlmflow.curation.word_lists import ABBREVIATIONS, FUNCTION_WORDS, GENERIC, MEDIA, MONTHS

CODES = {
    "empty": "the answer holds no word",
    "refusal": "the model refuses or speaks of itself",
    "leak": "the answer talks about the task (sentence 1, merged sentence, here is ...)",
    "truncated": "the answer stops before the end of its sentence",
    "many": "the answer has more than one paragraph or too many sentences",
    "short": "fewer words than the sources can explain",
    "long": "more words than both sources together can explain",
    "repetition": "the same words come again and again",
    "number": "a number that neither source holds",
    "name": "a capitalised word that neither source holds",
    "word": "a word that neither source holds (strict mode)",
    "copy": "one source word for word, though the other has more to say",
    "ignored": "none of the telling words of the web description is left",
    "script": "a writing system that neither source uses",
}

_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:can(?:'|no)t|cannot|won't) (?:assist|help|merge|provide|do|process)|"
    r"as an ai|language model|i apologi[sz]e|sorry, (?:but )?i|unable to (?:assist|comply|process))\b",
    re.IGNORECASE,
)
_LEAK = re.compile(
    r"\b(?:sentence|caption|description|text) ?(?:1|2|one|two|a|b)\b(?=\W|$)(?!\s+(?:of|in)\s)|\bmerged (?:sentence|caption|description)\b|"
    r"\b(?:refined|combined|fused|merged) (?:and \w+ )?(?:sentence|caption|version|description)s?\b|"
    r"^(?:sure|certainly|of course|okay|ok)\b[,!.:]|\bhere (?:is|'s|are) (?:the|a|your|my)\b|\b(?:output|answer|result|caption)\s*:|"
    r"\b(?:alt[- ]text|synthetic caption|raw caption|the two (?:sentences|captions|descriptions))\b|<\|[^|]*\|>|```",
    re.IGNORECASE,
)
_END = re.compile(r"[.!?。！？…][\"'”’»)\]]*$")


@dataclass(frozen=True)
class Limits:
    """How much a fused caption may differ from its sources. Words are counted by white space."""

    min_words: int = 2
    min_share: float = 0.5  # of the words of the shorter source
    max_share: float = 1.6  # of the words of both sources together ...
    max_extra: int = 8  # ... plus this many
    max_repetition: float = 0.2  # share of repeated 3-grams
    max_sentences: int = 2


def problems(
    text: str, alt: str, synthetic: str, finish: str = "stop", limits: Limits | None = None, strict: bool = False,
    connectors: Iterable[str] = (),
) -> list[str]:  # fmt: skip
    """Reason codes (keys of CODES) of what is wrong with the fused `text`; empty when nothing is.

    `alt` is the raw alt text, `synthetic` the model's caption. `finish` is the server's finish_reason. With `strict`
    every word must come from a source or from `connectors`; otherwise only numbers and names must.
    """
    limits = limits or Limits()
    words = [token for token in tokens(text) if any(c.isalnum() for c in token.text)]
    if not words:
        return ["empty"]
    sources = vocabulary(alt) | vocabulary(synthetic)
    found: list[str] = []

    def note(code: str, wrong: object) -> None:
        if wrong:
            found.append(code)

    both = unescape(alt) + " " + synthetic
    note("refusal", _REFUSAL.search(text) and not _REFUSAL.search(both))
    note("leak", _LEAK.search(text) and not _LEAK.search(both))
    note("truncated", finish == "length" or not _END.search(text.strip()))
    note("many", "\n" in text.strip() or _ends(text) >= limits.max_sentences)
    n_alt, n_synthetic = len(clean_alt(alt).split()), len(synthetic.split())
    shorter = min(n for n in (n_alt, n_synthetic, 10**6) if n) if (n_alt or n_synthetic) else 0
    n_words = len(text.split())
    note("short", n_words < max(limits.min_words, limits.min_share * shorter if shorter < 10**6 else 0))
    note("long", n_words > limits.max_share * (n_alt + n_synthetic) + limits.max_extra)
    note("repetition", repetition([t.norm for t in words]) > limits.max_repetition)
    note("number", [t for t in words if t.kind != "word" and t.text.casefold() != "one" and not supported(t, sources)])
    note("name", _names(text, sources))
    if strict:
        allowed = sources | {c.casefold() for c in connectors}
        note("word", [t for t in words if not supported(t, allowed)])
    note("copy", _copies(text, alt, synthetic))
    note("ignored", _ignores(words, clean_alt(alt)))
    note("script", _scripts(text) - _scripts(both))
    return found


def _ends(text: str) -> int:
    """How many sentences end before the last one; the dots of abbreviations and initials are none."""
    return sum(
        word.casefold() not in ABBREVIATIONS and len(word) > 1
        for word in re.findall(r"([^\s.!?]*)[.!?][\"”']*(?=\s+[A-Z\"“])", text)
    )


def repetition(words: list[str], n: int = 3) -> float:
    """Share of the n-grams of `words` that occurred before: 0 when all differ."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _names(text: str, sources: Set[str]) -> list[str]:
    """Capitalised words in the middle of a sentence that no source supports; months may stand for a number."""
    found, start = [], True
    for chunk in text.split():
        for token in tokens(chunk):
            word = token.text
            if not start and word[:1].isupper() and token.kind == "word" and word.casefold() not in FUNCTION_WORDS:
                month = MONTHS.get(word.casefold())
                if not supported(token, sources) and not (month and month in sources) and word != "I":
                    found.append(word)
            start = False
        start = start or bool(_END.search(chunk))
    return found


def _copies(text: str, alt: str, synthetic: str) -> bool:
    """Whether the text is one source word for word although the other one has content of its own."""
    said = [t.norm for t in tokens(text)]
    for source, other in ((clean_alt(alt), synthetic), (unescape(alt), synthetic), (synthetic, clean_alt(alt))):
        if source and said == [t.norm for t in tokens(source)]:
            extra = {t.norm for t in tokens(other) if t.content} - set(said) - GENERIC
            if extra:
                return True
    return False


def _ignores(words: list[Token], source: str) -> bool:
    """Whether `source` has two telling words (content, no number, not generic) or more, and none is among `words`."""
    telling = {t.norm for t in tokens(source) if t.content and t.kind == "word"} - GENERIC - MEDIA
    return len(telling) > 1 and not telling & {t.norm for t in words}


def _scripts(text: str) -> set[str]:
    return {_script(c) for c in set(text) if c.isalpha() and c not in "ªºµ"}


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "?").split(" ")[0]


def duplicates(texts: Iterable[str | None]) -> dict[str, object]:
    """How often the same text (case, white space and end marks aside) occurs: {"texts", "samples", "most": [[text, n]]}.

    "texts" counts the distinct texts that occur more than once, "samples" the samples that hold one of them.
    """
    counts = Counter(" ".join(t.casefold().split()).rstrip(".!? ") for t in texts if t)
    repeated = [(text, n) for text, n in counts.items() if n > 1]
    repeated.sort(key=lambda pair: (-pair[1], pair[0]))
    return {"texts": len(repeated), "samples": sum(n for _, n in repeated), "most": [list(p) for p in repeated[:10]]}


def is_refusal(text: str) -> bool:
    """Whether a text model declines or speaks of itself instead of answering."""
    return bool(_REFUSAL.search(text))


def leaks(text: str) -> bool:
    """Whether an answer talks about the task instead of doing it ("Here is the corrected ...")."""
    return bool(_LEAK.search(text))
