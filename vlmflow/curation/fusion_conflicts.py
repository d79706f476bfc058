"""Where alt text and synthetic caption state the same fact differently: the alt text wins.

CapFusion trusts the web for facts and the model for grammar (points.md 4.1). Without a language model, "the same fact"
is what stands at the same place: what is counted by the same noun, coloured, or written after "the word".
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from vlmflow.curation.textnorm import Token
from vlmflow.curation.word_lists import COLOURS, GENERIC, INSCRIBED, LABELLED, MEDIA, PREPOSITIONS, TEXT_LABELS


def alt_wins(base: list[Token], facts_of: list[Token]) -> list[Token]:
    """Replace what the synthetic caption states differently: values after "word", numbers, colours, kind of picture."""
    base = list(base)
    known = {t.norm for t in base}
    alt_known = {t.norm for t in facts_of}
    for i, token in enumerate(base):
        before = base[i - 1].norm if i else ""
        after = base[i + 1].norm if i + 1 < len(base) else ""
        value: Token | None = None
        if token.kind == "number" and token.norm not in alt_known:
            value = _other_number(base, i, facts_of, known)
        elif token.norm in COLOURS and token.norm not in alt_known:
            others = [t for t, nxt in pairwise(facts_of) if t.norm in COLOURS and nxt.norm == after]
            value = others[0] if others else None
        elif token.content and before in LABELLED and token.norm not in alt_known and token.kind == "word":
            value = _other_value(before, facts_of, known)
        elif token.norm in MEDIA and token.norm not in alt_known and _is_head(base, i):
            others = [t for t in facts_of if t.norm in MEDIA and t.norm not in known]
            value = others[0] if others else None
        if value is not None:
            base[i] = replace(token, text=value.text, norm=value.norm, kind=value.kind)
            known.add(value.norm)
        elif token.kind == "word":
            base[i] = replace(token, text=_name_form(token, facts_of))
    return base


def _other_number(base: list[Token], i: int, facts_of: list[Token], known: set[str]) -> Token | None:
    """The number that the alt text gives for what base[i] counts or names; None when it speaks of something else."""
    plain = [j for j, t in enumerate(facts_of) if t.kind == "number"]
    mine = _around(base, i)
    for j in plain:
        if facts_of[j].norm not in known and mine & _around(facts_of, j):
            return facts_of[j]
    if (i + 1 < len(base) and base[i + 1].content) or sum(t.kind == "number" for t in base) != 1:
        return None  # it counts something, or is one of several
    labelled = [j for j in plain if j > 0 and facts_of[j - 1].norm in LABELLED | INSCRIBED]
    beside = {t.norm for t in facts_of if t.content and t.kind != "number"} - known - LABELLED - GENERIC - MEDIA
    shown = labelled if len(labelled) == 1 else plain if len(plain) == 1 and not beside else []
    return facts_of[shown[0]] if shown and facts_of[shown[0]].norm not in known else None


def _around(words: list[Token], i: int) -> set[str]:
    """The content words next to words[i] within its phrase, two on the left and one on the right."""
    left: list[str] = []
    for t in reversed(words[:i]):
        if t.stop or len(left) == 2:
            break
        if t.content:
            left.append(t.norm)
    right = []
    if not words[i].stop and i + 1 < len(words) and words[i + 1].content:
        right.append(words[i + 1].norm)
    return {w for w in right or left if not w.isdigit()}


def _other_value(slot: str, facts_of: list[Token], known: set[str]) -> Token | None:
    """What the alt text states to be written: after the same kind of slot word, or all of it when it is one word."""
    same = TEXT_LABELS if slot in TEXT_LABELS else {slot}
    for t, nxt in pairwise(facts_of):
        if t.norm in same and nxt.content and nxt.norm not in known and not t.stop:
            return nxt
    if len(facts_of) == 1 and slot in TEXT_LABELS and facts_of[0].norm not in known | COLOURS | MEDIA:
        return facts_of[0]
    return None


def _is_head(base: list[Token], i: int) -> bool:
    """Whether base[i] is the noun that the caption is about: the last content word before "of", "with" or the end."""
    nxt = base[i + 1].text.casefold() if i + 1 < len(base) else "of"
    return nxt in PREPOSITIONS and not any(t.text.casefold() in PREPOSITIONS for t in base[:i])


def _name_form(token: Token, facts_of: list[Token]) -> str:
    """The alt text's way to write a word when that is a name or an acronym (HARBOR, McLaren), else the caption's."""
    for i, t in enumerate(facts_of):
        if t.text.casefold() == token.text.casefold() and t.text != token.text:
            shouted = t.text.isupper() and len(t.text) > 1 and not all(o.text.isupper() for o in facts_of)
            inner = i > 0 and not facts_of[i - 1].stop and t.text[:1].isupper() and not t.text.isupper()
            title = sum(o.text[:1].isupper() for o in facts_of) > 0.6 * len(facts_of)
            if shouted or (inner and not title and token.content):
                return t.text
    return token.text
