"""Questions and answers about pages by Docmatix' builder (spec/systems.md A.1), as layer `docqa`.

A text model reads the page's OCR text and writes questions with answers, under one of several prompts drawn by the
sample's key; code, unanswerable, overlong, hallucinated and repeated pairs are dropped, each counted under its reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vlmflow.curation import prompts
from vlmflow.curation.ask import Row, Script, answered
from vlmflow.curation.asked_layer import add_asked_layer, endpoint
from vlmflow.curation.chat_format import ChatRequest
from vlmflow.curation.docqa_text import read, sift
from vlmflow.curation.inputs import UPSTREAM
from vlmflow.dataset.layer import read_part

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.recipe.curation import DocqaSpec
    from vlmflow.step import Context

LAYER = "docqa"
VERSION = 1
SCHEMA = {
    "pairs": "json",  # [{"question", "answer"}]
    "dropped": "json",  # docqa_text.REASONS -> pairs
    "style": "str",  # of prompts.DOCQA_STYLES; null when nothing was asked
    "note": "str",  # why nothing was asked
}


def run(ctx: Context, manifest: Manifest) -> Manifest:
    """Add layer `docqa`, or nothing when the recipe has no `curation.docqa`. Needs layer `ocr`.

    Raises:
        RecipeError, ServiceError: the endpoint is not configured or does not work.
        StepFailed: for more than `curation.docqa.failure_limit` of the samples no pair is left.
    """
    spec = ctx.recipe.curation.docqa
    if spec is None:
        return manifest
    seed = ctx.recipe.seed
    params: dict[str, Any] = spec.model_dump(
        include={"min_chars", "max_chars", "pairs", "max_turn_chars", "max_new_tokens"}
    )
    params |= {"model": spec.model_name, "seed": seed, "prompt": prompts.DOCQA, "styles": prompts.DOCQA_STYLES}

    def scripts(reader: ShardReader, upstream: dict[str, dict[str, Row]]) -> Iterator[Script]:
        for key in reader.keys():
            page = upstream["ocr"][key]
            text = cut(page["text"] or "", spec.max_chars)
            if page["error"]:
                yield answered({"key": key, "error": f"{UPSTREAM}ocr: {page['error'].removeprefix(UPSTREAM)}"})
            elif (n := sum(not c.isspace() for c in text)) < spec.min_chars:
                note = f"{n} characters < {spec.min_chars}"
                yield answered({"key": key, "pairs": [], "dropped": {}, "note": note})
            else:
                yield _asked(key, text, spec, seed)

    return add_asked_layer(
        ctx, manifest, LAYER, params=params, version=VERSION, schema=SCHEMA, reads=("ocr",), scripts=scripts,
        endpoints={"": endpoint(spec, seed)}, section="curation.docqa", failure_limit=spec.failure_limit,
        prices={"": (spec.price_in, spec.price_out)}, summary=lambda sealed: _summary(sealed, ctx.scratch),
    )  # fmt: skip


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, whole lines if there is one."""
    if len(text) <= limit:
        return text
    return text[: text.rfind("\n", 1, limit + 1)] if "\n" in text[1 : limit + 1] else text[:limit]


def style_of(key: str, seed: int) -> str:
    """The prompt style of a sample: a draw by its key, the same in any sharding."""
    drawn = hashlib.sha256(f"docqa:{seed}:{key}".encode()).digest()[:8]
    return sorted(prompts.DOCQA_STYLES)[int.from_bytes(drawn, "big") % len(prompts.DOCQA_STYLES)]


def _asked(key: str, text: str, spec: DocqaSpec, seed: int) -> Script:
    """Ask for the pairs of one page, and once more when none is left."""
    style, dropped = style_of(key, seed), Counter[str]()
    prompt = prompts.DOCQA.format(n=spec.pairs, style=prompts.DOCQA_STYLES[style], text=text)
    row: Row = {"key": key, "pairs": [], "style": style}
    for attempt in range(2):
        answer = yield ChatRequest(prompt, max_tokens=spec.max_new_tokens, seed=seed + attempt)
        if answer.error:
            return row | {"dropped": dict(dropped), "error": answer.error}
        pairs, malformed = read(answer.text)
        pairs, found = sift(pairs, text, spec.max_turn_chars)
        dropped += found + Counter(malformed=malformed)
        if pairs:
            return row | {"pairs": pairs, "dropped": dict(dropped)}
    why = ", ".join(reason for reason, _ in sorted(dropped.items(), key=lambda item: (-item[1], item[0])))
    return row | {"dropped": dict(dropped), "error": f"no pair left: {why or 'the reply holds none'}"}


def _summary(sealed: Manifest, scratch: Any) -> dict[str, Any]:
    """Pages asked and pairs kept by style, pairs dropped by reason and their share, pages without enough text."""
    styles: dict[str, list[int]] = {}
    dropped: Counter[str] = Counter()
    kept = blank = 0
    for part in sealed.layer(LAYER).parts:
        for row in read_part(part, scratch).values():
            dropped.update(row["dropped"] or {})
            blank += row["note"] is not None
            n = len(row["pairs"] or [])
            kept += n
            if row["style"]:
                pages = styles.setdefault(row["style"], [0, 0])
                pages[0], pages[1] = pages[0] + 1, pages[1] + n
    written = kept + dropped.total()
    return {
        "pairs": kept,
        "dropped": dict(sorted(dropped.items())),
        "dropped_share": round(dropped.total() / written, 4) if written else None,
        "pages_without_text": blank,
        "styles": {name: {"pages": pages, "pairs": n} for name, (pages, n) in sorted(styles.items())},
    }
