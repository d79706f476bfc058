"""The numbers of one step, as they go to the log and to MLflow."""

from __future__ import annotations

import resource
from functools import cache
from typing import Any

from vlmflow.training.flops import peak_flops
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
        **utilisation(float(plan.pack_cost[packs.start : packs.stop].sum()), seconds, device),
        **{name: round(value, 6) for name, value in metrics.items()},
    }


def utilisation(operations: float, seconds: float, device: Any) -> dict[str, float]:
    """`tflops`, model operations a second on each device, and `mfu`, their share of its bf16 peak where that is known.

    Args:
        operations: of a step over all ranks, counted by the rules of `vlmflow.training.flops`: without recomputation,
            dummy tiles and the optimizer.
    """
    import torch.distributed as dist

    rate = operations / seconds / (dist.get_world_size() if dist.is_initialized() else 1)
    peak = _peak(device)
    return {"tflops": round(rate / 1e12, 4)} | ({"mfu": round(rate / peak, 4)} if peak else {})


@cache
def _peak(device: Any) -> float | None:
    import torch

    return peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else "")
