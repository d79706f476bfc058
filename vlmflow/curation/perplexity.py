"""Perplexity of each caption given its image, under a VLM, as layer `ppl`.

POINTS ranks its pre-training set by it (points.md 5, eq. 3): PPL = exp(nll / tokens). Counted are the caption's tokens
and the closing end token; instruction and image tokens are context. Log-softmax in fp32 (it does not underflow where
softmax does, spec data-eval-soup.md 5.3). Values are rounded to DIGITS significant digits, far coarser than what the
packing of a batch changes, so that the layer does not depend on what a sample was packed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmflow.curation.caption import Lazy
from vlmflow.curation.inputs import check_own_failures, pictures, prepared_windows, scorer, text_of
from vlmflow.curation.prompts import scoring_prompt
from vlmflow.dataset.layer import add_layer, read_part
from vlmflow.errors import DataError
from vlmflow.models import store

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.sample import Sample
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.models.store import ModelRef
    from vlmflow.step import Context

LAYER = "ppl"
VERSION = 3  # 3: six digits, bits that do not depend on the packing; 2: pictures upright and on white, as in training
SCHEMA = {"ppl": "float", "nll": "float", "tokens": "int"}
DIGITS = 6  # significant digits kept of nll (nats, summed) and ppl
Row = dict[str, Any]


def run(ctx: Context, manifest: Manifest, model: ModelRef) -> Manifest:
    """Add layer `ppl`: ppl, nll (nats, summed over the counted tokens), tokens (counted).

    Raises:
        DataError: the layer whose text is scored is missing.
        StepFailed: of the samples that have a text, more than `curation.perplexity.failure_limit` could not be scored.
    """
    spec = ctx.recipe.curation.perplexity
    prompt = scoring_prompt(spec.text, spec.prompt)
    model = scorer(ctx, model)
    params = {
        "text": spec.text, "prompt": prompt, "weights": model.weights_sha256,
        "model": store.behaviour_digest(model.files), "digits": DIGITS,
    }  # fmt: skip
    vlm = Lazy(ctx, model)

    def compute(reader: ShardReader, upstream: dict[str, dict[str, Row]]) -> Iterator[Row]:
        def ready(sample: Sample) -> _Ready:
            text, missing = text_of(spec.text, sample.key, sample.meta, upstream)
            if missing:
                return _Ready(sample.key, error=missing)
            try:
                images = pictures(sample)
            except DataError as error:
                return _Ready(sample.key, error=str(error))
            return _prepared(vlm(), sample.key, images, prompt, text)

        for window in prepared_windows(reader, ready):
            yield from _rows(vlm, window, spec.batch_tokens)

    def summary(sealed: Manifest) -> dict[str, Any]:
        reasons = check_own_failures(sealed, LAYER, spec.failure_limit, "curation.perplexity", ctx.scratch)
        return {"failures": reasons, **_summary(sealed, ctx.scratch)}

    return add_layer(
        ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, compute=compute,
        reads=() if spec.text == "alt" else (spec.text,), failure_limit=1.0, summary=summary,
    )  # fmt: skip


@dataclass(frozen=True)
class _Ready:
    """A sample as the model takes it, or the reason why it does not."""

    key: str
    item: Any = None
    error: str | None = None

    @property
    def nbytes(self) -> int:
        return int(getattr(self.item, "nbytes", 0))


def _prepared(model: Any, key: str, images: list[Any], prompt: str, text: str) -> _Ready:
    from vlmflow.models.inference import ScoreRequest

    try:
        return _Ready(key, model.prepare(ScoreRequest(images, prompt, text), key))
    except DataError as error:
        reason = str(error).removeprefix(f"sample '{key}': ")  # equal reasons are counted together
        return _Ready(key, error=f"the model cannot take the text: {reason}")


def _rows(vlm: Callable[[], Any], window: list[_Ready], batch_tokens: int) -> Iterator[Row]:
    scored = [ready for ready in window if ready.error is None]
    yield from ({"key": ready.key, "error": ready.error} for ready in window if ready.error is not None)
    scores = vlm().score([ready.item for ready in scored], batch_tokens=batch_tokens) if scored else []
    for ready, score in zip(scored, scores, strict=True):
        yield {"key": ready.key, "error": score.error} if score.error else row(ready.key, score.nll, score.tokens)


def row(key: str, nll: float, tokens: int) -> Row:
    """One row from the summed negative log-likelihood (nats) over `tokens` counted tokens."""
    if tokens < 1:
        return {"key": key, "error": "the text has no token under this model's tokenizer"}
    mean = nll / tokens
    if not math.isfinite(mean) or mean > 700:  # exp(709) overflows
        return {"key": key, "tokens": tokens, "error": "the model gives the text no probability (nll is not finite)"}
    return {"key": key, "ppl": significant(math.exp(mean)), "nll": significant(nll), "tokens": tokens}


def significant(value: float, digits: int = DIGITS) -> float:
    """`value` rounded to so many significant digits."""
    return float(f"{value:.{digits - 1}e}")


def _summary(sealed: Manifest, scratch: Any) -> dict[str, Any]:
    nll, tokens, scored, lowest, highest = 0.0, 0, 0, math.inf, 0.0
    for part in sealed.layer(LAYER).parts:
        for r in read_part(part, scratch).values():
            if r["error"] is None:
                nll, tokens, scored = nll + r["nll"], tokens + r["tokens"], scored + 1
                lowest, highest = min(lowest, r["ppl"]), max(highest, r["ppl"])
    found: dict[str, Any] = {"scored": scored, "tokens": tokens}
    if scored:
        found |= {"lowest": lowest, "highest": highest, "corpus_ppl": significant(math.exp(nll / tokens))}
    return found
