"""Gates: what a model must show before anybody may promote it.

Each gate is a pure function of scores, lineage and hashes, so the training pipeline, the promoter and a reader of the
audit log come to the same verdict. A gate that lacks the numbers it needs fails and says which ones. Results become
tags `gate.NAME = pass|fail` of the candidate (platform.md 4.5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmflow import storage
from vlmflow.errors import StorageError
from vlmflow.registry.rows import ScoreRow

if TYPE_CHECKING:
    from vlmflow.models.store import ModelRef
    from vlmflow.recipe.results import GatesSpec

BLOCK = 8 * 2**20


@dataclass(frozen=True)
class GateResult:
    """Verdict of one gate; `detail` holds both numbers, the one found and the one asked for."""

    name: str
    passed: bool
    detail: str

    @property
    def tag(self) -> tuple[str, str]:
        """Tag of the model version: `gate.NAME`, `pass` or `fail`."""
        return f"gate.{self.name}", "pass" if self.passed else "fail"


def of_row(rows: Iterable[ScoreRow], row: str) -> dict[str, ScoreRow]:
    """The scores of one row of the table (a model), by benchmark."""
    return {score.benchmark: score for score in rows if score.row == row}


def absolute_floor(rows: Iterable[ScoreRow], final: str, floors: Mapping[str, float]) -> GateResult:
    """Every named benchmark reaches its floor (a share, 0 to 1)."""
    found = of_row(rows, final)
    parts, passed = [], True
    for benchmark, floor in sorted(floors.items()):
        score = found.get(benchmark)
        parts.append(f"{benchmark} {score.score:.3f} of {floor:.3f}" if score else f"{benchmark} not measured")
        passed = passed and score is not None and score.score >= floor
    return GateResult("absolute_floor", passed, "; ".join(parts) or "no floors asked for")


def times_chance(rows: Iterable[ScoreRow], final: str, factors: Mapping[str, float]) -> GateResult:
    """Every named benchmark reaches its multiple of chance and is above zero."""
    found = of_row(rows, final)
    parts, passed = [], True
    for benchmark, factor in sorted(factors.items()):
        score = found.get(benchmark)
        parts.append(
            f"{benchmark} {score.score:.3f} of {factor:g} x {score.chance:.3f}"
            if score
            else f"{benchmark} not measured"
        )
        passed = passed and score is not None and score.score > 0 and score.score >= factor * score.chance
    return GateResult("times_chance", passed, "; ".join(parts) or "no multiples asked for")


def better_than_untrained(rows: Iterable[ScoreRow], final: str, untrained: str) -> GateResult:
    """Every benchmark's score is above the untrained model's on the same questions; without scores nothing passes."""
    rows = list(rows)
    before, parts, passed = of_row(rows, untrained), [], True
    for name, score in sorted(of_row(rows, final).items()):
        start = before.get(name)
        parts.append(
            f"{name} {score.score:.3f} vs {start.score:.3f}" if start else f"{name} not measured for '{untrained}'"
        )
        passed = passed and start is not None and score.score > start.score
    return GateResult("better_than_untrained", passed and bool(parts), "; ".join(parts) or "nothing measured")


def lineage_complete(model: ModelRef, known_data: Iterable[str], recipe_digest: str) -> GateResult:
    """The model names its parents and ancestor, a recipe, and only data whose manifests are recorded with it."""
    known = set(known_data)
    missing = []
    if not model.lineage.step:
        missing.append("the step that made it")
    if not model.lineage.parents:
        missing.append("parents")
    if not model.lineage.ancestor:
        missing.append("ancestor")
    if not known:
        missing.append("datasets")
    if not recipe_digest:
        missing.append("recipe digest")
    missing += [
        f"manifest {digest[:12]} (trained on, not recorded)" for digest in model.lineage.data if digest not in known
    ]
    return GateResult("lineage_complete", not missing, "missing: " + ", ".join(missing) if missing else "complete")


def weights_unchanged(model: ModelRef) -> GateResult:
    """Every stored file still has the hash that was recorded when the model was published."""
    wrong = []
    for file in model.files:
        uri = storage.join(model.uri, file.path)
        try:
            found = _sha256(uri, file.bytes)
        except StorageError as error:
            wrong.append(f"{file.path}: {error}")
            continue
        if found != file.sha256:
            wrong.append(f"{file.path} is {found[:24]}, recorded {file.sha256[:24]}")
    return GateResult("weights_unchanged", not wrong, "; ".join(wrong) or f"{len(model.files)} files verified")


def evaluate(
    rows: Iterable[ScoreRow],
    final: str,
    untrained: str,
    spec: GatesSpec,
    model: ModelRef,
    known_data: Iterable[str],
    recipe_digest: str,
) -> list[GateResult]:
    """All gates that a recipe asks for, in a fixed order; lineage and hashes are always asked for."""
    rows = list(rows)
    results = [absolute_floor(rows, final, spec.floors), times_chance(rows, final, spec.times_chance)]
    if spec.beats_untrained:
        results.append(better_than_untrained(rows, final, untrained))
    return [*results, lineage_complete(model, known_data, recipe_digest), weights_unchanged(model)]


def _sha256(uri: str, size: int) -> str:
    """Hash of a stored object read in blocks, so that a large weight file never fills the memory."""
    if (found := storage.size(uri)) != size:
        return f"{found} bytes long, not {size}"
    seen = hashlib.sha256()
    for offset in range(0, size, BLOCK):
        seen.update(storage.read_bytes(uri, offset, min(BLOCK, size - offset)))
    return seen.hexdigest()
