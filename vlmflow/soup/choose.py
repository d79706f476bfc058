"""Which models go into a soup: the three procedures of POINTS 3.3 (points.md 7.1) as pure functions of accuracies."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import BaseModel, ConfigDict


class TraceStep(BaseModel):
    """One decision of the greedy search. before: accuracy of the pool so far (None for the first model); after:
    accuracy of the pool with the candidate."""

    model_config = ConfigDict(extra="forbid")
    step: int
    candidate: str
    before: float | None
    after: float
    accepted: bool


def ranking(accuracy: Mapping[str, float]) -> list[str]:
    """Names by accuracy, highest first; equal ones by name."""
    return sorted(accuracy, key=lambda name: (-accuracy[name], name))


def maximum(accuracy: Mapping[str, float], p: int) -> list[str]:
    """The p best; all of them when there are fewer."""
    return ranking(accuracy)[:p]


def greedy(
    accuracy: Mapping[str, float], pooled: Callable[[tuple[str, ...]], float]
) -> tuple[list[str], list[TraceStep]]:
    """Greedy soup. `pooled(names)` gives the accuracy of the mean of those models; it is asked for two or more only.

    Models in order of `ranking`; the first is accepted; each further one when the pool with it is at least as accurate
    as without (>=, as in POINTS; model-soups itself asks >).
    """
    pool: list[str] = []
    trace: list[TraceStep] = []
    best: float | None = None
    for i, name in enumerate(ranking(accuracy), start=1):
        after = pooled((*pool, name)) if pool else accuracy[name]
        accepted = best is None or after >= best
        trace.append(TraceStep(step=i, candidate=name, before=best, after=after, accepted=accepted))
        if accepted:
            pool, best = [*pool, name], after
    return pool, trace
