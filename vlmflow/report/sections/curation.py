"""One line a curation step: what it read, how many samples failed and why, what it says in sum."""

from __future__ import annotations

from collections import Counter

from vlmflow.report.html import Safe, absent, code, el, join, table, tag
from vlmflow.report.numbers import count, short
from vlmflow.report.page import CURATED, Page

_WHAT = {
    "ocr": "text found in the image",
    "synthetic": "caption written by model P",
    "fused": "alt text and caption as one sentence",
    "ppl": "perplexity of the fused caption under model P",
    "keep": "the lowest perplexities stay",
}


def section(page: Page) -> Safe:
    manifest = page.curated
    if manifest is None or not any(name in manifest.layers for name in CURATED):
        return absent("No curation step has run.")
    rows = []
    for name in CURATED:
        layer = manifest.layers.get(name)
        if layer is None:
            rows.append([name, _WHAT[name], tag("not run"), "", "", "", ""])
            continue
        failed = sum(part.failed for part in layer.parts)
        errors = Counter(str(row.get(name, "error")) for row in page.rows if row.get(name, "error"))
        why = "; ".join(f"{n} × {reason}" for reason, n in errors.most_common(3))
        figures = ", ".join(
            f"{key} {short(value)}" for key, value in layer.summary.items() if isinstance(value, int | float | str)
        )
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
