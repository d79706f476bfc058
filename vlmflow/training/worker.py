"""One rank of a training as a process.

Started by `launch`, on a laptop or on a node of a cluster, or by torchrun (``torchrun -m vlmflow.training.worker JOB``).
A job is a URI or a path. Rank 0 reports through event lines on standard output and publishes the model. Under torchrun,
where nobody reads standard output, an error is also left in the store.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from contextlib import suppress

from vlmflow import storage
from vlmflow.errors import StorageError, VlmflowError
from vlmflow.storage_file import full_disk
from vlmflow.training import failure
from vlmflow.training.job import PREEMPTED, Job, emit


def watch_parent() -> None:
    """End this process when the launcher is gone: its end of our standard input closes."""

    def wait() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(argv: list[str]) -> int:
    """Entry point of one rank: trains the jobs one after another in this process; returns the exit code."""
    from vlmflow.training.publish import publish
    from vlmflow.training.trainer import Preempted, Trainer

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "VLMFLOW_LAUNCHER" in os.environ:
        watch_parent()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    emit(event="start", rank=rank, pid=os.getpid())
    job = None
    try:
        for uri in argv:
            job = Job.model_validate(storage.read_json(uri))
            job.fetch()
            trainer = Trainer(job, rank, world, os.environ.get("VLMFLOW_RENDEZVOUS", "env://"), stopping)
            trainer.run()
            if rank == 0 and job.publication is not None:
                publish(job, trainer.summary)
    except Preempted:
        return PREEMPTED
    except VlmflowError as error:
        return _report(error, job, rank)
    except Exception as error:
        if (full := full_disk(error)) is None:
            raise
        return _report(full, job, rank)
    return 0


def _report(error: VlmflowError, job: Job | None, rank: int) -> int:
    """Tell the launcher; returns the exit code."""
    emit(event="error", kind=type(error).__name__, message=str(error))
    if job is not None and "VLMFLOW_LAUNCHER" not in os.environ:
        with suppress(StorageError):
            failure.write(job.folder, f"rank-{rank:05d}", error)
    return error.exit_code


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all work is on disk; tearing down torch's threads would cost up to a second
