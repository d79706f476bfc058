"""The verdict on a candidate: gates of its recipe, gates of the installation, and the model it would replace.

All pure: the promoter, `vlmflow promote --dry-run` and a reader of the audit log come to the same verdict from the same
documents. A gate that lacks a number it needs fails and says which (platform.md 4.5).
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from vlmflow.recipe.base import Name, Section, Share
from vlmflow.registry import gates
from vlmflow.registry.dossier import Dossier
from vlmflow.registry.gates import GateResult

APPROVAL = "approval"


class Policy(Section):
    """What an installation asks of a model's candidates, besides what their own recipe asks."""

    floors: dict[Name, Share] = Field(default_factory=dict, description="least accuracy by benchmark")
    times_chance: dict[Name, float] = Field(default_factory=dict, description="least multiple of chance by benchmark")
    regression: Share = Field(0.0, description="accuracy that a benchmark may lose against the champion")
    contamination: Share | None = Field(
        None, description="largest share of a benchmark found in training data; None = not asked"
    )
    approval_tag: str = Field("", description="tag that a person sets on the candidate; empty = none")


def judge(candidate: Dossier, champion: Dossier | None, policy: Policy, tags: Mapping[str, str]) -> list[GateResult]:
    """Every gate in a fixed order; all must pass.

    Args:
        tags: of the candidate's version in the registry, for the approval.
    """
    asked = candidate.gates.model_copy(
        update={
            "floors": _stricter(candidate.gates.floors, policy.floors),
            "times_chance": _stricter(candidate.gates.times_chance, policy.times_chance),
        }
    )
    results = gates.evaluate(
        candidate.rows,
        candidate.final,
        candidate.untrained,
        asked,
        candidate.model,
        candidate.data,
        candidate.recipe_digest,
    )
    results.append(no_regression(candidate, champion, policy.regression))
    if policy.contamination is not None:
        results.append(contamination_below(candidate, policy.contamination))
    if policy.approval_tag:
        results.append(approved(policy.approval_tag, tags))
    return results


def no_regression(candidate: Dossier, champion: Dossier | None, tolerance: float) -> GateResult:
    """On every benchmark that the champion was scored on, the candidate is at most `tolerance` below it."""
    if champion is None:
        return GateResult("no_regression", True, "there is no champion yet")
    before, after = gates.of_row(champion.rows, champion.final), gates.of_row(candidate.rows, candidate.final)
    parts, passed = [], True
    for name, old in sorted(before.items()):
        new = after.get(name)
        if new is None:
            parts.append(f"{name} not measured, champion {old.score:.3f}")
            passed = False
        elif candidate.tables.get(name) != champion.tables.get(name) or new.split != old.split:
            parts.append(f"{name} asks other questions than the champion answered; not compared")
            passed = False
        else:
            parts.append(f"{name} {new.score:.3f}, champion {old.score:.3f} - {tolerance:g}")
            passed = passed and new.score >= old.score - tolerance
    return GateResult("no_regression", passed, "; ".join(parts) or "the champion has no scores")


def contamination_below(candidate: Dossier, limit: float) -> GateResult:
    """Of every benchmark at most `limit` of the questions were found in the training data; unmeasured fails."""
    parts, passed = [], True
    for name in sorted(gates.of_row(candidate.rows, candidate.final)):
        share = candidate.contamination.get(name)
        parts.append(f"{name} not measured" if share is None else f"{name} {share:.4f} of {limit:.4f}")
        passed = passed and share is not None and share <= limit
    return GateResult("contamination", passed and bool(parts), "; ".join(parts) or "nothing measured")


def approved(tag: str, tags: Mapping[str, str]) -> GateResult:
    """A person has set the tag, to anything but nothing."""
    who = tags.get(tag, "").strip()
    return GateResult(APPROVAL, bool(who), f"{tag} = {who}" if who else f"tag '{tag}' is not set")


def waits_for_approval(results: list[GateResult]) -> bool:
    """Only the approval is missing."""
    return [result.name for result in results if not result.passed] == [APPROVAL]


def _stricter(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in sorted({*one, *other})}
