"""Preference samples: a prompt with images and two answers to it, rendered as two sequences that share one pack.

Each answer is a sequence of its own, prompt and tiles included, so the packed forward needs nothing new; the loss of a
pair needs both log-probabilities, so a pair is one item of the plan: never parted, chosen right before rejected. Only the answer in question and its end token are targets:
earlier turns of the assistant are part of the prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlmflow.errors import DataError

if TYPE_CHECKING:
    from vlmflow.models.chat import Segment

ANSWERS = ("chosen", "rejected")


def pairs_in(meta: dict[str, Any], key: str = "") -> list[dict[str, Any]]:
    """The pairs of a sample's meta. Raises DataError when it has none."""
    pairs = meta.get("preferences") or []
    if not pairs:
        raise DataError(
            f"sample '{key}' has no preferences; pull its table with a preferences_column, or choose another `text` in the stage"
        )
    return pairs


def render_pair(pair: dict[str, Any], images: int, key: str = "") -> tuple[list[Segment], list[Segment]]:
    """(chosen, rejected) of ``{"conversations", "chosen", "rejected"}`` as prompt segments.

    Raises:
        DataError: the prompt is empty or ends with the assistant, an answer is empty, both are the same, or image markers
            do not match the images.
    """
    from vlmflow.models.chat import ROLES, render_conversation

    turns = pair.get("conversations") or []
    if not turns:
        raise DataError(f"sample '{key}': a preference has no prompt; there is nothing that both answers answer")
    if ROLES.get(turns[-1].get("from", "")) == "assistant":
        raise DataError(
            f"sample '{key}': the prompt of a preference ends with a turn of the assistant; it must end with the user's, which "
            "both answers answer"
        )
    texts = [str(pair.get(name) or "").strip() for name in ANSWERS]
    if empty := [name for name, text in zip(ANSWERS, texts, strict=True) if not text]:
        raise DataError(f"sample '{key}': the {empty[0]} answer of a preference is empty")
    if texts[0] == texts[1]:
        raise DataError(
            f"sample '{key}': chosen and rejected answer of a preference are the same; neither is preferred"
        )
    made = []
    for text in texts:
        segments = render_conversation([*turns, {"from": "gpt", "value": text}], images, key)
        made.append([replace(s, target=False) for s in segments[:-2]] + segments[-2:])  # the last two: answer, end
    return made[0], made[1]
