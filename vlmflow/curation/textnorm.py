"""When two words of captions are the same: "seven" and 7, "bars" and "bar", "4,000" and 4000.

Fusion and its checks must agree on that, and on what a text supports, without a language model.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import lru_cache

from vlmflow.curation.alt_text import unescape
from vlmflow.curation.word_lists import ABBREVIATIONS, FUNCTION_WORDS, NUMBER_WORDS


@dataclass(frozen=True)
class Token:
    """One word of a caption: its surface, what it is compared by, and the marks around it."""

    text: str  # the surface without marks around it
    norm: str  # what it is compared by
    kind: str  # word | number | code
    lead: str = ""  # opening marks kept with it: quotes, brackets
    trail: str = ""  # closing marks: quotes, an abbreviation's dot
    stop: bool = False  # a phrase ends after this token

    @property
    def surface(self) -> str:
        return self.lead + self.text + self.trail

    @property
    def content(self) -> bool:
        """Whether the token carries a fact rather than grammar."""
        return self.kind != "word" or self.text.lower() not in FUNCTION_WORDS


_PLAIN_NUMBER = re.compile(r"^[$€£#]?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?$|^[$€£#]?\d+(?:\.\d+)?%?$")
_ORDINAL = re.compile(r"^(\d+)(?:st|nd|rd|th)$")


@lru_cache(maxsize=1 << 16)
def normal(word: str) -> str:
    """What a word is compared by: case, plural, possessive and the way of writing a number do not count."""
    low = word.casefold().replace("’", "'")
    if low.endswith("'s"):
        low = low[:-2]
    if low in NUMBER_WORDS:
        return NUMBER_WORDS[low]
    if _PLAIN_NUMBER.match(low):
        bare = low.strip("$€£#%").replace(",", "")
        whole = bare.lstrip("0") or "0"
        return "0" + whole if whole.startswith(".") else whole
    ordinal = _ORDINAL.match(low)
    if ordinal:
        return ordinal.group(1)
    if low.isalpha() and len(low) > 3 and low.endswith("s") and not low.endswith("ss"):
        return low[:-2] if low.endswith(("xes", "ches", "shes", "sses")) else low[:-1]
    return low


@lru_cache(maxsize=1 << 16)
def kind_of(word: str) -> str:
    """number (7, seven, 4,000), code (has a digit and more: KX-4471-B, 3.14.1, A4) or word."""
    low = word.casefold()
    if low in NUMBER_WORDS or _PLAIN_NUMBER.match(low) or _ORDINAL.match(low):
        return "number"
    return "code" if any(c.isdigit() for c in word) else "word"


_EDGES = "\"'“”‘’«»()[]{}<>.,;:!?…*=+^~|/\\`-–—_&"
_JOINED = re.compile(r"^([A-Za-z]*[a-z]{2,})[-_]?(\d{1,3})$|^(\d{1,3})[-_]?([a-z]{3,})$")  # digit-7, digit7, 4bars


def tokens(text: str) -> list[Token]:
    """Split `text` into words in order; marks stay with their words, lone marks end a phrase."""
    return list(_tokens(text))


@lru_cache(maxsize=256)
def _tokens(text: str) -> tuple[Token, ...]:
    out: list[Token] = []
    for chunk in text.split():
        ends, pieces = _of_chunk(chunk)
        if ends and out:
            out[-1] = _ended(out[-1])
        out += pieces
    return tuple(out)


@lru_cache(maxsize=1 << 16)
def _of_chunk(chunk: str) -> tuple[bool, tuple[Token, ...]]:
    """(whether the phrase before ends here, the words) of what stands between two spaces."""
    core = chunk.strip(_EDGES)
    if not core or not any(c.isalnum() for c in core):
        return chunk not in "&+'\"", ()
    start = chunk.index(core)
    before, after = chunk[:start], chunk[start + len(core) :]
    joined = _JOINED.match(core)
    pieces = [p for p in joined.groups() if p] if joined and not _ORDINAL.match(core.lower()) else [core]
    found, abbreviated = [], _abbreviated(core, after)
    for position, piece in enumerate(pieces):
        last = position == len(pieces) - 1
        closing = "." if abbreviated else "".join(c for c in after if c in '"”»')
        found.append(
            Token(
                text=piece,
                norm=normal(piece),
                kind=kind_of(piece),
                lead="".join(c for c in before if c in '"“«') if position == 0 else "",
                trail=closing if last else "",
                stop=last and any(c in ".,;:!?…)]|" for c in after) and not abbreviated,
            )
        )
    return any(c in "([" for c in before), tuple(found)


_INITIALS = re.compile(r"^[A-Z]$|^(?:[A-Za-z]\.)+[A-Za-z]$")  # J. (Smith), p.m., U.S.


def _abbreviated(core: str, after: str) -> bool:
    return after[:1] == "." and (core.casefold() in ABBREVIATIONS or _INITIALS.match(core) is not None)


def _ended(token: Token) -> Token:
    return replace(token, stop=True)


@lru_cache(maxsize=256)
def vocabulary(text: str) -> frozenset[str]:
    """Everything that a text supports: its words, and the parts of joined words, as they are compared."""
    found: set[str] = set()
    plain = unescape(text)
    for token in tokens(plain):
        found.add(token.norm)
    for piece in re.findall(r"[^\W\d_]+|\d+", plain):
        found.add(normal(piece))
    for chunk in plain.split():
        if any(mark in chunk for mark in "_/\\|"):
            found.update(token.norm for piece in re.split(r"[_/\\|]+", chunk) for token in tokens(piece))
    return frozenset(found)


def supported(token: Token, sources: Set[str]) -> bool:
    """Whether a word, or every part of a joined word, stands in `sources` (a `vocabulary`)."""
    if token.norm in sources or token.text.casefold() in sources:
        return True
    parts = [normal(p) for p in re.findall(r"[^\W\d_]+|\d+", token.text)]
    return bool(parts) and all(part in sources for part in parts)
