"""How much of each benchmark stands in what a model was trained on: the number behind the contamination gate.

Read from layer `contamination` of every dataset, as the curation measured it; a benchmark's item that several datasets
hold counts once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmflow.dataset.layer import read_columns

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.recipe import Recipe

LAYER, KEEP = "contamination", "keep"


def measured(recipe: Recipe, datasets: Mapping[str, Manifest], scratch: Any = None) -> dict[str, float]:
    """Benchmark -> share of its items found in training data; empty when a dataset was never compared, because a share of
    some of the data would look like one of all.

    Of a dataset of which every stage takes only kept samples, those count; of others all.
    """
    if not datasets or not all(LAYER in manifest.layers for manifest in datasets.values()):
        return {}
    items: dict[str, int] = {}
    met: set[str] = set()
    for name, manifest in datasets.items():
        for benchmark, count in manifest.layer(LAYER).summary["items"].items():
            items[benchmark] = max(items.get(benchmark, 0), int(count))
        met |= _met(manifest, KEEP in manifest.layers and _only_kept(recipe, name), scratch)
    found = Counter(name.split("/", 1)[0] for name in met)
    return {name: round(found[name] / count, 6) for name, count in sorted(items.items()) if count}


def _only_kept(recipe: Recipe, dataset: str) -> bool:
    uses = [use for _, _, use in recipe.uses() if use.dataset == dataset]
    return bool(uses) and all(use.keep for use in uses)


def _met(manifest: Manifest, only_kept: bool, scratch: Any) -> set[str]:
    """Names BENCHMARK/INDEX of the items that a dataset's samples meet."""
    met: set[str] = set()
    for number, part in enumerate(manifest.layer(LAYER).parts):
        found = read_columns(part, scratch, ["found"])["found"]
        if only_kept:
            found = found.filter(read_columns(manifest.layer(KEEP).parts[number], scratch, [KEEP])[KEEP])
        met.update(name for names in found.to_pylist() for name in names or ())
    return met
