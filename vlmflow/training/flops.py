"""How many floating-point operations a pack costs, as a linear function of what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CostModel:
    """Operations of a training step as a linear function of what is in it.

    Attributes:
        per_token: a token in the language model, image tokens included.
        per_token_squared: times the squared length of each segment.
        per_tile: an image tile: towers and projector.
        per_target: a token that carries a loss: the language head.
    """

    per_token: float = 0.0
    per_token_squared: float = 0.0
    per_tile: float = 0.0
    per_target: float = 0.0

    def cost(self, tokens: Any, squares: Any, tiles: Any, targets: Any = 0) -> Any:
        """Operations of `tokens` in segments whose squared lengths sum to `squares`; numbers or arrays of them."""
        return (
            self.per_token * tokens
            + self.per_token_squared * squares
            + self.per_tile * tiles
            + self.per_target * targets
        )

    def values(self) -> tuple[float, float, float, float]:
        """The four numbers, in order."""
        return self.per_token, self.per_token_squared, self.per_tile, self.per_target
