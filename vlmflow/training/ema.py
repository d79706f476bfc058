"""An exponential moving average of the trained weights, which is published in their place.

After optimizer step t (from 0) the average moves to the weights: ``average += (1 - d) * (weights - average)`` with
``d = min(decay, (1 + t) / (10 + t))``, TensorFlow's ``ExponentialMovingAverage(num_updates=t)``. The average starts at
the initial weights, and with a fixed decay of 0.9999 it would still be half of them after 6900 steps; with the ramp their
share is 2e-4 after 6. A step that was skipped does not count. The average is fp32 of the fp32 weights.

Each rank averages the part of the weights that its optimizer holds, so under ZeRO 1 to 3 nothing is kept twice; without
ZeRO every rank holds everything, and rank 0 alone averages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RAMP = 10  # steps; the decay of step t is at most (1 + t) / (RAMP + t)


def decay_at(step: int, decay: float) -> float:
    """How much of the average stays at optimizer step ``step`` (0-based)."""
    return min(decay, (1 + step) / (RAMP + step))


class Ema:
    """The average of this rank's part of the weights.

    Args:
        weights: name -> fp32 view of the weights, that the optimizer goes on to change. Views of other ranks' parts are
            empty.

    Attributes:
        averages: name -> fp32, as ``weights``.
        taken: optimizer steps averaged over.
    """

    def __init__(self, decay: float, weights: Mapping[str, torch.Tensor]) -> None:
        self.decay, self.weights, self.taken = decay, dict(weights), 0
        self.averages = {name: value.detach().clone() for name, value in weights.items()}

    def update(self) -> None:
        """Average in the weights of one more step."""
        share = 1.0 - decay_at(self.taken, self.decay)
        for name, average in self.averages.items():
            average.lerp_(self.weights[name], share)
        self.taken += 1
