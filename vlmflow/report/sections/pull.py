"""Rows, samples and broken links of every dataset, by reason."""

from __future__ import annotations

from vlmflow.dataset.manifest import Manifest
from vlmflow.report import charts
from vlmflow.report.html import Safe, absent, el, join, note, table
from vlmflow.report.numbers import count, percent, size
from vlmflow.report.page import Page


def section(page: Page) -> Safe:
    if not page.inputs.datasets:
        return absent("No dataset was pulled.")
    rows = []
    reasons: list[tuple[str, Manifest, dict[str, int]]] = []
    for name, manifest in page.inputs.datasets.items():
        summary = next((entry.summary for entry in manifest.lineage if entry.step == "pull"), {})
        total, failed = summary.get("rows"), summary.get("failed")
        rows.append(
            [name, ", ".join(manifest.sources), count(total) if total is not None else "", count(manifest.samples),
             f"{count(failed)} ({percent(failed / total)})" if failed is not None and total else "",
             len(manifest.shards), size(sum(shard.bytes for shard in manifest.shards))]
        )  # fmt: skip
        if summary.get("failed_by_reason"):
            reasons.append((name, manifest, summary["failed_by_reason"]))
    head = ["dataset", "sources", "rows", "samples", "failed rows", "shards", "bytes"]
    parts = [table(head, rows, numeric=(2, 3, 4, 5, 6))]
    for name, manifest, by_reason in reasons:
        items = sorted(by_reason.items(), key=lambda item: (-item[1], item[0]))
        parts.append(el("h3", f"Why rows of {name} failed"))
        parts.append(charts.bars([(reason.replace("_", " "), n, "bad") for reason, n in items]))
        sources = {ref.source for ref in manifest.shards}
        parts.append(
            note(
                f"Each failed row is kept beside its shard with its URL and reason (sources: {', '.join(sorted(sources))})."
            )
        )
    if not reasons:
        parts.append(note("No failures by reason are recorded in the datasets' lineage."))
    return join(parts)
