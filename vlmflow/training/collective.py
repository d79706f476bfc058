"""Small questions that ranks answer together. With one rank nothing is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def gather(row: torch.Tensor, world: int) -> torch.Tensor:
    """[n] of each rank -> [world, n] on every rank, in the order of ranks, so that all sum it to the same bits."""
    import torch
    import torch.distributed as dist

    if world == 1:
        return row[None]
    rows = torch.empty(world * len(row), dtype=row.dtype, device=row.device)
    dist.all_gather_into_tensor(rows, row.contiguous())
    return rows.view(world, -1)


def from_first(number: int, world: int, device: Any) -> int:
    """Rank 0's number on every rank."""
    import torch
    import torch.distributed as dist

    told = torch.tensor([number], dtype=torch.int64, device=device)
    if world > 1:
        dist.broadcast(told, 0)
    return int(told)


def everyone(well: bool, world: int, device: Any) -> bool:
    """Whether it is true on all ranks; none returns before all have asked."""
    import torch

    return bool(gather(torch.tensor([int(well)], device=device), world).all())
