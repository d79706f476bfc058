"""Why earlier steps drop a sample before anything is ranked: layers clean, judge, dedup and contamination, in this order.

Each reason is one sentence for people; the first that applies is the one that stands in layer `keep`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmflow.curation.columns import column, stacked

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.recipe.curation import CurationSpec


@dataclass(frozen=True)
class Drops:
    """Reasons, (n,) pyarrow strings, null where nothing speaks against a sample; how many each layer dropped first; the
    layers that were read."""

    reasons: Any
    counts: dict[str, int]
    layers: list[str]


def read(manifest: Manifest, curation: CurationSpec, scratch: Any) -> Drops:
    """What the steps that the recipe turns on say against each sample.

    Raises:
        DataError: a step is on, but its layer is not there.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    used = {
        "clean": curation.clean is not None,
        "judge": curation.judge is not None and curation.judge.drop,
        "dedup": curation.dedup is not None,
        "contamination": curation.contamination is not None and curation.contamination.drop,
    }
    layers, counts = [name for name, on in used.items() if on], {}
    reasons: Any = pa.nulls(manifest.samples, pa.string())
    for name in layers:
        columns, said = _LAYERS[name]
        found = said(*(column(values) for values in stacked(manifest, name, scratch, columns).columns))
        before = reasons.null_count
        reasons = pc.coalesce(reasons, found)
        counts[name] = before - reasons.null_count
    return Drops(reasons, counts, layers)


def _problems(name: str) -> Callable[[Any], Any]:
    def said(problems: Any) -> Any:
        import pyarrow.compute as pc

        text = pc.binary_join_element_wise(f"{name}: ", pc.binary_join(problems, "; "), "")
        return pc.if_else(pc.greater(pc.list_value_length(problems), 0), text, None)

    return said


def _repeats(of: Any, kind: Any, distance: Any) -> Any:
    import pyarrow.compute as pc

    of = pc.replace_substring_regex(of, r"^([^/]+)/(.+)$", r"\2 of dataset \1")
    return _joined("repeats ", of, " (", kind, ", ", _text(distance), " bits apart)")


def _stands(benchmark: Any, item: Any, how: Any) -> Any:
    return _joined("stands in benchmark ", benchmark, ", item ", item, " (", how, ")")


def _joined(*parts: Any) -> Any:
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(*parts, "")  # null where a part is


def _text(numbers: Any) -> Any:
    return numbers.cast("string")


_LAYERS: dict[str, tuple[list[str], Callable[..., Any]]] = {
    "clean": (["problems"], _problems("clean")),
    "judge": (["problems"], _problems("judge")),
    "dedup": (["of", "kind", "distance"], _repeats),
    "contamination": (["benchmark", "item", "how"], _stands),
}
