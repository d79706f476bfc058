"""Direct preference optimisation: the better answer becomes likelier, relative to where the stage began.

Loss of a pair (Rafailov et al. 2023, eq. 7): -log sigmoid(beta * ((c - c_ref) - (r - r_ref))), where c and r are the
log-probabilities of the chosen and the rejected answer given the same prompt and images, summed over an answer's tokens
and its end token, and _ref those of the stage's initial model (computed once, `reference.py`). A step's loss is the sum
over its pairs divided by their number over all ranks and packs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vlmflow.recipe.objective import ObjectiveSpec


def pair_losses(
    policy: torch.Tensor, reference: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each pair [P] in nats, rewards [P, 2]) from log-probabilities [P, 2] of (chosen, rejected).

    A reward is beta * (policy - reference). With label smoothing e a preference is held to be the wrong way round with
    probability e (conservative DPO, Mitchell 2023): (1 - e) * loss + e * loss of the swapped pair.
    """
    from torch.nn.functional import logsigmoid

    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    losses = -logsigmoid(margin)
    if label_smoothing:
        losses = (1.0 - label_smoothing) * losses - label_smoothing * logsigmoid(-margin)
    return losses, rewards


def pairs_first(values: torch.Tensor, pairs: int) -> torch.Tensor:
    """Values of segments [S] as [pairs, 2]: (chosen, rejected)."""
    return values[: 2 * pairs].view(pairs, 2)


def pack_outcome(
    model: Any, batch: Mapping[str, Any], spec: ObjectiveSpec
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and figures of a pack's pairs, summed.

    Args:
        batch: the packed forward's arguments, and ``reference`` fp32 [P, 2]: log-probabilities of chosen and rejected under
            the initial model. Pair i is segments 2i (chosen) and 2i + 1 (rejected); what follows the pairs (the dummy of a
            pack without images) is none. P may be 0.

    Returns:
        The loss, which is that of `pair_losses` plus ``sft_weight`` times the chosen answer's mean nats a token (Pang
        et al. 2024), and sums of: ``margin`` (chosen minus rejected reward), ``accuracy`` (1 where it is positive),
        ``reward_chosen``, ``reward_rejected``, ``nll_chosen`` (nats a token).
    """
    from vlmflow.models.loss import packed_logprobs

    reference = batch["reference"]
    logprobs, counts = packed_logprobs(model, {k: v for k, v in batch.items() if k != "reference"})
    policy = pairs_first(logprobs, len(reference))
    losses, rewards = pair_losses(policy, reference, spec.beta, spec.label_smoothing)
    nll = -policy[:, 0] / pairs_first(counts, len(reference))[:, 0]
    if spec.sft_weight:
        losses = losses + spec.sft_weight * nll
    chosen, rejected = rewards.detach().unbind(1)
    sums = {
        "margin": (chosen - rejected).sum(),
        "accuracy": (chosen > rejected).sum(),
        "reward_chosen": chosen.sum(),
        "reward_rejected": rejected.sum(),
        "nll_chosen": nll.detach().sum(),
    }
    return losses.sum(), sums
