"""What a text model finds wrong with questions, answers and captions (POINTS1.5, spec/points.md 8), as layer `judge`.

Two checks, neither of which shows the model the picture. `needs_image`: a question with a definite answer that the model
answers rightly needs no image. `grammar`: errors of language, and answers without meaning. POINTS1.5 found dropping
grammar errors better than mending them, and dropping questions that need no image slightly worse than keeping them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmflow.curation import prompts
from vlmflow.curation.ask import Row, Script, answered
from vlmflow.curation.asked_layer import add_asked_layer, endpoint
from vlmflow.curation.chat_format import ChatAnswer, ChatRequest
from vlmflow.curation.inputs import UPSTREAM, text_of
from vlmflow.curation.turns import MARKER
from vlmflow.dataset.layer import read_part
from vlmflow.evaluation import match

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.recipe.curation import JudgeSpec
    from vlmflow.step import Context

LAYER = "judge"
VERSION = 1
SCHEMA = {"problems": "list<str>", "asked": "int"}  # `asked`: questions put without their image
NEEDLESS, GRAMMAR = "needs no image", "grammar"
MAX_WORDS, MAX_CHARS = 5, 40  # of an answer that can be compared

Check = Generator[ChatRequest, ChatAnswer, Any]


class Round(NamedTuple):
    """One question of a sample and its answer, image marks removed."""

    question: str
    answer: str


class Undecided(Exception):
    """The server gave no verdict for this sample; the message is the row's error."""


def run(ctx: Context, manifest: Manifest) -> Manifest:
    """Add layer `judge`, or nothing when the recipe has no `curation.judge`. Needs the layer that `text` names.

    Raises:
        RecipeError, ServiceError: the endpoint is not configured or does not work.
        StepFailed: more samples than `curation.judge.failure_limit` have no verdict.
    """
    spec = ctx.recipe.curation.judge
    if spec is None:
        return manifest
    seed = ctx.recipe.seed
    params: dict[str, Any] = spec.model_dump(include={"text", "max_new_tokens"}) | {"checks": sorted(spec.checks)}
    params |= {
        "model": spec.model_name, "seed": seed, "match": match.MATCHER_VERSION,
        "prompts": {check: prompts.JUDGE[check] for check in sorted(spec.checks)},
    }  # fmt: skip

    def scripts(reader: ShardReader, upstream: dict[str, dict[str, Row]]) -> Iterator[Script]:
        for key in reader.keys():
            rounds, missing = _rounds(spec.text, key, reader.meta(key), upstream)
            if missing:
                yield answered({"key": key, "problems": [], "error": missing})
            else:
                yield _judged(key, rounds, spec, seed)

    return add_asked_layer(
        ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, scripts=scripts,
        reads=() if spec.text in ("alt", "conversations") else (spec.text,), endpoints={"": endpoint(spec, seed)},
        section="curation.judge", failure_limit=spec.failure_limit, prices={"": (spec.price_in, spec.price_out)},
        summary=lambda sealed: _summary(sealed, ctx.scratch),
    )  # fmt: skip


def _rounds(
    which: str, key: str, meta: dict[str, Any], upstream: dict[str, dict[str, Row]]
) -> tuple[list[Round], str | None]:
    """What is judged: rounds of a conversation, pairs of docqa, or one round without a question for any other text."""
    if which == "conversations":
        rounds = _of_turns(meta.get("conversations") or [])
    elif which == "docqa":
        row = upstream["docqa"][key]
        if row["error"]:
            return [], f"{UPSTREAM}docqa: {row['error'].removeprefix(UPSTREAM)}"
        rounds = [Round(pair["question"], pair["answer"]) for pair in row["pairs"] or []]
    else:
        text, missing = text_of(which, key, meta, upstream)
        return [Round("", text)], missing
    return rounds, None if rounds else f"{UPSTREAM}the sample has no {which}"


def _of_turns(turns: list[dict[str, str]]) -> list[Round]:
    rounds, question = [], ""
    for turn in turns:
        words = str(turn.get("value", "")).replace(MARKER, "").strip()
        if turn.get("from") == "gpt":
            rounds.append(Round(question, words))
            question = ""
        elif turn.get("from") == "human":
            question = words
    return rounds


def _judged(key: str, rounds: list[Round], spec: JudgeSpec, seed: int) -> Script:
    found: list[str] = []
    asked = 0
    try:
        if "grammar" in spec.checks:
            wrong = yield from _grammar(rounds, spec, seed)
            found += [f"{GRAMMAR}: {wrong}"] if wrong is not None else []
        if "needs_image" in spec.checks:
            asked, needless = yield from _needs_image(rounds, spec, seed)
            found += [f"{NEEDLESS}: {asked} of {asked} answered without it"] if needless else []
    except Undecided as problem:
        return {"key": key, "problems": found, "asked": asked, "error": str(problem)}
    return {"key": key, "problems": found, "asked": asked}


def _grammar(rounds: list[Round], spec: JudgeSpec, seed: int) -> Check:
    """What is wrong, in the model's words; None when nothing is."""
    text = "\n\n".join(f"Question: {r.question}\nAnswer: {r.answer}" if r.question else r.answer for r in rounds)
    for attempt in range(2):
        answer = yield ChatRequest(
            prompts.JUDGE["grammar"].format(text=text), max_tokens=spec.max_new_tokens, seed=seed + attempt
        )
        verdict = read_verdict(_said(answer))
        if verdict is not None:
            wrong, why = verdict
            return why if wrong else None
    raise Undecided("no verdict: the answer begins with neither yes nor no")


def _needs_image(rounds: list[Round], spec: JudgeSpec, seed: int) -> Check:
    """(questions asked, whether all were answered rightly without the image). Only samples all of whose answers are
    definite are asked, and the first wrong answer settles it."""
    matchers = [matcher(r) for r in rounds]
    if not all(matchers):
        return 0, False
    for number, (r, right) in enumerate(zip(rounds, matchers, strict=True), 1):
        answer = yield ChatRequest(
            prompts.JUDGE["needs_image"].format(question=r.question), max_tokens=spec.max_new_tokens, seed=seed
        )
        if right is None or not right(_said(answer)):
            return number, False
    return len(rounds), True


def _said(answer: ChatAnswer) -> str:
    if answer.error:
        raise Undecided(answer.error)
    return answer.text


def read_verdict(reply: str) -> tuple[bool, str] | None:
    """(an error was found, which) from "no" or "yes: ..."; None when the reply is neither."""
    read = re.match(r"\W*(yes|no)\b\W*(.*)", match.clean(reply), re.IGNORECASE)
    if read is None:
        return None
    return read[1].lower() == "yes", (read[2].strip() or "not said")[:120]


_OPTION = re.compile(r"(?:^|[\s;,])\(?([A-Z])[).:]\s+(.+?)(?=(?:[\s;,]\(?[A-Z][).:]\s)|\n|$)")


def options_of(question: str) -> dict[str, str]:
    """Lettered options of a question, from A on without a gap; {} when it has fewer than two."""
    found: dict[str, str] = {}
    for letter, text in _OPTION.findall(question):
        if letter == chr(ord("A") + len(found)):
            found[letter] = text.strip()
    return found if len(found) > 1 else {}


def matcher(r: Round) -> Callable[[str], bool] | None:
    """Says whether a reply is the round's answer, by the rules of evaluation; None when the answer is not definite."""
    answer = r.answer.strip()
    if not r.question or not any(c.isalnum() for c in answer):
        return None
    if options := options_of(r.question):
        letter = match.match_choice(answer, "", options).extracted
        return (lambda reply: match.match_choice(reply, letter, options).correct) if letter else None
    if (word := match.normalise(answer)) in ("yes", "no"):
        return lambda reply: match.match_yes_no(reply, word).correct
    if len(answer.split()) > MAX_WORDS or len(answer) > MAX_CHARS:
        return None
    return lambda reply: match.match_reading(reply, [answer], numbers=True).correct


def _summary(sealed: Manifest, scratch: Any) -> dict[str, Any]:
    """Samples by problem, and how many were asked without their image."""
    counts: Counter[str] = Counter()
    judged = asked = 0
    for part in sealed.layer(LAYER).parts:
        for row in read_part(part, scratch).values():
            judged += row["error"] is None
            asked += bool(row["asked"])
            counts.update(problem.split(":")[0] for problem in row["problems"] or [])
    return {"judged": judged, "asked_without_image": asked, "problems": dict(sorted(counts.items()))}
