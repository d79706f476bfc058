"""What people write into a table's cells: conversations, and pairs of a better and a worse answer.

Both come in the field's dialects, LLaVA's ``from``/``value``, OpenAI's ``role``/``content`` (there with content parts) and the
Cauldron's ``user``/``assistant`` (a question and its answer), as lists or as JSON in one cell. They leave here in LLaVA's form; what cannot is a reason, not an exception, because
one bad row never stops a table.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

MARKER = "<image>"
Turns = list[dict[str, str]]
Problem = tuple[str, str]  # (reason code, detail)
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


def conversations(value: Any, images: int) -> tuple[Turns | None, Problem | None]:
    """The turns of a cell, None for an empty one; `images` is the number of URLs that marks are checked against."""
    reason = "bad_conversations"
    value, problem = _parsed(value, reason)
    if problem or value is None or value == []:
        return None, problem
    if not isinstance(value, list):
        return None, (reason, f"a {type(value).__name__}, not a list of turns")
    if all(isinstance(turn, dict) and "user" in turn and "assistant" in turn for turn in value):
        value = _asked_and_answered(value, images)
    turns = []
    for number, turn in enumerate(value):
        read = _turn(turn)
        if read is None:
            return None, (reason, f"turn {number} is not {{from: human|gpt, value: text}}")
        turns.append(read)
    return (None, wrong) if (wrong := _marks(turns, images)) else (turns, None)


def preferences(value: Any, images: int) -> tuple[list[dict[str, Any]] | None, Problem | None]:
    """The pairs of a cell as ``{"conversations", "chosen", "rejected"}``: one pair, or a list of them.

    A pair's prompt stands under ``conversations``, ``messages``, ``prompt`` or ``question``, as turns or as the words of one
    user turn; an answer is a text or the one turn of the assistant. Words that mark no image get all images in front, as
    tables of this kind (RLAIF-V, TRL's) rarely write marks.
    """
    reason = "bad_preferences"
    value, problem = _parsed(value, reason)
    if problem or value is None or value == []:
        return None, problem
    pairs = []
    for number, pair in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(pair, dict):
            return None, (reason, f"pair {number} is a {type(pair).__name__}, not {{conversations, chosen, rejected}}")
        prompt = next((pair[k] for k in ("conversations", "messages", "prompt", "question") if pair.get(k)), None)
        turns, problem = conversations(_asked(prompt), images)
        if problem:
            return None, (problem[0].replace("conversations", "preferences"), f"pair {number}: {problem[1]}")
        if not turns:
            return None, (reason, f"pair {number} has no prompt")
        answers = {name: _answer(pair.get(name)) for name in ("chosen", "rejected")}
        if missing := [name for name, text in answers.items() if text is None]:
            return None, (reason, f"pair {number}: '{missing[0]}' is not a text or one turn of the assistant")
        if images and not any(MARKER in turn["value"] for turn in turns):
            first = next((i for i, turn in enumerate(turns) if turn["from"] == "human"), 0)
            turns[first] = {**turns[first], "value": f"{MARKER}\n" * images + turns[first]["value"]}
        pairs.append({"conversations": turns, **answers})
    return pairs, None


def _parsed(value: Any, reason: str) -> tuple[Any, Problem | None]:
    if not isinstance(value, str):
        return value, None
    if not value.strip():
        return None, None
    try:
        return json.loads(value), None
    except (ValueError, RecursionError):
        return None, (reason, "not JSON")


def _turn(turn: Any) -> dict[str, str] | None:
    if not isinstance(turn, dict):
        return None
    speaker, said = turn.get("from") or turn.get("role"), _said(turn.get("value", turn.get("content")))
    return {"from": _ROLES[speaker], "value": said} if speaker in _ROLES and said is not None else None


def _asked_and_answered(value: list[Any], images: int) -> list[Any]:
    """The Cauldron's pairs as turns; its images stand in front of the first question without marks."""
    turns = [{"from": role, "value": pair[role]} for pair in value for role in ("user", "assistant")]
    if isinstance(turns[0]["value"], str) and not any(MARKER in str(turn["value"]) for turn in turns):
        turns[0]["value"] = f"{MARKER}\n" * images + turns[0]["value"]
    return turns


def utf8(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs, which JSON may name, become question marks."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _said(content: Any) -> str | None:
    """Text of a turn; OpenAI's content parts become text with marks."""
    if isinstance(content, str):
        return utf8(content)
    if not isinstance(content, list):
        return None
    words = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):
            words.append(f"{MARKER}\n")
        elif kind == "text" and isinstance(part.get("text"), str):
            words.append(part["text"])
        else:
            return None
    return utf8("".join(words))


def _answer(value: Any) -> str | None:
    """A text, or the assistant's one turn (bare or in a list)."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        turn = _turn(value)
        return turn["value"] if turn and turn["from"] == "gpt" else None
    return utf8(value) if isinstance(value, str) else None


def _asked(prompt: Any) -> Any:
    """Turns of a prompt; plain words are one user turn."""
    if not isinstance(prompt, str):
        return prompt
    with suppress(ValueError):
        if isinstance(turns := json.loads(prompt), list):
            return turns
    return [{"from": "human", "value": prompt}]


def _marks(turns: Turns, images: int) -> Problem | None:
    marks = sum(turn["value"].count(MARKER) for turn in turns)
    return ("image_marks", f"{marks} {MARKER} marks but {images} image URLs") if marks and marks != images else None
