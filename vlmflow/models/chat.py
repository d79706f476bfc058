"""From a sample to a list of segments: which text, which image, and what the model is trained to say.

Two prompt styles of POINTS 1.0 (points.md 2.1): `continuation` = images, caption, end; `chat` = ChatML without a system
prompt, images directly after the user header, no separators between tiles. Markers of the template are special
segments; text of users and datasets never is, so it cannot inject a special token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmflow.errors import DataError

START, END, IMAGE = "<|im_start|>", "<|im_end|>", "<|image_pad|>"
MARKER = "<image>"
REFUSED = (IMAGE, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|video_pad|>")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

# The template as Jinja: strings, and content lists of {"type": "image"} and {"type": "text"} items.
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{- '<|image_pad|>' -}}{%- else -%}{{- item['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Segment:
    """A piece of a sequence: `text`, or the tiles of image number `image`; `target` = loss is taken on it.

    `special`: `text` is one special token of the template, looked up, never tokenised.
    """

    text: str | None = None
    image: int | None = None
    target: bool = False
    special: bool = False


def render(
    source: Any,
    style: str = "chat",
    *,
    text: str | None = None,
    instruction: str = "",
    images: int | None = None,
    key: str = "",
) -> list[Segment]:
    """Segments of one training sample.

    Args:
        source: a `dataset.Sample`, or a list of conversation turns ({"from", "value"}), or None with `text`.
        style: `continuation` or `chat`.
        text: caption to learn; None = the sample's conversations.
        instruction: the user's words before a caption (chat style only).
        images: number of images; default: those of the sample.
        key: sample name for error messages; default: the sample's key.

    Raises DataError for an unknown style, empty text, image tokens inside text, unknown roles, or a number of
    `<image>` markers that differs from the number of images.
    """
    if images is None:
        images = len(getattr(source, "images", ()))
    key = key or getattr(source, "key", "")
    if text is not None:
        return render_caption(text, images, style, instruction, key)
    turns = source if isinstance(source, list) else (getattr(source, "meta", None) or {}).get("conversations")
    if not turns:
        raise DataError(
            f"sample '{key}' has no conversations; give it a text field or choose another `text` in the stage"
        )
    if style != "chat":
        raise DataError(f"sample '{key}' is a conversation, which needs style 'chat', not '{style}'")
    return render_conversation(turns, images, key)


def render_caption(text: str, images: int, style: str, instruction: str = "", key: str = "") -> list[Segment]:
    """Images and the text that describes them, in either style; the text and the end token are targets."""
    text = text.strip()
    if not text:
        raise DataError(f"sample '{key}' has an empty text; nothing could be learnt from it")
    check_text(text, key)
    answer = [Segment(text=text, target=True), Segment(text=END, target=True, special=True)]
    if style == "continuation":
        return [Segment(image=i) for i in range(images)] + answer
    if style == "chat":
        return render_prompt(instruction, images, key) + answer
    raise DataError(f"unknown prompt style '{style}'; known: continuation, chat")


def render_prompt(prompt: str, images: int, key: str = "") -> list[Segment]:
    """A user turn and the assistant's header: what the model sees before it answers. Nothing is a target."""
    check_text(prompt, key)
    turn = _turn("user", [*(Segment(image=i) for i in range(images)), Segment(text=prompt)])
    return [*turn, *_header("assistant")]


def render_conversation(turns: Sequence[dict[str, str]], images: int, key: str = "", before: int = 0) -> list[Segment]:
    """A LLaVA-style conversation; every assistant turn and its end token are targets.

    A single `<image>` marker of a turn moves to the turn's front (points.md 2.1); several keep their places.

    Args:
        before: the turns are the rest of a longer conversation whose first `before` images were shown earlier; they are
            put in front of the first turn that is not the assistant's.
    """
    markers = before + count_markers(turns, key)
    if markers != images:
        raise DataError(
            f"sample '{key}' has {markers} {MARKER} markers in its conversation but {images} images; "
            "every image needs exactly one marker, or features would land on the wrong text"
        )
    segments: list[Segment] = []
    seen, answers, again = 0, 0, before
    for number, turn in enumerate(turns):
        role, value = _role(turn, key), str(turn.get("value", ""))
        check_text(value, key)
        if segments:
            segments.append(Segment(text="\n"))
        if role == "assistant":
            if not value.strip():
                raise DataError(f"sample '{key}': turn {number} of the assistant is empty")
            answers += 1
            segments += _header(role)
            segments += [Segment(text=value.strip(), target=True), Segment(text=END, target=True, special=True)]
        else:
            shown, seen = render_user_turn(turn, seen, again)
            segments += shown
            again = 0
    if not answers:
        raise DataError(
            f"sample '{key}' has {len(turns)} turns and none of the assistant; nothing could be learnt from it"
        )
    return segments


def render_user_turn(turn: dict[str, str], seen: int = 0, before: int = 0) -> tuple[list[Segment], int]:
    """(segments of one turn that is not the assistant's, images used up to its end).

    Args:
        seen: images that were used before.
        before: images that are shown in front of the turn's own, the next after `seen`.
    """
    content, used = _place(str(turn.get("value", "")), seen + before)
    content = [*(Segment(image=seen + i) for i in range(before)), *content]
    return _turn(_role(turn, ""), content)[:-1], used


def count_markers(turns: Sequence[dict[str, str]], key: str = "") -> int:
    """Image markers of the turns that are not the assistant's."""
    return sum(str(turn.get("value", "")).count(MARKER) for turn in turns if _role(turn, key) != "assistant")


def rounds(turns: Sequence[dict[str, str]]) -> list[tuple[int, int]]:
    """(first, last) turn of each round: what is said before the assistant, and its answers.

    A conversation may be split between two rounds. What follows the last answer belongs to the last round.
    """
    answered = [ROLES.get(turn.get("from", "")) == "assistant" for turn in turns]
    last_answer = max((i for i, answer in enumerate(answered) if answer), default=-1)
    starts = [0, *(i for i in range(1, last_answer) if answered[i - 1] and not answered[i])]
    return list(zip(starts, [*(i - 1 for i in starts[1:]), len(turns) - 1], strict=True))


def check_text(text: str, key: str = "") -> None:
    """Refuse text that spells an image token. Raises DataError naming the sample and the token."""
    for token in REFUSED:
        if token in text:
            raise DataError(f"sample '{key}': its text contains the image token {token}; the sample is refused")


def _role(turn: dict[str, str], key: str) -> str:
    name = turn.get("from", "")
    if name not in ROLES:
        raise DataError(f"sample '{key}': unknown speaker '{name}'; known: {', '.join(sorted(ROLES))}")
    return ROLES[name]


def _header(role: str) -> list[Segment]:
    return [Segment(text=START, special=True), Segment(text=role + "\n")]


def _turn(role: str, content: list[Segment]) -> list[Segment]:
    return [*_header(role), *content, Segment(text=END, special=True), Segment(text="\n")]


def _place(value: str, seen: int) -> tuple[list[Segment], int]:
    """Split a user text at its markers; returns the segments and the number of images used so far."""
    pieces = value.split(MARKER)
    count = len(pieces) - 1
    images = [Segment(image=seen + i) for i in range(count)]
    if count <= 1 or not "".join(pieces[:-1]).strip():
        rest = "\n".join(piece.strip() for piece in pieces if piece.strip())
        return [*images, Segment(text=rest)], seen + count
    segments: list[Segment] = []
    for i, piece in enumerate(pieces):
        text = piece.lstrip() if i == 0 else piece
        if text:
            segments.append(Segment(text=text.rstrip() if i == count else text))
        if i < count:
            segments.append(images[i])
    return segments, seen + count
