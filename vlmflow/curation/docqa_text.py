"""Questions and answers in a text model's reply: how they are read, and which of them a page does not bear out.

The filters are Docmatix' and SmolVLM's (spec/systems.md A.1): code fragments, "unanswerable", turns over 500 characters,
pairs that hallucinate, texts with special image tokens. Each dropped pair is counted under its reason.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from vlmflow.curation.checks import is_refusal
from vlmflow.curation.textnorm import Token, supported, tokens, vocabulary
from vlmflow.curation.word_lists import FUNCTION_WORDS, MONTHS

Pair = dict[str, str]
REASONS = {
    "malformed": "no question, or no answer",
    "image_token": "a special token of an image",
    "code": "a fragment of program code or markup",
    "unanswerable": "the answer says that there is none",
    "long": "question or answer over the limit of characters",
    "hallucinated": "a number or name in the answer that the page does not hold",
    "duplicate": "the same question again",
}

_IMAGE_TOKEN = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?(?:image|img|video|global-img|fake_token_around_image|row_\d+_col_\d+)\b[^<>]{0,20}>",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"```|#include\s*[<\"]|\bdef \w+\(|\bfunction\s*\w*\s*\(|=>\s*\{|\)\s*\{|;\s*\}|\bimport \w+(?:\.\w+)*;|\bpublic (?:static )?\w+ \w+\(|"
    r"</?(?:div|span|html|body|table|tr|td|script|p|br|a|li|ul)\b[^<>]*>|\bSELECT\b.+\bFROM\b.+[;=]|\bprint\(|\breturn \w+;|"
    r"^\s*[{\[]\s*[\"'][\w ]+[\"']\s*:|\\n\\n|\bconsole\.log\b|\\(?:begin|frac|mathbf)\{"
)
_UNANSWERABLE = re.compile(
    r"\bunanswerable\b|\b(?:is|are|was|were) not (?:explicitly |directly )?(?:mentioned|specified|provided|stated|given|available|included)\b|"
    r"\b(?:can(?:not|'t)|could not) be (?:determined|answered|inferred)\b|\bno (?:such )?information\b|\bnot enough information\b|"
    r"\bdoes(?: not|n't) (?:mention|specify|provide|state|contain|say|include)\b|^(?:unknown|n/?a|none|not (?:mentioned|specified|applicable))[.!]?$",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^\W*(?:\d+\s*[.):]\W*)?(?P<label>q(?:uestion)?|a(?:nswer)?)\s*\d*\s*\W{0,3}[:：]\W{0,3}\s*(?P<text>.*)$",
    re.IGNORECASE,
)


def read(reply: str) -> tuple[list[Pair], int]:
    """(pairs, how many were malformed) of a reply: a JSON list or lines of objects, also fenced, wrapped or cut off in the
    middle; or lines "Q: ..." and "A: ...". Anything else gives no pair."""
    found = [entry for value in _json_values(reply) for entry in _entries(value)]
    if not found:
        found = list(_labelled(reply))
    pairs, malformed = [], 0
    for entry in found:
        question, answer = (_text(entry, names) for names in (("question", "q"), ("answer", "a")))
        if question and answer:
            pairs.append({"question": question, "answer": answer})
        else:
            malformed += 1
    return pairs, malformed


def _json_values(reply: str) -> Iterator[Any]:
    """Every whole JSON list or object of a text, outermost first; of a list that was cut off, the whole objects in it."""
    decoder, at = json.JSONDecoder(strict=False), 0
    while (start := re.compile(r"[\[{]").search(reply, at)) is not None:
        try:
            value, at = decoder.raw_decode(reply, start.start())
            yield value
        except ValueError:
            at = start.start() + 1
        except RecursionError:
            return


def _entries(value: Any) -> Iterator[dict[str, Any]]:
    """The objects that look like a question or an answer, at most two levels down."""
    if isinstance(value, dict):
        names = {str(name).strip().lower(): content for name, content in value.items()}
        if names.keys() & {"question", "q", "answer", "a"}:
            yield names
        else:
            for content in value.values():
                if isinstance(content, list):
                    yield from _entries(content)
    elif isinstance(value, list):
        for content in value:
            if isinstance(content, dict):
                yield from _entries(content)


def _labelled(reply: str) -> Iterator[dict[str, str]]:
    """Q: and A: lines; a line without a label goes on with the one before."""
    entry: dict[str, str] = {}
    last = ""
    for line in reply.splitlines():
        if match := _LABEL.match(line):
            label = "question" if match["label"][0] in "qQ" else "answer"
            if (label == "question" and entry) or label in entry:
                yield entry
                entry = {}
            entry[label], last = match["text"].strip().strip("*").strip(), label
        elif line.strip() and last:
            entry[last] += " " + line.strip()
        else:
            last = ""
    if entry:
        yield entry


def _text(entry: dict[str, Any], names: tuple[str, ...]) -> str:
    value = next((entry[name] for name in names if name in entry), None)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    text = " ".join(str(value).split())
    return text if any(c.isalnum() for c in text) else ""


def sift(pairs: list[Pair], page: str, max_chars: int) -> tuple[list[Pair], Counter[str]]:
    """(pairs that stay, dropped pairs by reason) given the text of their page."""
    stay, dropped, asked = [], Counter[str](), set()
    known, squeezed = vocabulary(page), _squeezed(page)
    for pair in pairs:
        both = pair["question"] + "\n" + pair["answer"]
        question = _squeezed(pair["question"])
        checks = {
            "image_token": _IMAGE_TOKEN.search(both),
            "code": _CODE.search(both),
            "unanswerable": _UNANSWERABLE.search(pair["answer"]) or is_refusal(pair["answer"]),
            "long": max(len(pair["question"]), len(pair["answer"])) > max_chars,
            "hallucinated": unsupported(pair["answer"], known, squeezed),
            "duplicate": question in asked,
        }
        reason = next((reason for reason, wrong in checks.items() if wrong), None)
        if reason:
            dropped[reason] += 1
        else:
            asked.add(question)
            stay.append(pair)
    return stay, dropped


def unsupported(answer: str, known: frozenset[str], squeezed: str) -> list[str]:
    """Numbers, codes and names of an answer that its page does not hold.

    A number written as a word ("two") may be a count and is let through; a month may stand for its number. OCR often
    joins words, so that a word also counts as there when its letters follow each other in the page.
    """
    found, start = [], " " in answer.strip() and answer.strip()[-1:] in ".!?"  # a bare phrase has no sentence's capital
    for chunk in answer.split():
        for token in tokens(chunk):
            if _telling(token, start) and not supported(token, known):
                letters = _squeezed(token.text)
                month = MONTHS.get(token.text.casefold())
                if not (len(letters) > 2 and letters in squeezed) and not (month and month in known):
                    found.append(token.text)
            start = False
        start = chunk[-1:] in ".!?:"
    return found


def _telling(token: Token, start: bool) -> bool:
    if any(c.isdigit() for c in token.text):
        return True
    word = token.text
    if token.kind != "word" or not word[:1].isupper() or word.casefold() in FUNCTION_WORDS | {"i", "yes", "no"}:
        return False
    return not start


def _squeezed(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())
