"""From a reply to right or wrong: pure functions without judge, environment or chance.

The usual kits disagree on most odd replies, and some draw a random letter when they cannot read one (data-eval-soup
7.3, 7.4). Here every verdict carries the id of the rule that gave it, and a reply that cannot be read is *unparsed*: it
counts as wrong, is counted on its own, and is never guessed. Change a rule, raise MATCHER_VERSION: scores are cached
under it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmflow.evaluation.numbers import number
from vlmflow.evaluation.tsv import Question

MATCHER_VERSION = 1


@dataclass(frozen=True)
class Match:
    """correct; what was read from the reply (None = unparsed); the id of the deciding rule."""

    correct: bool
    extracted: str | None
    rule: str


def match(kind: str, reply: str, question: Question, numbers: bool = False) -> Match:
    """Judge `reply` by the benchmark's kind. `numbers` (reading only): "seven" and "7" are the same answer."""
    if kind == "reading":
        return match_reading(reply, question.answers, numbers)
    if kind == "multiple_choice":
        return match_choice(reply, question.answer, question.options)
    if kind == "yes_no":
        return match_yes_no(reply, question.answer)
    raise ValueError(f"benchmark kind {kind!r} is not known; known kinds: reading, multiple_choice, yes_no")


# --- text -------------------------------------------------------------------------------------------------------------

_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")
_QUOTES = re.compile("[\"'`´“”‘’„‚«»「」『』《》*]")


def clean(reply: str) -> str:
    """NFKC (full-width -> ASCII), invisible characters out, one space for white space; reasoning in <think> removed (an
    unfinished one leaves nothing: the reply was cut before the answer)."""
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", reply))
    if "</think>" in text:
        text = text.rsplit("</think>", 1)[1]
    elif text.lstrip().startswith("<think>"):
        return ""
    return " ".join(text.split())


def normalise(text: str) -> str:
    """The form in which readings are compared: `clean`, case folded, quotes removed, marks that carry no value removed.

    Marks inside numbers stay ("3.5", "12:30"); "1,000" becomes "1000"; signs, units, %, /, - and currency stay.
    "Hello,  World!" -> "hello world"; "St." -> "st".
    """
    text = _QUOTES.sub("", clean(text).casefold())
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"[,;:!?。、…()\[\]{}](?!\d)|(?<!\d)[,;:!?。、…()\[\]{}]", " ", text)
    text = re.sub(r"\.(?!\d)", "", text)
    return " ".join(text.split())


def match_reading(reply: str, answers: Sequence[str], numbers: bool = False) -> Match:
    """Exact match after `normalise` with any of the answers; an empty reply is unparsed."""
    text = normalise(reply)
    if not text:
        bare = clean(reply)
        if bare and bare in [clean(a) for a in answers]:  # the answer itself is a mark, like "?"
            return Match(True, bare, "reading.exact")
        return Match(False, None, "reading.empty")
    wanted = [normalise(a) for a in answers]
    if text in [w for w in wanted if w]:
        return Match(True, text, "reading.exact")
    if numbers:
        value = number(text)
        if value is not None and value in [number(w) for w in wanted]:
            return Match(True, text, "reading.number")
    return Match(False, text, "reading.different")


# --- multiple choice --------------------------------------------------------------------------------------------------

_END = r"(?![A-Za-z0-9])"
_OR = r"\s*\)?\s*(?:,|/|&|\band\b|\bor\b|或|和)\s*\(?"  # between the letters of a list
_STATEMENTS = [
    re.compile(p, re.IGNORECASE)
    for p in (
        r"\b(?:answer|option|choice)\s*(?:(?:is|would be|should be|must be|:|=|-)\s*)*(?:(?:option|choice|letter)\s*)?"
        r"[(\[]?(?P<letter>[A-Z])" + _END,
        r"\b(?:choose|select|pick|chose|go with)\s+(?:option\s+|answer\s+)?[(\[]?(?P<letter>[A-Z])" + _END,
        r"(?:答案|选项)\s*(?:应该|应)?\s*(?:是|为|选)?\s*[::]?\s*(?:选项)?\s*[(\[]?(?P<letter>[A-Z])" + _END,
        r"选\s*择?\s*[::]?\s*(?:选项)?\s*[(\[]?(?P<letter>[A-Z])" + _END,
        r"\\boxed\s*\{\s*(?:\\(?:text|mathrm|mathbf|textbf)\s*\{)?\s*\(?(?P<letter>[A-Z])\)?\s*\}",
        r"\b(?:letter|it|this|that)(?:\s+is|'s)\s+\(?(?P<letter>[A-Z])\)?\s*(?:[.,;:!]|$)",
        r"(?<![A-Za-z0-9])(?P<letter>[A-Z])\s*(?:选项)?(?:是|为)(?:正确|对)的?",
        r"(?<![A-Za-z0-9])\(?(?P<letter>[B-HJ-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b",
        r"(?<![A-Za-z0-9])\(?(?P<letter>[AI])\)?\s+is\s+(?:the\s+)?(?:correct|right)\b",
    )
]
_NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|cannot|without|except|[a-z]+n't)\b|不|没|非", re.IGNORECASE)


def match_choice(reply: str, answer: str, options: Mapping[str, str]) -> Match:
    """Read an option letter from a reply. `options`: letter -> text. Order of the rules, first that decides wins:

    choice.letter     the reply, or its first line, is a letter and marks: "b", "B.", "(b)", "Ｂ", "**B**"
    choice.text       the reply is the text of exactly one option
    choice.lead       its first line starts with a marked letter ("B. dog", "(b) dog", "B: ...") or "C because ..."
    choice.statement  "the answer is B", "option B", "答案是B", "选B", "\\boxed{B}"; several must agree
    choice.contains   exactly one option's text stands in it as whole words, no other letter does, and nothing is negated
    Otherwise unparsed (choice.empty, choice.outside, choice.conflict, choice.unparsed).
    """
    first, text = _plain(_first_line(reply)), _plain(reply)
    gold = answer.strip().upper()

    def verdict(letter: str, rule: str) -> Match:
        if letter not in options:
            return Match(False, None, "choice.outside")
        return Match(letter == gold, letter, rule)

    if not text:
        return Match(False, None, "choice.empty")
    bare = re.fullmatch(r"[\s(\[<{]*([A-Za-z])[\s)\]>}.,:;。、!]*", first)
    if bare:
        return verdict(bare[1].upper(), "choice.letter")
    same = [letter for letter, option in options.items() if normalise(option) == normalise(text) != ""]
    if len(same) == 1:
        return verdict(same[0], "choice.text")
    lead = _lead(first)
    if lead:
        return Match(False, None, "choice.conflict") if _several(first, lead, options) else verdict(lead, "choice.lead")
    stated = _stated(text, options)
    if len(stated) > 1:
        return Match(False, None, "choice.conflict")
    if stated:
        return verdict(stated[0], "choice.statement")
    named = _contained(text, options)
    if len(named) == 1 and not _NEGATION.search(text) and _letters(text, options) <= set(named):
        return verdict(named[0], "choice.contains")
    return Match(False, None, "choice.conflict" if len(named) > 1 else "choice.unparsed")


def _first_line(reply: str) -> str:
    """The first line that says something, if an option and its reasons were put on lines of their own."""
    return next((line for line in reply.rsplit("</think>", 1)[-1].splitlines() if line.strip("*`_\"'# \t")), "")


def _plain(text: str) -> str:
    """`clean`, without markdown and quotes (an apostrophe inside a word stays)."""
    return re.sub(r"[*`_\"“”]|(?<![A-Za-z])['‘’]|['‘’](?![A-Za-z])", "", clean(text)).strip()


def _letters(text: str, options: Mapping[str, str]) -> set[str]:
    """Option letters that stand alone as capitals; A and I before a word are words."""
    alone = re.findall(r"(?<![A-Za-z0-9'])(?![AI]\s+[a-z])([A-Z])" + _END, text)
    return {letter for letter in alone if letter in options}


def _lead(text: str) -> str | None:
    marked = re.match(r"[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])\s*[).:、]", text)
    if marked and not re.match(r"([A-Za-z]\.){2}", text):  # "U.S. flag" is no letter
        return (marked[1] or marked[2]).upper()
    listed = re.match(r"([A-Za-z])\s*(?:,|/|&|\band\b|\bor\b|或|和)\s*\(?([A-Za-z])" + _END, text, re.IGNORECASE)
    if listed:
        return listed[1].upper()
    comma = re.match(r"([A-Z])\s*,", text)
    if comma:
        return comma[1]
    # "C because ...": a capital standing alone; A and I are words of their own
    alone = re.match(r"([B-HJ-Z])\s+(?![A-Z]\b)[a-z]|([AI])\s+(?:because|since|as it)\b", text)
    return (alone[1] or alone[2]) if alone else None


def _several(text: str, lead: str, options: Mapping[str, str]) -> bool:
    """A list of letters ("B or C") or an echo of the options ("A. cat B. dog") names no answer."""
    found = re.match(r"\(?[A-Za-z]\)?\s*(?:,|/|&|\band\b|\bor\b|或|和)\s*\(?([A-Za-z])" + _END, text, re.IGNORECASE)
    article = re.match(r"\(?[A-Za-z]\)?\s*,\s*(?:a|A|I)\s+[a-z]", text)  # "B, a dog"
    if found and found[1].upper() in options and found[1].upper() != lead and not article:
        return True
    marked = set(re.findall(r"(?<![A-Za-z0-9.])\(?([A-Z])[).:、]", text))
    return len(options) > 1 and set(options) <= marked


def _stated(text: str, options: Mapping[str, str]) -> list[str]:
    found: list[str] = []
    for pattern in _STATEMENTS:
        for m in pattern.finditer(text):
            letter, rest = m["letter"], text[m.end("letter") :]
            if letter.islower() and re.match(r"\s+[A-Za-z0-9]", rest):
                continue  # "the answer is a dog"
            if letter in "AI" and re.match(r"\s+[a-z]", rest) and not re.match(r"\s+(?:because|since|is)\b", rest):
                continue  # "the answer is A dog"
            # "A or B" names two, "B, a dog" one
            listed = re.match(_OR + r"([A-Za-z])" + _END + r"(?!\s+(?!or\b|and\b)[a-z])", rest)
            found += [x.upper() for x in (letter, listed[1] if listed else letter)]
    return sorted(set(found))


def _contained(text: str, options: Mapping[str, str]) -> list[str]:
    """Letters of the options whose text stands in the reply as whole words and not only inside a longer option."""
    haystack = normalise(text)
    spans: dict[str, list[tuple[int, int]]] = {}
    for letter, option in options.items():
        needle = normalise(option)
        if needle:
            spans[letter] = [m.span() for m in _whole(needle).finditer(haystack)]
    kept = []
    for letter, mine in spans.items():
        others = [s for other, ss in spans.items() if other != letter for s in ss]
        if any(not any(o[0] <= s[0] and s[1] <= o[1] and o != s for o in others) for s in mine):
            kept.append(letter)
    return kept


def _whole(needle: str) -> re.Pattern[str]:
    """The text bounded by non-word characters where it begins or ends with a word character of a spaced script."""

    def spaced(c: str) -> bool:
        return c.isalnum() and not "\u3040" <= c <= "\u9fff"

    before = r"(?<!\w)(?<!\d[.,])(?<![-+.]\b)" if spaced(needle[0]) else ""
    after = r"(?!\w)(?![.,]\d)" if spaced(needle[-1]) else ""
    return re.compile(before + re.escape(needle) + after)


# --- yes or no --------------------------------------------------------------------------------------------------------

_UNSURE = re.compile(
    r"\bno (?:idea|clue|way to|information|answer)\b|\bnot (?:sure|certain|clear|known|possible to|enough|yes|no)\b"
    r"|\b(?:unsure|unclear|uncertain|unknown)\b|\b(?:do not|don't|dont|cannot|can't|cant|can not) (?:know|tell|say|see|"
    r"determine|answer)\b|\byes\s*(?:/|or|and)\s*no\b|\bno\s*(?:/|or|and)\s*yes\b|不确定|不知道|不清楚|无法|是否|是或否"
)
_LEAD: Sequence[tuple[str, re.Pattern[str]]] = (
    ("no", re.compile(r"[\s(\[*]*(?:no|nope)(?![\w'])|(?:不是|不对|没有|否|不)(?!确|知|清)")),
    ("yes", re.compile(r"[\s(\[*]*(?:yes|yeah|yep)(?![\w'])|(?:是的|是(?!否|或)|对的|对(?!不|应))")),
)


def match_yes_no(reply: str, answer: str) -> Match:
    """Read yes or no. yesno.lead: the reply starts with the whole word; yesno.single: it holds one polarity only, as a
    whole word ("the answer is yes", "there is no cat"). "Not sure", "None", "notice", "Eyes ...": unparsed."""
    text = re.sub(r"[\"`“”«»「」*_]", "", clean(reply).casefold().replace("’", "'")).strip("' ")
    if not text:
        return Match(False, None, "yesno.empty")
    if _UNSURE.match(text):
        return Match(False, None, "yesno.unsure")
    for value, pattern in _LEAD:
        if pattern.match(text):
            return Match(value == answer.strip().casefold(), value, "yesno.lead")
    if _UNSURE.search(text):
        return Match(False, None, "yesno.unsure")
    found = [v for v in ("yes", "no") if re.search(rf"(?<![\w'-]){v}(?![\w'-])", text)]
    if len(found) == 1:
        return Match(found[0] == answer.strip().casefold(), found[0], "yesno.single")
    return Match(False, None, "yesno.conflict" if found else "yesno.unparsed")
