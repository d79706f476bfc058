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

from vlmflow.curation import openai_client, prompts
from vlmflow.curation.alt_text import clean_alt
from vlmflow.curation.checks import Limits, duplicates, problems
from vlmflow.curation.fusion_rules import CONNECTORS, fuse
from vlmflow.curation.inputs import check_own_failures, text_of, windows
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
    "prompt_tokens": "int",
    "completion_tokens": "int",
}
MAX_WORDS = 60  # of a sentence made by rules
Row = dict[str, Any]


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
    if spec.engine == "openai":
        params |= {
            "model": spec.model_name, "seed": ctx.recipe.seed, "max_new_tokens": spec.max_new_tokens,
            "prompt": prompts.MERGE, "retry": prompts.RETRY,
        }  # fmt: skip
        endpoint = openai_client.Endpoint(
            spec.endpoint_env, spec.key_env, str(spec.model_name), concurrency=spec.concurrency, seed=ctx.recipe.seed,
            passing_limit=spec.failure_limit,
        )  # fmt: skip
    else:
        params |= {"max_words": MAX_WORDS}

    def compute(reader: ShardReader, upstream: dict[str, dict[str, Row]]) -> Iterator[Row]:
        ready: list[tuple[str, str, str]] = []
        for key in reader.keys():
            alt, _ = text_of("alt", key, reader.meta(key), upstream)
            synthetic, missing = text_of("synthetic", key, {}, upstream)
            if missing:
                yield _fallback(key, alt, spec.fallback, ["no_synthetic"], missing)
            elif not clean_alt(alt) and spec.engine == "openai":
                yield {"key": key, "text": synthetic, "engine": "none", "problems": ["alt_empty"]}
            else:
                ready.append((key, alt, synthetic))
        if spec.engine == "rules":
            yield from (_by_rules(*sample, spec.fallback) for sample in ready)
        else:
            for window in windows(ready, 4096):
                yield from _by_endpoint(window, endpoint, spec)

    def summary(sealed: Manifest) -> dict[str, Any]:
        reasons = check_own_failures(sealed, LAYER, spec.failure_limit, "curation.fuse", ctx.scratch)
        return {"failures": reasons, **_summary(sealed, ctx.scratch)}

    return add_layer(
        ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, compute=compute, reads=("synthetic",),
        failure_limit=1.0, summary=summary,
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


def _by_endpoint(window: list[tuple[str, str, str]], endpoint: openai_client.Endpoint, spec: Any) -> Iterator[Row]:
    """Ask for every sample of the window, then once more for those whose answer fails a check."""
    rows: dict[str, Row] = {}
    pending: list[tuple[str, str, str, list[str]]] = [(*sample, []) for sample in window]
    for round_number in range(2):
        requests = [
            openai_client.ChatRequest(
                prompts.merge_prompt(alt, synthetic, why),
                max_tokens=spec.max_new_tokens,
                seed=endpoint.seed + round_number,
            )
            for _, alt, synthetic, why in pending
        ]
        again: list[tuple[str, str, str, list[str]]] = []
        answers = openai_client.complete(endpoint, requests) if requests else []
        for (key, alt, synthetic, _), answer in zip(pending, answers, strict=True):
            row = rows.setdefault(key, {"key": key, "prompt_tokens": 0, "completion_tokens": 0})
            row["prompt_tokens"] += answer.prompt_tokens
            row["completion_tokens"] += answer.completion_tokens
            if answer.error:
                row |= {"engine": "openai", "problems": [], "error": answer.error}
                continue
            wrong = problems(answer.text, alt, synthetic, answer.finish)
            if answer.finish == "content_filter" and "refusal" not in wrong:
                wrong.insert(0, "refusal")
            if not wrong:
                notes = ["retried"] if round_number else []
                row |= {"text": " ".join(answer.text.split()), "engine": "openai", "problems": notes}
            elif round_number:
                row |= _fallback(key, alt, spec.fallback, wrong, "checks failed twice: " + ", ".join(wrong))
            else:
                again.append((key, alt, synthetic, wrong))
        pending = again
    yield from rows.values()


def _fallback(key: str, alt: str, policy: str, codes: list[str], reason: str) -> Row:
    if policy == "alt" and alt:
        return {"key": key, "text": alt, "engine": "alt", "problems": codes}
    return {"key": key, "engine": "none", "problems": codes, "error": reason}


def _summary(sealed: Manifest, scratch: Any) -> dict[str, Any]:
    """Counts over the whole layer: engines, problem codes, tokens, duplicate outputs."""
    engines: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    tokens: Counter[str] = Counter(prompt_tokens=0, completion_tokens=0)
    texts: list[str | None] = []
    for part in sealed.layer(LAYER).parts:
        for row in read_part(part, scratch).values():
            engines["failed" if row["error"] else row["engine"]] += 1
            codes.update(row["problems"] or [])
            tokens.update({name: row[name] or 0 for name in ("prompt_tokens", "completion_tokens")})
            texts.append(row["text"])
    return {
        "engines": dict(sorted(engines.items())),
        "problems": dict(sorted(codes.items())),
        "duplicates": duplicates(texts),
        **dict(sorted(tokens.items())),
    }
