"""One rank of a training as a process.

Started once a process, by the local launcher or by torchrun (``python -m vlmflow.training.worker JOB.json`` with
RANK, WORLD_SIZE and LOCAL_RANK set). Rank 0 reports through event lines on standard output.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from vlmflow.errors import VlmflowError
from vlmflow.storage_file import full_disk
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
    from vlmflow.training.trainer import Preempted, Trainer

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "VLMFLOW_LAUNCHER" in os.environ:
        watch_parent()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    emit(event="start", rank=rank, pid=os.getpid())
    try:
        for path in argv:
            job = Job.model_validate_json(Path(path).read_text())
            Trainer(job, rank, world, os.environ.get("VLMFLOW_RENDEZVOUS", "env://"), stopping).run()
    except Preempted:
        return PREEMPTED
    except VlmflowError as error:
        emit(event="error", kind=type(error).__name__, message=str(error))
        return error.exit_code
    except Exception as error:
        if (full := full_disk(error)) is None:
            raise
        emit(event="error", kind=type(full).__name__, message=str(full))
        return full.exit_code
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all work is on disk; tearing down torch's threads would cost up to a second
