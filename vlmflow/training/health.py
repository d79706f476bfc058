"""Whether a step may change the weights: not when its loss or gradient is not finite, nor at a spike of the loss.

Every rank sees the same numbers and therefore decides the same. A step that is skipped leaves weights, moments and
AdamW's own count of steps as they were; the data and the learning rate go on with the next step. What is remembered
travels with checkpoints, so a resumed run decides as an undisturbed one.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Any

from vlmflow.errors import ModelError, StepFailed
from vlmflow.recipe.stage import HealthSpec

if TYPE_CHECKING:
    import torch

WINDOW = 64  # healthy steps whose losses the median is taken over
ENOUGH = 16  # healthy steps before a spike is looked for: the first losses of a run fall fast
KEYS, KEY_BYTES = 16, 2048  # samples named for one rank, and the bytes in which ranks exchange them
RANKS = 8  # ranks whose samples are named


class Health:
    """Judge of one training, equal on all ranks.

    Attributes:
        skipped: steps that did not change the weights, earlier attempts included.
    """

    def __init__(self, spec: HealthSpec, state: dict[str, Any] | None = None) -> None:
        self.spec = spec
        state = state or {"losses": [], "skipped": 0}
        self.losses: deque[float] = deque(state["losses"], WINDOW)
        self.skipped = int(state["skipped"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember; JSON keeps the floats' bits."""
        return {"losses": list(self.losses), "skipped": self.skipped}

    def of_loss(self, loss: float) -> str:
        """What is wrong with a step by its loss (nats per target), before the optimizer steps; "" when nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.spec.spike is not None and len(self.losses) >= ENOUGH:
            usual = median(self.losses)
            if usual > 0 and loss > self.spec.spike * usual:
                return (
                    f"the loss {loss:.4g} is {loss / usual:.3g} times {usual:.4g}, the median of the last "
                    f"{len(self.losses)} healthy steps (limit {self.spec.spike:g})"
                )
        return ""

    @staticmethod
    def of_norm(norm: float) -> str:
        """What is wrong with a step by its gradient norm; "" when nothing is."""
        return "" if math.isfinite(norm) else f"the gradient norm is {norm}"

    def unhealthy(
        self, step: int, problem: str, loss: float, norm: float, losses: torch.Tensor, keys: list[str]
    ) -> dict[str, Any]:
        """Count a step that is not healthy; collective.

        Args:
            losses: [world], each rank's part of the loss.
            keys: this rank's samples of the step.

        Returns:
            What the log says of it: ``skipped`` (why) and ``samples`` (by rank).

        Raises:
            StepFailed: the recipe says stop, or too many were skipped; names the samples.
        """
        self.skipped += 1
        samples = _samples(losses, keys)
        names = "; ".join(f"{place}: {', '.join(found) or 'none'}" for place, found in samples.items())
        spike = math.isfinite(loss) and math.isfinite(norm)
        field, policy = ("on_spike", self.spec.on_spike) if spike else ("not_finite", self.spec.not_finite)
        if policy == "stop":
            why = f"health.{field} is stop"
        elif self.skipped > self.spec.skips:
            why = f"{self.skipped} steps were skipped and health.skips allows {self.spec.skips}"
        else:
            text = f"step {step} skipped ({self.skipped} of {self.spec.skips}): {problem}. Its samples: {names}"
            return {"skipped": text, "samples": samples}
        raise StepFailed(
            f"step {step}: {problem}; training stopped ({why}) before anything of this step was saved, and the last "
            f"checkpoint is untouched. Samples of the step: {names}. Look at them, lower the learning rate or lengthen the "
            "warm-up."
        )

    def healthy(self, loss: float) -> None:
        """Remember a step that changed the weights."""
        self.losses.append(loss)


def _samples(losses: torch.Tensor, keys: list[str]) -> dict[str, list[str]]:
    """Samples of the step by rank, the ranks whose own loss is not finite first, at most ``RANKS`` of them; collective."""
    import torch

    from vlmflow.training.collective import gather

    mine = torch.frombuffer(bytearray(pack_keys(keys)), dtype=torch.uint8).to(losses.device)
    rows = gather(mine, len(losses)).cpu()
    order = sorted(range(len(losses)), key=lambda r: math.isfinite(float(losses[r])))
    found = {}
    for rank in order[:RANKS]:
        culprit = "" if math.isfinite(float(losses[rank])) else " (its loss is not finite)"
        found[f"rank {rank}{culprit}"] = unpack_keys(rows[rank].numpy().tobytes())
    if len(order) > RANKS:
        found[f"and {len(order) - RANKS} more ranks"] = []
    return found


def pack_keys(keys: list[str]) -> bytes:
    """Sample keys of a rank in ``KEY_BYTES`` bytes, for ranks to exchange; the rest is counted."""
    shown = keys[:KEYS]
    while True:
        more = [f"and {len(keys) - len(shown)} more"] if len(shown) < len(keys) else []
        data = "\n".join([*shown, *more]).encode()
        if len(data) <= KEY_BYTES:
            return data.ljust(KEY_BYTES, b"\0")
        shown.pop()


def unpack_keys(data: bytes) -> list[str]:
    """The other direction."""
    text = data.rstrip(b"\0").decode()
    return text.split("\n") if text else []


def check_weights(model: Any, place: str) -> None:
    """Refuse a model to start from that no step can repair.

    Raises:
        ModelError: names a tensor that is not finite, and how many there are.
    """
    bad = [name for name, parameter in model.named_parameters() if not _finite(_here(parameter))]
    if bad:
        raise ModelError(
            f"{place}: {len(bad)} of the model's tensors hold a value that is not finite, the first is '{bad[0]}'. Every loss "
            "would be NaN. Train, convert or download the model again."
        )


def _here(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter: the whole, or under ZeRO 3 an equal slice, the last one padded."""
    import torch

    if (mine := getattr(parameter, "ds_tensor", None)) is None:
        return parameter.detach()
    left = parameter.ds_numel - torch.distributed.get_rank() * mine.numel()
    return mine.detach()[: max(0, left)]


def _finite(tensor: torch.Tensor) -> bool:
    """Smallest and largest value carry NaN and infinity on, and need no memory of the tensor's size."""
    if not tensor.numel():
        return True
    smallest, largest = tensor.aminmax()
    return math.isfinite(float(smallest)) and math.isfinite(float(largest))
