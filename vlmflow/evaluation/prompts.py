"""The words a benchmark question becomes. The prompt moves scores by more than most training changes do
(data-eval-soup 7.4: 58.3 against 44.7 on one benchmark), so there is one place, and the recipe can override the suffix.
"""

from __future__ import annotations

from vlmflow.evaluation.tsv import KINDS, Question

PROMPT_VERSION = 1

# Default last lines, English and Chinese. Multiple choice as VLMEvalKit users expect it (points.md 10: "answer with the
# letter" suffix; HallusionBench a yes/no suffix); reading asks nothing more.
SUFFIX = {
    "reading": ("", ""),
    "multiple_choice": ("Answer with the option's letter from the given choices directly.", "请直接回答选项字母。"),
    "yes_no": ("Please answer yes or no.", "请回答是或否。"),
}


def build(question: Question, kind: str, suffix: str | None = None) -> str:
    """The prompt text of a question (images are passed beside it, before the text).

    reading: the question; multiple_choice: hint, question, the options as "A. text", one a line; yes_no: the question.
    `suffix`: None or "" = the kind's own; "none" = nothing; a text that starts with a blank is appended as it stands
    (some published settings do), any other becomes the last line.
    """
    if kind not in KINDS:
        raise ValueError(f"benchmark kind {kind!r} is not known; known kinds: {', '.join(KINDS)}")
    lines = [question.hint] if question.hint else []
    lines.append(question.question)
    if kind == "multiple_choice":
        lines += [f"{letter}. {text}" for letter, text in question.options.items()]
    prompt = "\n".join(lines)
    if suffix == "none":
        return prompt
    if not suffix:
        english, chinese = SUFFIX[kind]
        suffix = chinese if has_chinese(prompt) else english
    return prompt + (suffix if not suffix or suffix[0].isspace() else "\n" + suffix)


def has_chinese(text: str) -> bool:
    """Whether a text holds a Han character (then the Chinese suffix is asked)."""
    return any("\u4e00" <= c <= "\u9fff" for c in text)
