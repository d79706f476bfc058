"""What was made from what: manifests, weights, parents, and the recipe in full."""

from __future__ import annotations

import json
from typing import Any

from vlmflow.digest import digest
from vlmflow.registry.rows import soup_row
from vlmflow.report.html import Safe, absent, code, el, join, table
from vlmflow.report.numbers import short, size
from vlmflow.report.page import Page


def section(page: Page) -> Safe:
    return join([el("h3", "Datasets"), _datasets(page), el("h3", "Models"), _models(page), _recipe(page)])


def _datasets(page: Page) -> Safe:
    if not page.inputs.datasets:
        return absent("No dataset was handed in.")
    rows = []
    for name, manifest in page.inputs.datasets.items():
        steps = " → ".join(entry.step for entry in manifest.lineage)
        rows.append(
            [name, code(manifest.digest, 16), short(manifest.samples), ", ".join(manifest.layers) or "none", steps]
        )
    return table(["dataset", "manifest digest", "samples", "layers", "steps"], rows, numeric=(2,))


def _models(page: Page) -> Safe:
    refs: dict[str, Any] = {name: ref.model_dump(mode="json") for name, ref in page.inputs.models.items()}
    for name, entry in ((page.inputs.soup or {}).get("soups") or {}).items():
        ref = entry.get("ref", entry) if isinstance(entry, dict) else None
        if isinstance(ref, dict) and "weights_sha256" in ref:
            refs.setdefault(soup_row(name), ref)
    if not refs:
        return absent("No model was handed in.")
    names = {ref["weights_sha256"]: page.name(name) for name, ref in reversed(refs.items())}
    data = {manifest.digest: name for name, manifest in page.inputs.datasets.items()}
    rows = []
    for name, ref in refs.items():
        made = ref.get("lineage") or {}
        parents = [join([names[p], " ", code(p, 8)]) if p in names else code(p, 8) for p in made.get("parents") or []]
        seen = [join([data[d], " ", code(d, 8)]) if d in data else code(d, 8) for d in made.get("data") or []]
        rows.append([page.name(name), code(ref["weights_sha256"]), made.get("stage") or made.get("step") or "", _lines(parents),
                     _lines(seen), code(made.get("ancestor"), 8), size(sum(f["bytes"] for f in ref.get("files") or []))])  # fmt: skip
    return table(["model", "weights sha256", "made by", "parents", "data", "ancestor", "size"], rows, numeric=(6,))


def _lines(items: list[Safe]) -> Safe:
    return join(part for i, item in enumerate(items) for part in ([el("br")] if i else []) + [item])


def _recipe(page: Page) -> Safe:
    recipe = page.ctx.recipe
    text = json.dumps(recipe.model_dump(mode="json"), indent=1, ensure_ascii=False)
    summary = el("summary", "Recipe as resolved, digest ", code(digest(recipe)))
    return el("details", summary, el("pre", text))
