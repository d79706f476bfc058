"""Log-probabilities of every planned pair under the stage's initial model, computed once and kept in the store.

With them no second model is in memory while training, and none runs. They are computed before the first step and before a
checkpoint is put back, by the same packed forward in the same dtype, so they never come from weights that have moved, and
the first step's margin is exactly zero. Stored in parts, each whole or absent: a pass that was killed goes on at the
first missing part and ends with the same bytes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmflow import storage
from vlmflow.errors import NotFound, StepFailed

if TYPE_CHECKING:
    from vlmflow.training.loader import Loader, Micro
    from vlmflow.training.plan import Plan

VERSION = 1  # raise when equal inputs would give other values
PART = 256  # packs of one part: what a killed pass loses at most

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Reference:
    """Values of all pairs that a plan shows, fp32 [pairs, 2] (chosen, rejected) in nats, pack after pack."""

    values: Floats
    pack_start: Ints

    def of(self, pack: int | None) -> Floats:
        """Values of a pack's pairs [P, 2], in its order; None is the empty pack."""
        return self.values[:0] if pack is None else self.values[self.pack_start[pack] : self.pack_start[pack + 1]]


def prepare(
    uri: str,
    plan: Plan,
    loader: Callable[[Plan], Loader],
    engine: Any,
    device: Any,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] = lambda done, packs: None,
) -> tuple[Reference, str]:
    """Read the reference of a plan, or compute what is missing of it. Collective: every rank must call it.

    Args:
        uri: prefix that is named by all that decides the values.
        loader: makes the loader of a plan for this rank.
        engine: with the initial weights; left in training mode.
        progress: told (packs done, packs) after each part.

    Returns:
        The values, and a line for people: pairs, packs, seconds, how much was found.

    Raises:
        StepFailed: a log-probability is not finite (names the samples).
    """
    import torch
    import torch.distributed as dist

    once, position = shown_once(plan)
    values = np.zeros((int(once.pack_start[-1]), 2), dtype=np.float32)
    parts = [
        slice(*once.pack_start[[packs.start, packs.stop]].tolist()) for packs in map(once.packs_of, range(once.steps))
    ]
    found = 0
    while found < len(parts) and (known := _read(uri, found, parts[found])) is not None:
        values[parts[found]] = known
        found += 1
    if world > 1:  # a store may answer one rank later than another
        agreed = torch.tensor(found, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        found = int(agreed)
    started = time.perf_counter()
    if found < len(parts):
        _compute(uri, once, parts, found, values, loader(once), engine, device, rank, world, progress)
    packs = len(once.pack_start) - 1
    said = f"reference: {len(values)} pairs in {packs} packs, {time.perf_counter() - started:.1f} s"
    if found:
        said += f", {once.packs_of(found - 1).stop} of the packs found at {uri}"
    return Reference(values[position], plan.pack_start), said


def shown_once(plan: Plan) -> tuple[Plan, Ints]:
    """(plan of the packs that show a pair for the first time, one part a step; place of each of plan's pairs in it)."""
    _, first, inverse = np.unique(plan.order, return_index=True, return_inverse=True)
    packs = np.unique(np.searchsorted(plan.pack_start, first, side="right") - 1)
    kept = np.zeros(len(plan.order), dtype=np.int64)
    once = plan.of_packs(packs, PART)
    for new, old in enumerate(packs.tolist()):
        kept[plan.pack_start[old] : plan.pack_start[old + 1]] = np.arange(*once.pack_start[new : new + 2])
    return once, kept[first][inverse]


def _compute(
    uri: str,
    once: Plan,
    parts: list[slice],
    found: int,
    values: Floats,
    loader: Loader,
    engine: Any,
    device: Any,
    rank: int,
    world: int,
    progress: Callable[[int, int], None],
) -> None:
    import torch
    import torch.distributed as dist

    engine.eval()
    try:
        for part, micros in loader.steps(found):
            own = np.zeros_like(values)[parts[part]]
            for micro in micros:
                known = _logprobs(engine, micro, device)
                if micro.pack is not None:
                    start = int(once.pack_start[micro.pack]) - parts[part].start
                    own[start : start + len(known)] = known
            told = torch.from_numpy(own).to(device)
            if world > 1:
                dist.all_reduce(told)  # all other ranks hold zeros here: the sum is exact
            values[parts[part]] = told.cpu().numpy()
            if not np.isfinite(values[parts[part]]).all():
                keys = [key for micro in micros for key in micro.keys] if not np.isfinite(own).all() else []
                raise StepFailed(
                    f"part {part} of the reference: a log-probability under the initial model is not finite; no preference can be "
                    f"measured against it. On rank {rank} its samples are {keys}. Look at the initial model and at these samples."
                )
            if rank == 0:
                _write(uri, part, values[parts[part]])
            progress(once.packs_of(part).stop, len(once.pack_start) - 1)
    finally:
        loader.close()
        engine.train()


def _logprobs(engine: Any, micro: Micro, device: Any) -> Floats:
    """[P, 2] of one micro-batch. An empty pack runs too: under ZeRO-3 its rank must gather weights with the others."""
    import torch

    from vlmflow.models.loss import packed_logprobs
    from vlmflow.training.batch import to_torch
    from vlmflow.training.dpo import pairs_first

    with torch.no_grad():
        found, _ = packed_logprobs(engine, to_torch(micro.batch, device))
    return pairs_first(found, micro.items).float().cpu().numpy()


def _part(uri: str, part: int) -> str:
    return storage.join(uri, f"part-{part:05d}.npy")


def _write(uri: str, part: int, values: Floats) -> None:
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(values, dtype="<f4"), allow_pickle=False)
    storage.write_bytes(_part(uri, part), out.getvalue())


def _read(uri: str, part: int, rows: slice) -> Floats | None:
    """A part of an earlier pass if it is there and whole."""
    try:
        values = np.load(io.BytesIO(storage.read_bytes(_part(uri, part))), allow_pickle=False)
    except (NotFound, ValueError, EOFError):
        return None
    return values if values.shape == (rows.stop - rows.start, 2) and values.dtype == np.float32 else None
