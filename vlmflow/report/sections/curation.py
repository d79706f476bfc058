"""One line a curation step: what it read, how many samples failed and why, what it says in sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from vlmflow.dataset.layer import failures
from vlmflow.report.html import Safe, absent, code, el, join, table, tag
from vlmflow.report.numbers import count, short
from vlmflow.report.page import CURATED, Page

_WHAT = {
    "ocr": "text found in the image",
    "synthetic": "caption written by model P",
    "fused": "alt text and caption as one sentence",
    "described": "long descriptions",
    "docqa": "questions and answers about pages",
    "phash": "what near copies are told by",
    "clean": "checks of pictures and texts",
    "judge": "checks by a text model",
    "contamination": "what stands in a benchmark",
    "ppl": "perplexity of the fused caption under model P",
    "dedup": "copies of other samples",
    "keep": "the lowest perplexities of what is left stay",
}


def _figures(summary: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Numbers and words of a summary, those of one level below with the name of their group; long groups are left out."""
    for key, value in summary.items():
        if isinstance(value, int | float | str):
            yield f"{prefix}{key} {short(value)}"
        elif isinstance(value, dict) and not prefix and len(value) <= 8:
            yield from _figures(value, f"{key} of ")


def section(page: Page) -> Safe:
    manifest = page.curated
    if manifest is None or not any(name in manifest.layers for name in CURATED):
        return absent("No curation step has run.")
    rows = []
    for name in _WHAT:
        layer = manifest.layers.get(name)
        if layer is None and name not in CURATED:  # a step that the recipe leaves out
            continue
        if layer is None:
            rows.append([name, _WHAT[name], tag("not run"), "", "", "", ""])
            continue
        failed = sum(part.failed for part in layer.parts)
        errors = Counter(reason for _, reason in failures(manifest, name, page.ctx.scratch))
        why = "; ".join(f"{n} × {reason}" for reason, n in errors.most_common(3))
        figures = ", ".join(_figures(layer.summary))
        engine = layer.params.get("engine")
        what = join([_WHAT[name], " ", tag(f"engine: {engine}") if engine else ""])
        rows.append(
            [name, what, count(sum(part.rows for part in layer.parts)), count(failed), why, figures, code(layer.digest)]
        )
    head = ["layer", "what it holds", "rows", "failed", "commonest reasons", "summary", "digest"]
    return join([
        el("p", f"Dataset {manifest.name}: each step adds a layer beside the shards; images are never written again.", cls="lead"),
        table(head, rows, numeric=(2, 3)),
    ])  # fmt: skip
