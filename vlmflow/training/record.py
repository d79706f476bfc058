"""The numbers of one step, as they go to the log and to MLflow."""

from __future__ import annotations

import resource
from typing import Any

from vlmflow.training.plan import Plan


def step_record(
    plan: Plan,
    step: int,
    loss: float,
    norm: float,
    rates: dict[str, float],
    images: int,
    seconds: float,
    waited: float,
    device: Any,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Numbers of a step over all ranks.

    Args:
        loss: nats a target token (or the objective's own unit).
        norm: global gradient norm before clipping.
        rates: learning rate by group.
        seconds: wall time of the step on this rank; ``waited`` of it for data.
        metrics: further numbers of the objective, already global.
    """
    import torch

    packs = plan.packs_of(step)
    tokens = int(plan.pack_tokens[packs.start : packs.stop].sum())
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "loss": round(loss, 6),
        "lr": rates,
        "grad_norm": round(norm, 6),
        "tokens": tokens,
        "targets": plan.targets_of(step),
        "seconds": round(seconds, 5),
        "tokens_per_second": round(tokens / seconds, 1),
        "images_per_second": round(images / seconds, 2),
        "data_wait": round(waited / seconds, 4),
        "memory_mb": round(memory, 1),
        **{name: round(value, 6) for name, value in metrics.items()},
    }
