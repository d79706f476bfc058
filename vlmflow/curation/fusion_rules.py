"""Rule-based caption fusion: CapFusion's three rules without a language model.

The sentence of the synthetic caption is kept as structure; the facts of the alt text that it lacks (numbers, codes,
names, quoted words, content words) are blended into it, and where both state the same fact the alt text wins. No word
is added that neither source holds, except CONNECTORS. It is the laptop's default and is named "rules" everywhere: it
knows a few word lists, not language. Rules: points.md 4.1; method: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlmflow.curation.checks import GENERIC
from vlmflow.curation.textnorm import (
    DETERMINERS,
    FUNCTION_WORDS,
    PREPOSITIONS,
    Token,
    clean_alt,
    normal,
    tokens,
    unescape,
)

CONNECTORS = frozenset({"a", "an", "the", "in", "of", "with", "and"})
"""The only words that a fused caption may hold though neither source does."""

MEDIA = frozenset(
    [
        "scan",
        "photo",
        "photograph",
        "picture",
        "image",
        "drawing",
        "sketch",
        "painting",
        "illustration",
        "screenshot",
        "plot",
        "chart",
        "graph",
        "diagram",
        "figure",
        "poster",
        "print",
        "engraving",
        "map",
        "render",
    ]
)
COLOURS = frozenset(
    [
        "red",
        "green",
        "blue",
        "yellow",
        "orange",
        "purple",
        "pink",
        "brown",
        "black",
        "white",
        "grey",
        "gray",
        "cyan",
        "magenta",
        "gold",
        "silver",
        "beige",
        "teal",
    ]
)
LABELLED = frozenset(
    [
        "word",
        "text",
        "digit",
        "digits",
        "number",
        "numeral",
        "letter",
        "letters",
        "say",
        "says",
        "said",
        "saying",
        "read",
        "reads",
        "reading",
    ]
)
"""Words after which a caption states the value that is written in the picture."""

_TEXT_SLOTS = frozenset(normal(w) for w in ("word", "text", "say", "says", "saying", "read", "reads", "reading"))
_SLOTS = frozenset(normal(w) for w in LABELLED)
_META = ("this is", "there is", "there are", "it is", "it shows", "the image shows", "the picture shows", "the photo shows",
         "this image shows", "the image depicts", "an image of", "image of", "a picture of", "picture of",
         "in this image there is", "in this picture there is", "we see", "we can see")  # fmt: skip


@dataclass(frozen=True)
class Fused:
    """A fused caption and notes: alt_empty (nothing usable in the alt text), trimmed (facts left out for length)."""

    text: str
    notes: tuple[str, ...] = ()


def fuse(alt: str, synthetic: str, max_words: int = 60) -> Fused:
    """One sentence from a web alt text and a synthetic caption; deterministic, at most about `max_words` words.

    An empty synthetic caption gives an empty text: without a sentence there is no structure to blend into.
    """
    base = structure(synthetic)
    if not base:
        return Fused("")
    facts_of = tokens(clean_alt(alt))
    if not any(token.content for token in facts_of):
        return Fused(_sentence(base), ("alt_empty",))
    if _adds_nothing(base, facts_of):
        return Fused(_sentence(facts_of))
    base = _alt_wins(base, facts_of)
    base, facts = _blend(base, facts_of)
    text, trimmed = _append(base, facts, max_words)
    return Fused(text, ("trimmed",) if trimmed else ())


def structure(synthetic: str) -> list[Token]:
    """The first sentence of the synthetic caption as tokens, without "the image shows", loops and a cut-off tail."""
    plain = unescape(synthetic)
    sentence: list[str] = []
    for chunk in plain.split():
        sentence.append(chunk)
        if chunk[-1] in ".!?" and len(sentence) > 2 and not chunk[:-1].isupper():
            break
    low = " ".join(sentence).casefold()
    for meta in sorted(_META, key=len, reverse=True):
        if low.startswith(meta + " ") and len(low.split()) > len(meta.split()) + 1:
            sentence = sentence[len(meta.split()) :]
            break
    base = _without_loops(tokens(" ".join(sentence)))
    while base and not base[-1].content:
        base = base[:-1]
    return base


def _without_loops(words: list[Token]) -> list[Token]:
    """Collapse runs that repeat at once ("a cat a cat a cat" -> "a cat"), which weak models produce."""
    out: list[Token] = []
    for token in words:
        out.append(token)
        for n in range(1, min(8, len(out) // 2) + 1):
            if [t.norm for t in out[-n:]] == [t.norm for t in out[-2 * n : -n]] and any(t.content for t in out[-n:]) \
                    and not all(t.kind == "number" for t in out[-n:]):  # fmt: skip
                del out[-n:]
                break
    return out


def _content(words: list[Token]) -> list[str]:
    return [t.norm for t in words if t.content]


def _adds_nothing(base: list[Token], facts_of: list[Token]) -> bool:
    """Whether the alt text is a fair sentence that already says all that the synthetic caption says."""
    first = facts_of[0].text.casefold()
    fair = len(facts_of) >= 3 and (first in DETERMINERS) and all(t.kind != "code" for t in facts_of)
    phrases = sum(t.stop for t in facts_of[:-1])
    return fair and not phrases and not set(_content(base)) - set(_content(facts_of)) - GENERIC


def _alt_wins(base: list[Token], facts_of: list[Token]) -> list[Token]:
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
            others = [
                t for t, nxt in zip(facts_of, facts_of[1:], strict=False) if t.norm in COLOURS and nxt.norm == after
            ]
            value = others[0] if others else None
        elif token.content and before in _SLOTS and token.norm not in alt_known and token.kind == "word":
            value = _other_value(before, facts_of, known)
        elif token.norm in MEDIA and token.norm not in alt_known and _is_head(base, i):
            others = [t for t in facts_of if t.norm in MEDIA and t.norm not in known]
            value = others[0] if others else None
        if value is not None:
            base[i] = replace(token, text=value.text, norm=value.norm, kind=value.kind)
            known.add(value.norm)
        elif token.kind == "word":
            base[i] = replace(token, text=_name_form(token, facts_of))
    return _articles(base)


def _other_number(base: list[Token], i: int, facts_of: list[Token], known: set[str]) -> Token | None:
    """The number that the alt text gives for what base[i] counts or names; None when it speaks of something else."""
    plain = [j for j, t in enumerate(facts_of) if t.kind == "number"]
    mine = _around(base, i)
    for j in plain:
        if facts_of[j].norm not in known and mine & _around(facts_of, j):
            return facts_of[j]
    only = len(plain) == 1 and sum(t.kind == "number" for t in base) == 1
    if only and facts_of[plain[0]].norm not in known:
        j = plain[0]
        short = not set(_content(facts_of)) - known - _SLOTS - GENERIC - MEDIA - {facts_of[j].norm}
        labelled = j > 0 and facts_of[j - 1].norm in _SLOTS
        counted = i + 1 < len(base) and base[i + 1].content
        if (short or labelled) and not counted:
            return facts_of[j]
    return None


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
    same = _TEXT_SLOTS if slot in _TEXT_SLOTS else {slot}
    for t, nxt in zip(facts_of, facts_of[1:], strict=False):
        if t.norm in same and nxt.content and nxt.norm not in known and not t.stop:
            return nxt
    if len(facts_of) == 1 and slot in _TEXT_SLOTS and facts_of[0].norm not in known | COLOURS | MEDIA:
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


def _blend(base: list[Token], facts_of: list[Token]) -> tuple[list[Token], list[list[Token]]]:
    """Put modifiers before the word they modify in the sentence; return it and the facts that need a phrase."""
    known = {t.norm for t in base}
    facts: list[list[Token]] = []
    for phrase in _phrases(facts_of):
        fresh = [t.content and t.norm not in known and t.norm not in GENERIC - MEDIA for t in phrase]
        i = 0
        while i < len(phrase):
            if not fresh[i]:
                i += 1
                continue
            end = i + 1
            while end < len(phrase) and fresh[end]:
                end += 1
            run = phrase[i:end]
            target = phrase[end] if end < len(phrase) else None
            place = _modified(base, target) if target is not None and len(run) <= 3 else None
            if len(phrase) == 1 and run[0].norm in MEDIA:
                base = _as_media(base, run[0])
            elif place is not None and not any(t.stop for t in run):
                base = base[:place] + [replace(t, trail=t.trail, stop=False) for t in run] + base[place:]
            elif _lone(phrase, i, end) and run[0].norm in MEDIA:
                base = _as_media(base, run[0])
            else:
                i, end = _span(phrase, fresh, i, end)
                facts.append(phrase[i:end])
            known.update(t.norm for t in phrase[:end])
            fresh = [f and t.norm not in known for f, t in zip(fresh, phrase, strict=True)]
            i = end
    return _articles(base), facts


def _phrases(words: list[Token]) -> list[list[Token]]:
    out: list[list[Token]] = [[]]
    for token in words:
        out[-1].append(token)
        if token.stop:
            out.append([])
    return [p for p in out if p]


def _modified(base: list[Token], target: Token) -> int | None:
    """Where in the sentence the very word `target` stands, if a modifier may be put before it."""
    if not target.content:
        return None
    for i, t in enumerate(base):
        if t.text.casefold() == target.text.casefold() and not t.lead:
            before = base[i - 1] if i else None
            return None if before is not None and (before.stop or before.kind == "number") else i
    return None


def _lone(phrase: list[Token], start: int, end: int) -> bool:
    """Whether the run is one noun of its own: "a scan of ...", "... scan"."""
    if end - start != 1:
        return False
    before = phrase[start - 1].text.casefold() if start else "a"
    after = phrase[end].text.casefold() if end < len(phrase) else "of"
    return after in ("of", "with", "showing") and (before in DETERMINERS or start == 0 or end == len(phrase))


def _as_media(base: list[Token], media: Token) -> list[Token]:
    """ "A handwritten digit" and "scan" -> "a scan of a handwritten digit"."""
    first = base[0]
    upper = first.text[:1].isupper() and first.text.casefold() in DETERMINERS
    rest = [replace(first, text=first.text.lower()), *base[1:]] if upper else base
    return [_word("A" if upper else "a"), replace(media, text=media.text.lower(), stop=False), _word("of"), *rest]


def _word(text: str) -> Token:
    return Token(text, text.casefold(), "word")


def _span(phrase: list[Token], fresh: list[bool], start: int, end: int) -> tuple[int, int]:
    """Widen a run of new words to something that reads: its preposition and determiner, what it counts or modifies."""
    while end < len(phrase):
        if (
            fresh[end]
            or any(fresh[end : end + 4])
            or (phrase[end].content and phrase[end - 1].text.casefold() not in PREPOSITIONS)
        ):
            end += 1
        elif (
            not phrase[end].content
            and end + 1 < len(phrase)
            and phrase[end].text.casefold() in ("that", "which", "who")
        ):
            end += 2
        else:
            break
    left = start
    for back in range(1, 4):
        at = start - back
        if at < 0:
            break
        word = phrase[at].text.casefold()
        if word in PREPOSITIONS:
            left = at
            break
        if word in DETERMINERS:
            left = at
        elif not phrase[at].content:
            break
    while end > start and not phrase[end - 1].content:
        end -= 1
    return left, min(end, len(phrase))


def _append(base: list[Token], facts: list[list[Token]], max_words: int) -> tuple[str, bool]:
    """The sentence with its facts: as ", fact" phrases in the alt text's order, as long as there is room."""
    out, trimmed = list(base), False
    for fact in facts:
        words = [replace(t, stop=False) for t in fact]
        if len(words) == 1 and words[0].norm in COLOURS:
            words = [_word("in"), *words]
        elif words[0].kind == "number" and len(words) > 1 and words[1].text.islower():
            words = [_word("with"), *words]
        if len(out) + len(words) > max_words and len(out) > len(base) // 2:
            trimmed = True
            continue
        out[-1] = replace(out[-1], trail=out[-1].trail + ("" if out[-1].trail.endswith(",") else ","))
        out += words
    return _sentence(out), trimmed


def _articles(base: list[Token]) -> list[Token]:
    """a/an by the next word's letter; no article before a number that counts a plural."""
    out: list[Token] = []
    for i, token in enumerate(base):
        low = token.text.casefold()
        if low in ("a", "an") and token.kind == "word" and i + 1 < len(base):
            nxt = base[i + 1]
            if nxt.kind == "number" and nxt.norm not in ("1",) and i + 2 < len(base) and base[i + 2].text.endswith("s"):
                continue
            if nxt.text[:1].isalpha():
                vowel = nxt.text[0].casefold() in "aeiou" and not nxt.text.casefold().startswith(
                    ("uni", "use", "one", "eu")
                )
                text = ("an" if vowel else "a") if token.text[0].islower() else ("An" if vowel else "A")
                token = replace(token, text=text, norm=text.casefold())
        out.append(token)
    return out


def _sentence(words: list[Token]) -> str:
    """Words to text with a final stop. The first letter stays as the source wrote it, so that style stays one."""
    parts = []
    for i, token in enumerate(words):
        comma = "," if token.stop and i + 1 < len(words) and not token.trail.endswith(",") else ""
        parts.append(token.surface + comma)
    return " ".join(parts).rstrip(" ,;:") + "."


__all__ = ["CONNECTORS", "FUNCTION_WORDS", "Fused", "fuse", "structure"]
