"""Put questions to a model and judge the replies. One question that cannot be asked never costs the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from vlmflow.errors import DataError, ModelError
from vlmflow.evaluation import prompts
from vlmflow.evaluation.match import Match, match
from vlmflow.evaluation.tsv import Question, Table


class Generates(Protocol):
    """What evaluation needs of a model; `vlmflow.models.inference.VLM` is one."""

    def generate(self, requests: list[Any], max_new_tokens: int, batch: int, progress: Any = None) -> list[Any]: ...


def ask(
    vlm: Generates,
    table: Table,
    questions: Sequence[Question],
    settings: Mapping[str, Any],
    batch: int,
    advance: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """One row a question, in order: index, category, prompt, answer, reply, finish, correct, extracted, rule, error.

    settings: kind, suffix, numbers, max_tiles, max_new_tokens. A broken image, or a prompt that the model refuses, is the
    row's `error`, and the row counts as wrong. `advance(n)` is called as questions are answered.
    """
    from vlmflow.models.inference import Request

    kind = settings["kind"]
    texts = {q.index: prompts.build(q, kind, settings["suffix"]) for q in questions}
    problems: dict[str, str] = {}
    requests: dict[str, Any] = {}
    for q in questions:
        try:
            requests[q.index] = Request(images=table.images(q), prompt=texts[q.index])
        except DataError as e:
            problems[q.index] = str(e)
            advance(1)
    with _tile_limit(vlm, settings["max_tiles"], table.name):
        replies = _replies(vlm, requests, settings["max_new_tokens"], batch, advance, problems)
    rows = []
    for q in questions:
        text, finish, verdict = "", "", Match(False, None, "error")
        if q.index in replies:
            text, finish = replies[q.index].text, replies[q.index].finish
            verdict = match(kind, text, q, settings["numbers"])
        rows.append(
            {
                "index": q.index,
                "category": q.category,
                "prompt": texts[q.index],
                "answer": q.answer,
                "reply": text,
                "finish": finish,
                "correct": verdict.correct,
                "extracted": verdict.extracted,
                "rule": verdict.rule,
                "error": problems.get(q.index),
            }
        )
    return rows


def _replies(
    vlm: Generates,
    requests: dict[str, Any],
    max_new_tokens: int,
    batch: int,
    advance: Callable[[int], Any],
    problems: dict[str, str],
) -> dict[str, Any]:
    """Replies by question index. When the model refuses one request (DataError), each is asked alone to find it."""
    if not requests:
        return {}
    try:
        found = vlm.generate(list(requests.values()), max_new_tokens=max_new_tokens, batch=batch, progress=advance)
        return dict(zip(requests, found, strict=True))
    except DataError as e:
        if len(requests) == 1:
            problems[next(iter(requests))] = f"the model refuses this question: {e}"
            advance(1)
            return {}
    alone = [_replies(vlm, {i: r}, max_new_tokens, batch, advance, problems) for i, r in requests.items()]
    return {index: reply for one in alone for index, reply in one.items()}


@contextmanager
def _tile_limit(vlm: Any, limit: int | None, benchmark: str) -> Iterator[None]:
    """The benchmark's own tile limit for the time of its questions (points.md 1.3: 12 for MMBench and OCRBench)."""
    if limit is None:
        yield
        return
    config: Any = getattr(getattr(vlm, "model", None), "config", None)
    if not hasattr(config, "max_tiles"):
        raise ModelError(
            f"evaluation.benchmarks.{benchmark}.max_tiles is {limit}, but this model's config has no max_tiles"
        )
    usual = config.max_tiles
    config.max_tiles = limit
    try:
        yield
    finally:
        config.max_tiles = usual
