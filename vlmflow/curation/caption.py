"""Synthetic captions: a VLM's brief description of every picture, as layer `synthetic`.

CapFusion needs a well-formed sentence for each image besides the alt text (points.md 4.1). The VLM is a checkpoint of
this pipeline or any OpenAI-compatible endpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any

from vlmflow.curation import openai_client
from vlmflow.curation.checks import is_refusal
from vlmflow.curation.inputs import check_own_failures, picture_windows, pictures, scorer
from vlmflow.dataset.layer import add_layer, read_part
from vlmflow.errors import DataError, RecipeError
from vlmflow.models import store

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.models.store import ModelRef
    from vlmflow.step import Context

LAYER = "synthetic"
VERSION = 2  # 2: pictures upright and on white, as in training
SCHEMA = {"text": "str", "finish": "str", "prompt_tokens": "int", "completion_tokens": "int"}


def run(ctx: Context, manifest: Manifest, model: ModelRef | None = None) -> Manifest:
    """Add layer `synthetic`: text, finish (stop, length, ...), tokens used (endpoints only).

    `model` is needed by engine "model"; its files, the prompt and the length limit decide the layer's path.

    Raises:
        RecipeError: engine "model" without a model, or an endpoint variable that is not set.
        ServiceError: the endpoint does not work.
        StepFailed: more samples failed than `curation.caption.failure_limit`.
    """
    spec = ctx.recipe.curation.caption
    params: dict[str, Any] = {"engine": spec.engine, "prompt": spec.prompt, "max_new_tokens": spec.max_new_tokens}
    if spec.engine == "model":
        model = scorer(ctx, model)
        if model is None:
            raise RecipeError(
                "curation.caption.engine is 'model' but the step got no model; pass one or use engine openai"
            )
        params |= {"weights": model.weights_sha256, "model": store.behaviour_digest(model.files)}
        vlm = Lazy(ctx, model)

        def compute(reader: ShardReader, _: Any) -> Iterator[dict[str, Any]]:
            return _by_model(reader, vlm, spec)
    else:
        params |= {"model": spec.model_name, "seed": ctx.recipe.seed}
        endpoint = openai_client.Endpoint(
            spec.endpoint_env, spec.key_env, str(spec.model_name), concurrency=spec.concurrency, seed=ctx.recipe.seed,
            passing_limit=spec.failure_limit,
        )  # fmt: skip

        def compute(reader: ShardReader, _: Any) -> Iterator[dict[str, Any]]:
            return _by_endpoint(reader, endpoint, spec)

    def summary(sealed: Manifest) -> dict[str, Any]:
        reasons = check_own_failures(sealed, LAYER, spec.failure_limit, "curation.caption", ctx.scratch)
        finish: Counter[str] = Counter()
        tokens = Counter(prompt_tokens=0, completion_tokens=0)
        for part in sealed.layer(LAYER).parts:
            for row in read_part(part, ctx.scratch).values():
                finish[row["finish"] or "failed"] += 1
                tokens.update({name: row[name] or 0 for name in ("prompt_tokens", "completion_tokens")})
        return {"finish": dict(sorted(finish.items())), "failures": reasons, **dict(sorted(tokens.items()))}

    return add_layer(
        ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, compute=compute, failure_limit=1.0,
        summary=summary,
    )  # fmt: skip


class Lazy:
    """A model that is fetched and loaded when the first sample needs it: a finished step loads nothing."""

    def __init__(self, ctx: Context, model: ModelRef) -> None:
        self._ctx, self._model, self._lock = ctx, model, Lock()
        self._vlm: Any = None

    def __call__(self) -> Any:
        with self._lock:
            if self._vlm is None:
                from vlmflow.models import inference

                self._vlm = inference.load(store.fetch(self._model, self._ctx.scratch))
            return self._vlm


def _by_model(reader: ShardReader, vlm: Lazy, spec: Any) -> Iterator[dict[str, Any]]:
    for window in picture_windows(reader):
        requests, asked = [], []
        for sample in window:
            try:
                images = pictures(sample)
            except DataError as error:
                yield {"key": sample.key, "error": str(error)}
                continue
            requests.append({"images": images, "prompt": spec.prompt})
            asked.append(sample.key)
        if not asked:
            continue
        from vlmflow.models.inference import Request

        answers = vlm().generate([Request(**r) for r in requests], max_new_tokens=spec.max_new_tokens, batch=spec.batch)
        for key, answer in zip(asked, answers, strict=True):
            yield _row(key, answer.text, answer.finish)


def _by_endpoint(reader: ShardReader, endpoint: openai_client.Endpoint, spec: Any) -> Iterator[dict[str, Any]]:
    asked: list[str] = []
    failed: list[dict[str, Any]] = []

    def requests() -> Iterator[openai_client.ChatRequest]:
        for key in reader.keys():
            sample = reader.read(key)
            try:
                pictures(sample)  # a picture that we cannot read must not cost a request
            except DataError as error:
                failed.append({"key": key, "error": str(error)})
                continue
            asked.append(key)
            yield openai_client.ChatRequest(spec.prompt, sample.images, spec.max_new_tokens)

    answers = openai_client.complete(endpoint, requests())
    yield from failed
    for key, answer in zip(asked, answers, strict=True):
        tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        if answer.error:
            yield {"key": key, "error": answer.error}
        elif answer.finish == "content_filter" or is_refusal(answer.text):
            yield {"key": key, "finish": answer.finish, **tokens, "error": "the model refused to describe the image"}
        else:
            yield _row(key, answer.text, answer.finish) | tokens


def _row(key: str, text: str, finish: str) -> dict[str, Any]:
    text = " ".join(text.split())
    if not any(c.isalnum() for c in text):
        return {"key": key, "finish": finish, "error": "the model's description holds no word"}
    return {"key": key, "text": text, "finish": finish}
