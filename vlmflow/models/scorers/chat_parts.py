"""Where an answer begins and ends in what a model's chat template makes of it: found by rendering, never by counting.

The official filtering script cuts the first 14 tokens off by a literal, which is right for one template of one model only
(spec data-eval-soup.md 5.1). Here a placeholder is rendered as the answer, and what stands around it is the frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmflow.errors import DataError, ModelError

ANSWER = "vlmflowanswer"


@dataclass(frozen=True)
class Frame:
    """Text around an answer: `before` (system prompt, images, instruction, header), the `end` token, and `prompt`, what
    the model is given when it shall write the answer itself."""

    before: str
    end: str
    prompt: str


def frame(processor: Any, instruction: str, images: int) -> Frame:
    """What the chat template puts around an answer to `instruction` under so many images.

    The end is the first special token behind the answer; a template that writes none gets the tokenizer's end token,
    which such models learn. What follows it (a line feed, most often) is no part of the answer.
    Raises ModelError when the template loses or repeats the answer or the model has no end token.
    """
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": instruction}]
    turns = [{"role": "user", "content": content}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
    try:
        rendered = processor.apply_chat_template([*turns, answer], tokenize=False)
        prompt = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja's many kinds, and those of missing templates
        raise ModelError(
            f"the scorer's chat template cannot render a picture, an instruction and an answer: {type(error).__name__}: {error}. "
            "Name an instruction-tuned model whose folder has a chat template for images"
        ) from error
    pieces = rendered.split(ANSWER)
    if len(pieces) != 2:
        raise ModelError(
            f"the scorer's chat template shows an answer {len(pieces) - 1} times instead of once; its tokens cannot be told apart"
        )
    behind = pieces[1].lstrip()
    ends = [token for token in special_tokens(processor.tokenizer) if behind.startswith(token)]
    end = max(ends, key=len) if ends else processor.tokenizer.eos_token
    if not end:
        raise ModelError("neither the scorer's chat template nor its tokenizer has an end token; the answer has no end")
    return Frame(pieces[0], end, prompt)


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer takes as one token of the template."""
    return sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})


def check_words(text: str, tokenizer: Any, name: str) -> None:
    """Refuse text that spells a token of the template. Raises DataError naming the request and the token."""
    for token in special_tokens(tokenizer):
        if token.strip() and token in text:
            raise DataError(f"sample '{name}': its text contains the special token {token}; the sample is refused")


def answer_length(tokenizer: Any, ids: list[int], frame: Frame, target: str) -> int:
    """How many of the last `ids` are the answer's tokens and its end token.

    `ids` are those of frame.before + target + frame.end with image tokens expanded, which changes nothing behind the
    instruction: so the same text is tokenised unexpanded, and its tokens that reach into the answer are counted.
    Raises ModelError when the two do not end alike.
    """
    text = frame.before + target + frame.end
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    count = sum(end > len(frame.before) for _, end in plain["offset_mapping"])
    if count == 0 or plain["input_ids"][-count:] != ids[-count:]:
        raise ModelError(
            f"the scorer's processor does not end a text as its tokenizer does (ids {ids[-3:]} against {plain['input_ids'][-3:]}); "
            "which tokens are counted would be a guess"
        )
    return count
