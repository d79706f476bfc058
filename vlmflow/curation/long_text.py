"""Long descriptions: how long they are, how two parts are joined, what is wrong with one, what a repair may change.

MiniGPT-4's builder (spec/systems.md A.2) rejects apologies and lets a language model remove repetition, garbage and
unfinished sentences. What the model answers is checked: it may leave out, but neither invent nor shrink the text.
"""

from __future__ import annotations

import re
import unicodedata

from vlmflow.curation.checks import is_refusal, leaks, repetition
from vlmflow.curation.textnorm import supported, tokens, vocabulary

CODES = {
    "empty": "there is no word",
    "refusal": "the model refuses, apologises or speaks of itself",
    "leak": "the answer talks about the task",
    "short": "too few words and marks",
    "repetition": "the same words come again and again",
    "garbage": "characters without meaning",
    "truncated": "the last sentence is not finished",
    "added": "words that the description does not hold",
    "shrunk": "too much of the description is gone",
}
MENDED = ("leak", "repetition", "garbage", "truncated")
"""Codes of a draft that a repair may mend; with any other one it is rejected."""
MAX_REPETITION = 0.2  # share of word 3-grams that occurred before
MAX_GARBAGE = 0.02  # share of characters
MAX_ADDED = 0.05  # share of content words that the description lacks: a completed sentence needs some
MIN_KEPT = 0.6  # share of the words of all different sentences

_UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")
_SENTENCE = re.compile(r".+?(?:[.!?。！？…]+[\"'”’»)\]]*(?=\s|$)|(?<=[。！？])|$)", re.DOTALL)
_FINISHED = re.compile(r"[.!?。！？…][\"'”’»)\]]*$")
_APOLOGY = re.compile(
    r"\b(?:my )?apolog(?:y|ies|i[sz]e)\b|\bi made (?:a|an) (?:mistake|error)\b|\bmy mistake\b", re.IGNORECASE
)


def length(text: str) -> int:
    """Words and marks (characters where a script has no spaces): close to tokens, and the same for every model."""
    return len(_UNIT.findall(text))


def sentences(text: str) -> list[str]:
    """The text's sentences in order; the last one may be unfinished."""
    return [s for match in _SENTENCE.finditer(" ".join(text.split())) if (s := match.group().strip())]


def joined(text: str, more: str) -> str:
    """A description and its continuation as one text: what the continuation says again at its start is left out."""
    text, more = " ".join(text.split()), " ".join(more.split())
    said, new = text.split(" "), more.split(" ")
    if new[: len(said)] == said:
        return more
    for n in range(min(len(said), len(new)), 0, -1):
        if said[-n:] == new[:n]:
            return " ".join([*said, *new[n:]])
    known = set(sentences(text))
    return " ".join([text, *(s for s in sentences(more) if s not in known)]).strip()


def finished(text: str) -> str:
    """The text up to the end of its last finished sentence; "" when none is."""
    found = sentences(text)
    while found and not _FINISHED.search(found[-1]):
        found.pop()
    return " ".join(found)


def problems(text: str, min_tokens: int, finish: str = "stop") -> list[str]:
    """Codes of what is wrong with a description by itself; empty when nothing is."""
    if not any(c.isalnum() for c in text):
        return ["empty"]
    words = [token.norm for token in tokens(text) if any(c.isalnum() for c in token.text)]
    odd = sum(c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") for c in text if not c.isspace())
    found = {
        "refusal": refuses(text),
        "leak": leaks(text),
        "short": length(text) < min_tokens,
        "repetition": repetition(words) > MAX_REPETITION or _repeated(text),
        "garbage": odd > MAX_GARBAGE * len(text) or re.search(r"([^\w\s.])\1{4,}", text),
        "truncated": finish == "length" or not _FINISHED.search(text.strip()),
    }
    return [code for code, wrong in found.items() if wrong]


def refuses(text: str) -> bool:
    """Whether the model declines, apologises or says that it erred."""
    return is_refusal(text) or bool(_APOLOGY.search(text))


def _repeated(text: str) -> bool:
    said = [s.casefold() for s in sentences(text) if len(s) > 20]
    return len(set(said)) < len(said)


def repair_problems(text: str, draft: str, min_tokens: int, finish: str = "stop") -> list[str]:
    """Codes of what is wrong with the repaired `text` of a `draft`: its own problems, words added, content lost."""
    found = problems(text, min_tokens, finish)
    known = vocabulary(draft)
    content = [token for token in tokens(text) if token.content and any(c.isalnum() for c in token.text)]
    new = [token for token in content if not supported(token, known)]
    telling = [token for token in new if token.kind != "word"]  # a number or code is never a completion
    if telling or len(new) > MAX_ADDED * len(content) + 1:
        found.append("added")
    different = sum(length(s) for s in dict.fromkeys(sentences(draft)))
    if length(text) < MIN_KEPT * different:
        found.append("shrunk")
    return found
