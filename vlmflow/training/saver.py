"""One rank's share in checkpoints: put the newest back, hand new ones to the writer, leave none half written.

Every method is a collective; only rank 0 has a writer and a log.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vlmflow.errors import StorageError
from vlmflow.training.checkpoint import Checkpoint, Snapshot
from vlmflow.training.checkpoint_writer import Writer, grace
from vlmflow.training.job import Job, emit

if TYPE_CHECKING:
    from vlmflow.training.log import TrainLog


class Saver:
    """Checkpoints of one training.

    Attributes:
        log: rank 0's training log once `resume` was called; None on the other ranks.
        grace: seconds for a checkpoint after SIGTERM.

    Args:
        plan: digest of the pack plan.
    """

    def __init__(self, job: Job, engine: Any, plan: str, rank: int, world: int, device: Any) -> None:
        self.job, self.engine, self.plan = job, engine, plan
        self.rank, self.world, self.device = rank, world, device
        self.grace = grace()
        self.log: TrainLog | None = None
        self.writer: Writer | None = None

    def resume(self, steps: int) -> Checkpoint | None:
        """Put the newest complete checkpoint back on every rank; opens the log. None = from the start."""
        from vlmflow.training.log import TrainLog, steps_before, tracker_from_environment
        from vlmflow.training.resume import resume

        job, policy = self.job, self.job.stage.checkpoint
        found, ignored = resume(job, self.engine, self.plan, self.rank, self.world, self.device)
        if self.rank:
            return found
        for text in ignored:
            emit(event="note", text=f"checkpoint passed over: {text}")
        if found is not None:
            text = f"resumed at step {found.step} of {steps} (written by {found.state['world']} processes)"
            emit(event="note", text=text)
        first = found.step if found else None
        self.writer = Writer(
            job.checkpoints, job.work / "saving", policy.keep, policy.keep_every, policy.background, first, emit
        )
        tracker, problem = None, ""
        if job.tracking:
            tracker, problem = tracker_from_environment(
                **job.tracking, earlier=found.state.get("mlflow_run") if found else None
            )
        if problem:
            emit(event="note", text=problem)
        self.log = TrainLog(job.log, steps_before(found.log, found.step) if found else "", tracker)
        return found

    def save(self, done: int, health: Any, patience: float) -> None:
        """Capture the state on all ranks and hand it to the writer, once it has finished the checkpoint before.

        Args:
            done: optimizer steps done.
            health: what the health policy remembers.
            patience: seconds it may take to do so; afterwards there is no checkpoint of this step.
        """
        from vlmflow.training import engine as ds
        from vlmflow.training.collective import from_first

        ready = self.writer is None or self.writer.ready(patience)
        if not from_first(ready, self.world, self.device):
            if self.rank == 0:
                emit(
                    event="note",
                    text=f"no checkpoint at step {done}: the one before is still being written. Training goes on; lengthen "
                    "checkpoint.every or look at the store.",
                )
            return
        weights, moments = ds.capture(self.engine)
        if self.writer is None or self.log is None:
            return
        job = self.job
        state = {"plan": self.plan, "family": job.family, "world": self.world, "seed": job.seed, "key": job.key}
        state["health"] = health
        if self.log.tracker is not None and self.log.tracker.run_id:
            state["mlflow_run"] = self.log.tracker.run_id
        self.writer.write(Snapshot(done, weights, moments, state, self.log.text()))

    def poll(self) -> None:
        """Tell what the writer has done since."""
        if self.writer is not None:
            self.writer.poll()

    def stopped(self, since: float) -> None:
        """After SIGTERM at ``since``: no rank leaves before the checkpoint is written, or the time for it is over.

        Raises:
            StorageError: there is no complete checkpoint.
        """
        from vlmflow.training.collective import everyone

        failed: StorageError | None = None
        if self.writer is not None:
            try:
                self.writer.close(max(0.0, self.grace - (time.perf_counter() - since)))
                if self.writer.complete is None:
                    failed = StorageError("stopped before a checkpoint was complete: nothing of this training is saved")
            except StorageError as error:
                failed = error
        everyone(failed is None, self.world, self.device)
        if failed is not None:
            raise failed

    def close(self, status: str) -> None:
        """Let a write in flight finish, however training ended; its failure does not hide how that was. Ends the log."""
        if self.writer is not None:
            try:
                self.writer.close(self.grace)
            except StorageError as error:
                emit(event="note", text=f"the last checkpoint was not written: {error}")
        if self.log is not None:
            self.log.close(status)
            if self.log.tracker is not None and self.log.tracker.problem:
                emit(event="note", text=self.log.tracker.problem + "; training went on without it")
