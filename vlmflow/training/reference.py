"""Log-probabilities of every planned pair under the stage's initial model, computed once and kept in the store.

With them no second model is in memory while training, and none runs. They are computed before the first step and before a
checkpoint is put back, by the same packed forward in the same dtype, so they never come from weights that have moved, and
the first step's margin is zero. Stored in parts, each whole or absent: a pass that was killed goes on at the
first missing part and ends with the same bytes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmflow import storage
from vlmflow.digest import digest
from vlmflow.errors import NotFound, StepFailed
from vlmflow.models import store
from vlmflow.training import length

if TYPE_CHECKING:
    from vlmflow.training.job import Job
    from vlmflow.training.loader import Loader, Micro
    from vlmflow.training.plan import Plan

VERSION = 2  # raise when equal inputs would give other values
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


def address(job: Job, plan: Plan) -> str:
    """Where the reference of a job's plan lies: a prefix named by all that decides its values.

    That is the initial model, the plan, how samples become tokens and the dtype; not the loss's parameters, nor what trains
    and how fast, so that trainings which differ in these share it.
    """
    stage = job.stage
    named = {
        "versions": [VERSION, length.VERSION],
        "model": store.behaviour_digest(store.load_ref(job.model).files),
        "family": job.family,
        "plan": plan.digest(),
        "uses": [[use.text, use.prompt or stage.prompt] for use, _ in job.uses],
        "dtype": stage.dtype,
    }
    return storage.join(job.references, digest(named)[:24])


def prepare(
    uri: str,
    plan: Plan,
    loader: Callable[[Plan], Loader],
    engine: Any,
    device: Any,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> Reference | None:
    """Read the reference of a plan, or compute what is missing of it. Collective: every rank must call it.

    Args:
        uri: prefix of the parts (see `address`).
        loader: makes this rank's loader of a plan.
        engine: with the initial weights; left in training mode.
        say: told lines for people: what was found, how far it is, how long it took.
        stop: asked after each pack whether this process was told to end.

    Returns:
        The values, or None when a rank was told to end; the parts that are complete are kept.

    Raises:
        StepFailed: a log-probability is not finite (names the samples).
    """
    import torch

    from vlmflow.training.collective import gather

    once, place = shown_once(plan)
    values = np.zeros((len(once.items), 2), dtype=np.float32)
    found = 0
    while found < once.steps and (known := _read(uri, found, once)) is not None:
        values[_rows(once, found)] = known
        found += 1
    found = int(
        gather(torch.tensor([found], device=device), world).min()
    )  # a store may answer a rank later than another
    started, packs = time.perf_counter(), len(once.pack_start) - 1
    if found < once.steps:
        batches = loader(once)
        engine.eval()
        try:
            for part, micros in batches.steps(found):
                known = _compute(part, once, micros, engine, device, rank, world, stop)
                if known is None:
                    return None
                values[_rows(once, part)] = known
                if rank == 0:
                    _write(uri, part, values[_rows(once, part)])
                if part + 1 < once.steps:
                    say(f"reference: {once.packs_of(part).stop} of {packs} packs measured")
        finally:
            batches.close()
            engine.train()
    done = once.packs_of(found - 1).stop if found else 0
    say(
        f"reference: {len(values)} pairs in {packs} packs, {done} of them found in the store, {packs - done} measured in "
        f"{time.perf_counter() - started:.1f} s ({uri})"
    )
    return Reference(values[place], plan.pack_start)


def shown_once(plan: Plan) -> tuple[Plan, Ints]:
    """(the plan's packs without the pairs that an earlier pack shows, parts as its steps; place of plan's pairs in it)."""
    same = np.stack([plan.items[name] for name in ("shard", "row", "first", "max_tiles")], axis=1)
    _, first, pair = np.unique(same, axis=0, return_index=True, return_inverse=True)
    kept = np.sort(first)
    _, sizes = np.unique(np.searchsorted(plan.pack_start, kept, side="right"), return_counts=True)
    pack_start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    step_start = np.append(np.arange(0, len(sizes), PART), len(sizes)).astype(np.int64)
    once = replace(plan, items=plan.items[kept], pack_start=pack_start, step_start=step_start, report={})
    return once, np.searchsorted(kept, first)[pair.reshape(-1)]


def _compute(
    part: int,
    once: Plan,
    micros: list[Micro],
    engine: Any,
    device: Any,
    rank: int,
    world: int,
    stop: Callable[[], bool],
) -> Floats | None:
    """Values of one part [pairs, 2], whole on every rank; None when a rank was told to end."""
    import torch
    import torch.distributed as dist

    from vlmflow.models.loss import packed_logprobs
    from vlmflow.training.batch import to_torch
    from vlmflow.training.collective import everyone
    from vlmflow.training.dpo import pairs_first

    rows = _rows(once, part)
    own = torch.zeros(rows.stop - rows.start, 2, device=device)
    for pack, micro in zip(once.deal(part, world)[rank], micros, strict=True):
        with torch.no_grad():  # an empty pack runs too: under ZeRO-3 its rank must gather weights with the others
            found, _ = packed_logprobs(engine, to_torch(micro.batch, device))
        if pack is not None:
            a, b = (once.pack_start[pack : pack + 2] - rows.start).tolist()
            own[a:b] = pairs_first(found, b - a)
        if not everyone(not stop(), world, device):
            return None
    whole = own.clone()
    if world > 1:
        dist.all_reduce(whole)  # exact: where one rank has a value, the others have zero
    if not bool(whole.isfinite().all()):
        keys = [] if bool(own.isfinite().all()) else [key for micro in micros for key in micro.keys]
        raise StepFailed(
            f"part {part} of the reference: a log-probability under the initial model is not finite, so no preference can be "
            f"measured against it. Rank {rank} has it in one of {keys}. Look at the initial model and at these samples."
        )
    return whole.cpu().numpy()


def _rows(once: Plan, part: int) -> slice:
    packs = once.packs_of(part)
    return slice(int(once.pack_start[packs.start]), int(once.pack_start[packs.stop]))


def _part(uri: str, part: int) -> str:
    return storage.join(uri, f"part-{part:05d}.npy")


def _write(uri: str, part: int, values: Floats) -> None:
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(values, dtype="<f4"), allow_pickle=False)
    storage.write_bytes(_part(uri, part), out.getvalue())


def _read(uri: str, part: int, once: Plan) -> Floats | None:
    """A part of an earlier pass if it is there and whole."""
    try:
        values = np.load(io.BytesIO(storage.read_bytes(_part(uri, part))), allow_pickle=False)
    except (NotFound, ValueError, EOFError):
        return None
    rows = _rows(once, part)
    return values if values.shape == (rows.stop - rows.start, 2) and values.dtype == np.float32 else None
