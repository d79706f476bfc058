"""Long descriptions by MiniGPT-4's builder (spec/systems.md A.2), as layer `described`.

A vision-language model describes the picture and is asked to go on while the text is short; a text model removes
repetition, garbage and unfinished sentences; apologies and what stays bad are rejected, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmflow.curation import prompts
from vlmflow.curation.ask import Row, Script, answered, finished
from vlmflow.curation.asked_layer import add_asked_layer, endpoint
from vlmflow.curation.caption import Lazy
from vlmflow.curation.chat_format import ChatAnswer, ChatRequest
from vlmflow.curation.inputs import check_own_failures, check_pictures, picture_windows, pictures, scorer
from vlmflow.curation.long_text import MENDED, joined, length, problems, refuses, repair_problems
from vlmflow.curation.long_text import finished as cut
from vlmflow.dataset.layer import add_layer, read_part
from vlmflow.errors import DataError, RecipeError
from vlmflow.models import store

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.sample import Sample
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.models.store import ModelRef
    from vlmflow.recipe.curation import DescribeSpec
    from vlmflow.step import Context

LAYER = "described"
VERSION = 1
SCHEMA = {
    "text": "str",
    "rounds": "int",  # times the describer was asked
    "tokens": "int",  # words and marks of the text
    "problems": "list<str>",  # long_text.CODES of the draft (mended) or, with an error, of the rejected text
}


class Draft(NamedTuple):
    """What the describer wrote: text, times it was asked, how the last answer ended, or why there is no text."""

    text: str
    rounds: int
    finish: str = "stop"
    error: str | None = None


def run(ctx: Context, manifest: Manifest, model: ModelRef | None = None) -> Manifest:
    """Add layer `described`, or nothing when the recipe has no `curation.describe`. Engine "model" needs `model`.

    Raises:
        RecipeError: engine "model" without a model, or an endpoint variable that is not set.
        ServiceError: an endpoint does not work.
        StepFailed: more samples failed or were rejected than `curation.describe.failure_limit`.
    """
    spec = ctx.recipe.curation.describe
    if spec is None:
        return manifest
    seed = ctx.recipe.seed
    params: dict[str, Any] = spec.model_dump(
        include={"engine", "prompt", "min_tokens", "continuations", "max_new_tokens"}
    )
    params |= {"continue": prompts.CONTINUE, "repair": None}
    servers, prices = {}, {}
    if spec.engine == "openai":
        params |= {"model": spec.model_name, "seed": seed}
        servers[""], prices[""] = endpoint(spec, seed), (spec.price_in, spec.price_out)
    else:
        model = scorer(ctx, model)
        if model is None:
            raise RecipeError(
                "curation.describe.engine is 'model' but the step got no model; pass one or use engine openai"
            )
        params |= {"weights": model.weights_sha256, "model": store.behaviour_digest(model.files)}
        vlm = Lazy(ctx, model)
    if spec.repair:
        params |= {"repair": [prompts.REPAIR, prompts.REPAIR_RETRY], "repairer": spec.repair_model_name, "seed": seed}
        servers["repair"] = endpoint(
            spec, seed, url_env=spec.repair_endpoint_env, key_env=spec.repair_key_env,
            model=spec.repair_model_name, concurrency=spec.repair_concurrency,
        )  # fmt: skip
        prices["repair"] = (spec.repair_price_in, spec.repair_price_out)

    def scripts(reader: ShardReader, _: Any) -> Iterator[Script]:
        if spec.engine == "openai":
            return (_by_endpoint(reader.read(key), spec, seed) for key in reader.keys())
        return (_mended(key, draft, spec, seed) for key, draft in _by_model(reader, vlm, spec))

    def summary(sealed: Manifest) -> dict[str, Any]:
        return _summary(sealed, ctx.scratch)

    if servers:
        return add_asked_layer(
            ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, endpoints=servers, scripts=scripts,
            pictures=True, section="curation.describe", failure_limit=spec.failure_limit, prices=prices, summary=summary,
        )  # fmt: skip

    def whole_summary(sealed: Manifest) -> dict[str, Any]:
        reasons = check_own_failures(sealed, LAYER, spec.failure_limit, "curation.describe", ctx.scratch)
        return {"failures": reasons, **summary(sealed)}

    return add_layer(
        ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, failure_limit=1.0, summary=whole_summary,
        compute=lambda reader, upstream: map(finished, scripts(reader, upstream)),
    )  # fmt: skip


def _written(images: tuple[bytes, ...], spec: DescribeSpec, seed: int) -> Generator[ChatRequest, ChatAnswer, Draft]:
    """Describe, and go on while it is short. A generator like a Script that returns a Draft."""
    text, finish, rounds = "", "stop", 0
    for attempt in range(1 + spec.continuations):
        prompt = prompts.CONTINUE.format(prompt=spec.prompt, text=text) if attempt else spec.prompt
        answer = yield ChatRequest(prompt, images, spec.max_new_tokens, seed=seed)
        rounds += 1
        if answer.error:
            return Draft(text, rounds, finish, answer.error)
        if attempt and (answer.finish == "content_filter" or refuses(answer.text) or not answer.text.strip()):
            break  # it has nothing more to say
        if answer.finish == "content_filter" or refuses(answer.text):
            return Draft("", rounds, finish, "the model refused to describe the image")
        before, text, finish = text, joined(text, answer.text) if text else " ".join(answer.text.split()), answer.finish
        if length(text) >= spec.min_tokens or text == before:
            break
    return Draft(text, rounds, finish)


def _by_endpoint(sample: Sample, spec: DescribeSpec, seed: int) -> Script:
    try:
        check_pictures(sample)  # a picture that we cannot read must not cost a request
    except DataError as error:
        return answered({"key": sample.key, "error": str(error)})

    def ask() -> Script:
        draft = yield from _written(sample.images, spec, seed)
        return (yield from _mended(sample.key, draft, spec, seed))

    return ask()


def _by_model(reader: ShardReader, vlm: Lazy, spec: DescribeSpec) -> Iterator[tuple[str, Draft]]:
    """Drafts of a shard: all samples of a window are described in one batch, the short ones continued in the next."""
    from vlmflow.models.inference import Request

    for window in picture_windows(reader):
        open_, images = [], {}
        for sample in window:
            try:
                images[sample.key] = pictures(sample)
            except DataError as error:
                yield sample.key, Draft("", 0, error=str(error))
                continue
            script = _written((), spec, 0)
            open_.append((sample.key, script, next(script)))
        while open_:
            asked = [Request(images=images[key], prompt=request.prompt) for key, _, request in open_]
            answers = vlm().generate(asked, max_new_tokens=spec.max_new_tokens, batch=spec.batch)
            still = []
            for (key, script, _), answer in zip(open_, answers, strict=True):
                try:
                    still.append((key, script, script.send(ChatAnswer(answer.text, answer.finish))))
                except StopIteration as end:
                    yield key, end.value
            open_ = still


def _mended(key: str, draft: Draft, spec: DescribeSpec, seed: int) -> Script:
    """Repair (or cut the unfinished end), check, keep or reject."""
    row: Row = {"key": key, "rounds": draft.rounds}
    if draft.error:
        return row | {"error": draft.error}
    wrong = problems(draft.text, spec.min_tokens, draft.finish)
    left: list[str] = []
    if not spec.repair:
        text = cut(draft.text)
        left = problems(text, spec.min_tokens)
        return row | (_rejected(left, "") if left else _kept(text, wrong))
    if set(wrong) - set(MENDED):
        return row | _rejected(wrong, "")  # no repair makes it longer, or unsaid
    for attempt in range(2):
        prompt = prompts.REPAIR.format(text=draft.text)
        if left:
            prompt += prompts.REPAIR_RETRY.format(why=_why(left))
        answer = yield ChatRequest(
            prompt, max_tokens=spec.max_new_tokens * (1 + spec.continuations), seed=seed + attempt, to="repair"
        )
        if answer.error:
            return row | {"problems": wrong, "error": f"repair: {answer.error}"}
        text = " ".join(answer.text.split())
        left = repair_problems(text, draft.text, spec.min_tokens, answer.finish)
        if answer.finish == "content_filter" and "refusal" not in left:
            left.insert(0, "refusal")
        if not left:
            return row | _kept(text, wrong)
    return row | _rejected(left, "repaired twice: ")


def _kept(text: str, mended: list[str]) -> Row:
    return {"text": text, "tokens": length(text), "problems": mended}


def _rejected(codes: list[str], how: str) -> Row:
    return {"problems": codes, "error": f"rejected: {how}{', '.join(codes)}"}


def _why(codes: list[str]) -> str:
    from vlmflow.curation.long_text import CODES

    return "; ".join(CODES[code] for code in codes)


def _summary(sealed: Manifest, scratch: Any) -> dict[str, Any]:
    rounds: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    words = kept = 0
    for part in sealed.layer(LAYER).parts:
        for row in read_part(part, scratch).values():
            rounds[str(row["rounds"] or 0)] += 1
            if row["error"] is None:
                kept, words = kept + 1, words + row["tokens"]
                codes.update(row["problems"])
    return {
        "described": kept,
        "mean_tokens": round(words / kept, 1) if kept else None,
        "rounds": dict(sorted(rounds.items())),
        "mended": dict(sorted(codes.items())),
    }
