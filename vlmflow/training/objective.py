"""What a stage minimises: a dict from ``objective.kind`` to a function of (model, batch).

Each gives a sum over a micro-batch; the loop divides it by the weight of the whole step (target tokens, or pairs), known
from the plan before the step begins, so neither accumulation nor the number of ranks changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vlmflow.recipe.objective import ObjectiveSpec
    from vlmflow.training.plan import Plan


@dataclass
class Outcome:
    """A micro-batch's loss, summed, and further sums to be added up over ranks and divided like the loss."""

    loss_sum: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


def sft(model: Any, batch: Mapping[str, Any], spec: ObjectiveSpec) -> Outcome:
    """Cross-entropy in nats, summed over target tokens."""
    from vlmflow.models.loss import packed_loss

    return Outcome(packed_loss(model, batch)[0])


def dpo(model: Any, batch: Mapping[str, Any], spec: ObjectiveSpec) -> Outcome:
    """Direct preference optimisation, summed over pairs; see `vlmflow.training.dpo`."""
    from vlmflow.training.dpo import pack_outcome

    return Outcome(*pack_outcome(model, batch, spec))


@dataclass(frozen=True)
class Objective:
    """A loss.

    Attributes:
        outcome: (engine, batch of tensors, recipe's objective) -> sums of this micro-batch.
        weight: (plan, step) -> what the step's loss is divided by, over all ranks.
        paired: items are pairs measured against the initial model; batches carry its ``reference`` values.
    """

    outcome: Callable[[Any, Mapping[str, Any], ObjectiveSpec], Outcome]
    weight: Callable[[Plan, int], int]
    paired: bool = False


OBJECTIVES: dict[str, Objective] = {
    "sft": Objective(sft, lambda plan, step: plan.targets_of(step)),
    "dpo": Objective(dpo, lambda plan, step: plan.items_in(step), paired=True),
}
