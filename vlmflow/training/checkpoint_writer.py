"""Checkpoints written from a thread of their own, one at a time, while training goes on.

Lives on rank 0. The loop hands over a snapshot and trains on; the thread hashes, writes and uploads it, and deletes
what the policy no longer keeps. What happens when the store fails:

- A write is tried ``ATTEMPTS`` times with growing pauses.
- One that failed for good is said at once, with the step that a kill would fall back to, and training goes on: the next
  save tries anew, and a store that is down for an hour must not end a run of a week.
- If there is no complete checkpoint at all, there is nothing to fall back to, and most often the store's address,
  rights or size are wrong: training stops with the store's error.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmflow.errors import AccessDenied, StepFailed, StorageError
from vlmflow.storage_file import full_disk
from vlmflow.training import checkpoint
from vlmflow.training.checkpoint import Snapshot

ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt; doubles with each
PATIENCE = 600.0  # seconds a save waits for the write before it; collectives of the other ranks time out later
GRACE_VARIABLE, GRACE = "VLMFLOW_TRAIN_GRACE", 600.0


def grace() -> float:
    """Seconds between SIGTERM and the end in which a checkpoint may be written (``VLMFLOW_TRAIN_GRACE``).

    Raises:
        StepFailed: the variable is not a number.
    """
    given = os.environ.get(GRACE_VARIABLE) or str(GRACE)
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise StepFailed(f"{GRACE_VARIABLE}={given} is not a number of seconds, e.g. 60")
    return seconds


class Writer:
    """Writes the checkpoints of one training.

    Args:
        base: URI prefix of the training's checkpoints.
        work: local folder for one file at a time.
        complete: step of the newest complete checkpoint, None when there is none.
        background: False = ``write`` returns when the checkpoint is in the store.
        tell: called in the caller's thread, from ``ready``, ``write``, ``poll`` and ``close``, with events to emit.

    Attributes:
        complete: as above, moved on by every finished write.
    """

    def __init__(
        self,
        base: str,
        work: Path,
        keep: int,
        keep_every: int | None,
        background: bool,
        complete: int | None,
        tell: Callable[..., None],
    ) -> None:
        self.base, self.work, self.keep, self.keep_every = base, work, keep, keep_every
        self.background, self.complete, self.tell = background, complete, tell
        self._thread: threading.Thread | None = None
        self._snapshot: Snapshot | None = None
        self._outcome: dict[str, Any] = {}

    def ready(self, patience: float) -> bool:
        """Wait until no write is in flight; False when that takes longer than ``patience`` seconds.

        Called before the next state is captured, so that there is never more than one copy of it in memory.

        Raises:
            StorageError: the write failed and there is no complete checkpoint.
        """
        if self._thread is None:
            return True
        self._thread.join(patience)
        self.poll()
        return self._thread is None

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write; the caller has asked ``ready``. Raises what ``ready`` raises when not in the background."""
        assert self._thread is None, "one write at a time"
        self._snapshot, self._outcome = snapshot, {}
        self._thread = threading.Thread(target=self._work, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.background:
            self._thread.join()
            self.poll()

    def poll(self) -> None:
        """Tell how the write in flight ended, if it did. Raises what ``ready`` raises."""
        if self._thread is None or self._thread.is_alive():
            return
        assert self._snapshot is not None
        step, outcome = self._snapshot.step, self._outcome
        self._thread = self._snapshot = None
        if (error := outcome.get("error")) is None:
            self.complete = step
            self.tell(event="checkpoint", step=step, seconds=round(outcome["seconds"], 3))
            if (left := outcome.get("left")) is not None:
                self.tell(event="note", text=f"older checkpoints could not be deleted and take up space: {left}")
            return
        if not isinstance(error, StorageError) or self.complete is None:
            raise error
        self.tell(
            event="note",
            text=f"CHECKPOINT NOT WRITTEN at step {step} after {outcome['attempts']} attempts: {error}. Training goes on; a "
            f"kill now falls back to step {self.complete}. The next save tries again.",
        )

    def close(self, patience: float) -> bool:
        """Wait for the write in flight at the end of a run; False when ``patience`` seconds were not enough."""
        finished = self.ready(patience)
        if not finished:
            assert self._snapshot is not None
            fallback = "nothing" if self.complete is None else f"step {self.complete}"
            self.tell(
                event="note",
                text=f"the checkpoint of step {self._snapshot.step} was not finished within {patience:.0f} s and is left "
                f"without its marker; the newest complete one is {fallback}. {GRACE_VARIABLE} sets the time.",
            )
        return finished

    def _work(self, snapshot: Snapshot) -> None:
        started = time.monotonic()
        outcome = self._outcome
        for attempt in range(1, ATTEMPTS + 1):
            outcome["attempts"] = attempt
            try:
                checkpoint.write(self.base, snapshot, self.work)
                break
            except Exception as error:
                known = error if isinstance(error, StorageError) else full_disk(error)
                if known is None or isinstance(known, AccessDenied) or attempt == ATTEMPTS:
                    outcome["error"] = known or error
                    return
            time.sleep(PAUSE * 2 ** (attempt - 1))
        outcome["seconds"] = time.monotonic() - started
        try:
            checkpoint.prune(self.base, snapshot.step, self.keep, self.keep_every)
        except StorageError as error:
            outcome["left"] = str(error)
