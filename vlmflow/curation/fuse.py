"""CapFusion: alt text and synthetic caption become one sentence, as layer `fused`.

Rules of POINTS (points.md 4.1): blend rather than join, add nothing that is in neither, give the sentence only. Engine
"openai" asks a text model and checks every answer, asking once more when a check fails; engine "rules" is the embedded
rule-based fuser (fusion_rules), not a language model, under the same checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vlmflow.curation import prompts
from vlmflow.curation.alt_text import clean_alt
from vlmflow.curation.ask import Row, Script, answered, finished
from vlmflow.curation.asked_layer import add_asked_layer, endpoint
from vlmflow.curation.chat_format import ChatRequest
from vlmflow.curation.checks import Limits, duplicates, problems
from vlmflow.curation.fusion_rules import CONNECTORS, fuse
from vlmflow.curation.inputs import check_own_failures, text_of
from vlmflow.dataset.layer import add_layer, read_part

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.step import Context

LAYER = "fused"
VERSION = 1
SCHEMA = {
    "text": "str",
    "engine": "str",  # rules | openai | none (only one source says anything) | alt (fallback)
    "problems": "list<str>",  # codes of checks.CODES that failed, or notes: alt_empty, trimmed, retried
}
MAX_WORDS = 60  # of a sentence made by rules


def run(ctx: Context, manifest: Manifest) -> Manifest:
    """Add layer `fused`: text, engine, problems. Needs layer `synthetic`.

    A caption that fails its checks (twice with engine openai) is dropped with its reason codes, or replaced by the raw
    alt text, as `curation.fuse.fallback` says; both are counted in the layer's summary.

    Raises:
        ServiceError, RecipeError: the endpoint does not work or is not configured.
        StepFailed: more samples failed than `curation.fuse.failure_limit`.
    """
    spec = ctx.recipe.curation.fuse
    params: dict[str, Any] = {"engine": spec.engine, "fallback": spec.fallback, "limits": asdict(Limits())}

    def scripts(reader: ShardReader, upstream: dict[str, dict[str, Row]]) -> Iterator[Script]:
        for key in reader.keys():
            alt, _ = text_of("alt", key, reader.meta(key), upstream)
            synthetic, missing = text_of("synthetic", key, {}, upstream)
            if missing:
                yield answered(_fallback(key, alt, spec.fallback, ["no_synthetic"], missing))
            elif spec.engine == "rules":
                yield answered(_by_rules(key, alt, synthetic, spec.fallback))
            elif not clean_alt(alt):
                yield answered({"key": key, "text": synthetic, "engine": "none", "problems": ["alt_empty"]})
            else:
                yield _by_endpoint(key, alt, synthetic, ctx.recipe.seed, spec)

    if spec.engine == "openai":
        params |= {
            "model": spec.model_name, "seed": ctx.recipe.seed, "max_new_tokens": spec.max_new_tokens,
            "prompt": prompts.MERGE, "retry": prompts.RETRY,
        }  # fmt: skip
        return add_asked_layer(
            ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, reads=("synthetic",), scripts=scripts,
            endpoints={"": endpoint(spec, ctx.recipe.seed)}, section="curation.fuse", failure_limit=spec.failure_limit,
            prices={"": (spec.price_in, spec.price_out)}, summary=lambda sealed: _summary(sealed, ctx.scratch),
        )  # fmt: skip

    def summary(sealed: Manifest) -> dict[str, Any]:
        reasons = check_own_failures(sealed, LAYER, spec.failure_limit, "curation.fuse", ctx.scratch)
        return {"failures": reasons, **_summary(sealed, ctx.scratch)}

    return add_layer(
        ctx, manifest, LAYER, params=params | {"max_words": MAX_WORDS}, version=VERSION, schema=SCHEMA,
        compute=lambda reader, upstream: map(finished, scripts(reader, upstream)), reads=("synthetic",), failure_limit=1.0,
        summary=summary,
    )  # fmt: skip


def _by_rules(key: str, alt: str, synthetic: str, fallback: str) -> Row:
    fused = fuse(alt, synthetic, MAX_WORDS)
    # The rules take the alt text's side in a conflict, so a result that holds one source only is a decision, not a lapse.
    found = problems(fused.text, alt, synthetic, strict=True, connectors=CONNECTORS)
    wrong = [code for code in found if code not in ("copy", "ignored")]
    if wrong:
        return _fallback(key, alt, fallback, wrong, "checks failed: " + ", ".join(wrong))
    engine = "none" if "alt_empty" in fused.notes else "rules"
    return {"key": key, "text": fused.text, "engine": engine, "problems": list(fused.notes)}


def _by_endpoint(key: str, alt: str, synthetic: str, seed: int, spec: Any) -> Script:
    """Ask for one fused caption, and once more when the answer fails a check."""
    wrong: list[str] = []
    for attempt in range(2):
        answer = yield ChatRequest(
            prompts.merge_prompt(alt, synthetic, wrong), max_tokens=spec.max_new_tokens, seed=seed + attempt
        )
        if answer.error:
            return {"key": key, "engine": "openai", "problems": [], "error": answer.error}
        wrong = problems(answer.text, alt, synthetic, answer.finish)
        if answer.finish == "content_filter" and "refusal" not in wrong:
            wrong.insert(0, "refusal")
        if not wrong:
            notes = ["retried"] if attempt else []
            return {"key": key, "text": " ".join(answer.text.split()), "engine": "openai", "problems": notes}
    return _fallback(key, alt, spec.fallback, wrong, "checks failed twice: " + ", ".join(wrong))


def _fallback(key: str, alt: str, policy: str, codes: list[str], reason: str) -> Row:
    if policy == "alt" and alt:
        return {"key": key, "text": alt, "engine": "alt", "problems": codes}
    return {"key": key, "engine": "none", "problems": codes, "error": reason}


def _summary(sealed: Manifest, scratch: Any) -> dict[str, Any]:
    """Counts over the whole layer: engines, problem codes, duplicate outputs."""
    engines: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    texts: list[str | None] = []
    for part in sealed.layer(LAYER).parts:
        for row in read_part(part, scratch).values():
            engines["failed" if row["error"] else row["engine"]] += 1
            codes.update(row["problems"] or [])
            texts.append(row["text"])
    return {
        "engines": dict(sorted(engines.items())),
        "problems": dict(sorted(codes.items())),
        "duplicates": duplicates(texts),
    }
