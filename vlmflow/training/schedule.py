"""How the learning rate moves over the steps, and how the rates of many groups are told."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmflow.errors import RecipeError


def rate(step: int, steps: int, name: str, warmup: float, final: float = 0.0) -> float:
    """Multiplier of the peak rate for step ``step`` (0-based) of ``steps``: a pure function.

    Linear from 1/w to 1 over the first w = ceil(warmup * steps) steps (``warmup`` is a share), then cosine or linear
    towards ``final`` (a share of the peak), which would be reached one step after the last; or constant. So no step has
    a rate of zero and none is wasted.

    Raises:
        RecipeError: an unknown schedule name.
    """
    shapes = {
        "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
        "linear": lambda x: 1 - x,
        "constant": lambda x: 1.0,
    }
    if name not in shapes:
        raise RecipeError(f"schedule.name '{name}' is not known; use one of {sorted(shapes)}")
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    shape = shapes[name](min(1.0, (step - warm) / max(1, steps - warm)))
    return shape if name == "constant" else final + (1 - final) * shape


def named_rates(labels: Sequence[str], rates: Sequence[float]) -> dict[str, float]:
    """Rates of the groups for a log: label -> rate, or the highest and lowest where groups share a label."""
    found: dict[str, list[float]] = {}
    for label, value in zip(labels, rates, strict=True):
        found.setdefault(label, []).append(value)
    named = {label: max(values) for label, values in found.items()}
    return named | {f"{label} (lowest)": min(values) for label, values in found.items() if len(values) > 1}
