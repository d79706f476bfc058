"""Where a training goes on: all ranks from one checkpoint, or none.

Rank 0 chooses, for two ranks that looked at the store at different instants could choose differently. Then one rank of
each machine brings the chosen checkpoint to its disk and verifies it, and every rank reads its part from there.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from vlmflow.errors import StepFailed, VlmflowError
from vlmflow.training import checkpoint
from vlmflow.training.checkpoint import Checkpoint
from vlmflow.training.collective import everyone, from_first
from vlmflow.training.job import Job

NOTHING, FAILED = -1, -2


def resume(job: Job, engine: Any, plan: str, rank: int, world: int, device: Any) -> tuple[Checkpoint | None, list[str]]:
    """Put the newest complete checkpoint into the engine; collective.

    Args:
        plan: digest of this run's pack plan.

    Returns:
        The checkpoint and, on rank 0, what was passed over with its reason.

    Raises:
        CheckpointError: it is another plan's, family's or model's.
        StorageError: the store does not answer.
        StepFailed: one of these happened on another rank.
    """
    from vlmflow.training import engine as ds

    work = job.work / "resume"
    found: Checkpoint | None = None
    ignored: list[str] = []
    failed: VlmflowError | None = None
    if rank == 0:
        try:
            found, ignored = checkpoint.newest(job.checkpoints, work)
        except VlmflowError as error:
            failed = error
    chosen = from_first(FAILED if failed else NOTHING if found is None else found.step, world, device)
    if chosen >= 0 and rank and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            found = checkpoint.fetch(job.checkpoints, chosen, work)
        except VlmflowError as error:
            failed = error
    if not everyone(failed is None, world, device):
        raise failed or StepFailed("reading the checkpoint failed on another rank; its own message says why")
    if chosen >= 0:
        found = found or checkpoint.opened(job.checkpoints, chosen, work)
        found.check(plan, job.family)
        skipped = found.state.get("health", {}).get("skipped", 0)
        ds.restore(engine, *found.tensors(), found.step - skipped)
        everyone(True, world, device)  # all have read before one deletes
    shutil.rmtree(work, ignore_errors=True)
    return found, ignored
