"""Synthetic captions: a VLM's brief description of every picture, as layer `synthetic`.

CapFusion needs a well-formed sentence for each image besides the alt text (points.md 4.1). The VLM is a checkpoint of
this pipeline or any OpenAI-compatible endpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any

from vlmflow.curation.ask import Script, answered
from vlmflow.curation.asked_layer import add_asked_layer, endpoint
from vlmflow.curation.chat_format import ChatRequest
from vlmflow.curation.checks import is_refusal
from vlmflow.curation.inputs import check_own_failures, check_pictures, picture_windows, pictures, scorer
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
SCHEMA = {"text": "str", "finish": "str"}


def run(ctx: Context, manifest: Manifest, model: ModelRef | None = None) -> Manifest:
    """Add layer `synthetic`: text, finish (stop, length, ...); from an endpoint also what each row cost (ask.COLUMNS).

    `model` is needed by engine "model"; its files, the prompt and the length limit decide the layer's path.

    Raises:
        RecipeError: engine "model" without a model, or an endpoint variable that is not set.
        ServiceError: the endpoint does not work.
        StepFailed: more samples failed than `curation.caption.failure_limit`.
    """
    spec = ctx.recipe.curation.caption
    params: dict[str, Any] = {"engine": spec.engine, "prompt": spec.prompt, "max_new_tokens": spec.max_new_tokens}

    def summary(sealed: Manifest) -> dict[str, Any]:
        finish: Counter[str] = Counter()
        for part in sealed.layer(LAYER).parts:
            finish.update(row["finish"] or "failed" for row in read_part(part, ctx.scratch).values())
        return {"finish": dict(sorted(finish.items()))}

    if spec.engine == "openai":
        return add_asked_layer(
            ctx, manifest, LAYER, params=params | {"model": spec.model_name, "seed": ctx.recipe.seed}, version=VERSION,
            schema=SCHEMA, endpoints={"": endpoint(spec, ctx.recipe.seed)}, pictures=True, section="curation.caption",
            scripts=lambda reader, _: (_script(reader, key, spec) for key in reader.keys()),
            failure_limit=spec.failure_limit, prices={"": (spec.price_in, spec.price_out)}, summary=summary,
        )  # fmt: skip

    model = scorer(ctx, model)
    if model is None:
        raise RecipeError("curation.caption.engine is 'model' but the step got no model; pass one or use engine openai")
    params |= {"weights": model.weights_sha256, "model": store.behaviour_digest(model.files)}
    vlm = Lazy(ctx, model)

    def whole_summary(sealed: Manifest) -> dict[str, Any]:
        reasons = check_own_failures(sealed, LAYER, spec.failure_limit, "curation.caption", ctx.scratch)
        return {**summary(sealed), "failures": reasons}

    return add_layer(
        ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, failure_limit=1.0, summary=whole_summary,
        compute=lambda reader, _: _by_model(reader, vlm, spec),
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


def _script(reader: ShardReader, key: str, spec: Any) -> Script:
    """Ask for one caption. The sample is read here, beside the asking, and dropped with the row."""
    sample = reader.read(key)
    try:
        check_pictures(sample)  # a picture that we cannot read must not cost a request
    except DataError as error:
        return answered({"key": key, "error": str(error)})

    def ask() -> Script:
        answer = yield ChatRequest(spec.prompt, sample.images, spec.max_new_tokens)
        if answer.error:
            return {"key": key, "error": answer.error}
        if answer.finish == "content_filter" or is_refusal(answer.text):
            return {"key": key, "finish": answer.finish, "error": "the model refused to describe the image"}
        return _row(key, answer.text, answer.finish)

    return ask()


def _row(key: str, text: str, finish: str) -> dict[str, Any]:
    text = " ".join(text.split())
    if not any(c.isalnum() for c in text):
        return {"key": key, "finish": finish, "error": "the model's description holds no word"}
    return {"key": key, "text": text, "finish": finish}
