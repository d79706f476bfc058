"""Rule-based caption fusion: CapFusion's three rules without a language model.

The sentence of the synthetic caption is kept as structure; the facts of the alt text that it lacks (numbers, codes,
names, quoted words, content words) are blended into it, and where both state the same fact the alt text wins. No word
is added that neither source holds, except CONNECTORS. It is the laptop's default and is named "rules" everywhere: it
knows a few word lists, not language. Rules: points.md 4.1; method: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlmflow.curation.alt_text import clean_alt, unescape
from vlmflow.curation.fusion_conflicts import alt_wins
from vlmflow.curation.textnorm import Token, tokens
from vlmflow.curation.word_lists import (
    COLOURS,
    DANGLING,
    DETERMINERS,
    GENERIC,
    INSCRIBED,
    LABELLED,
    MEDIA,
    PREPOSITIONS,
)

CONNECTORS = frozenset({"a", "an", "the", "in", "of", "with", "and"})
"""The only words that a fused caption may hold though neither source does."""


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
    base = _articles(alt_wins(base, facts_of))
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
    while base and base[-1].text.casefold() in DANGLING:
        base = base[:-1]
    return base if any(token.content for token in base) else []


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
            place = _modified(base, run, target) if target is not None else None
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


def _modified(base: list[Token], run: list[Token], target: Token) -> int | None:
    """Where in the sentence the very word `target` stands, if `run` may be put before it as its modifier."""
    if not target.content or len(run) > 3:
        return None
    if target.kind != "word" and not (len(run) == 1 and run[0].norm in LABELLED | INSCRIBED):
        return None
    for i, t in enumerate(base):
        if t.text.casefold() == target.text.casefold() and not t.lead:
            if target.kind == "number" and i and base[i - 1].norm in LABELLED and run[0].norm in INSCRIBED:
                i -= 1  # a handwritten digit 8, not a digit handwritten 8
            if i and (base[i - 1].stop or (base[i - 1].kind == "number" and any(r.kind == "number" for r in run))):
                return None
            return i if target.text[:1].isupper() else _before_modifiers(base, i)
    return None


def _before_modifiers(base: list[Token], i: int) -> int:
    """Where the noun phrase of base[i] begins after its article: "a | blue coffee mug"; i when that is unclear."""
    at = i - 1
    if at > 0 and base[at].content and base[at].kind == "word" and not base[i].text.endswith(("ing", "ed")):
        at -= 1
        while at > 0 and base[at].norm in COLOURS:
            at -= 1
        if base[at].text.casefold() in ("a", "an", "the") and not any(t.stop for t in base[at:i]):
            return at + 1
    return i


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
    text = " ".join(parts).rstrip(" ,;:")
    return text if text.endswith(".") else text + "."
