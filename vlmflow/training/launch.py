"""Local launcher: the ranks of one training as child processes of this one.

Does what torchrun does for one machine, without its import and rendezvous time: environment for each rank, a file as
meeting point (no port to race for), one dead rank ends all, and the error shows that rank's last lines. SIGTERM is
passed on, so that a checkpoint is written before a pod goes away.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmflow import errors
from vlmflow.errors import StepFailed, VlmflowError
from vlmflow.training.job import EVENT, PREEMPTED

LAST_LINES = 25


class TrainingPreempted(StepFailed):
    """Training was asked to stop and left a checkpoint; running the step again goes on from there."""

    exit_code = PREEMPTED


def rank_environment(rank: int, world: int, rendezvous: str, threads: int) -> dict[str, str]:
    """Environment of one local rank."""
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    env |= {"VLMFLOW_RENDEZVOUS": rendezvous, "VLMFLOW_LAUNCHER": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    env |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    env.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "lo" in (name for _, name in socket.if_nameindex()):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    source = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [env.get("PYTHONPATH")])])
    return env


def launch(jobs: list[Path], world: int, threads: int, on_event: Callable[[dict[str, Any]], None]) -> None:
    """Run ``world`` ranks to their end; several jobs run one after another in the same processes.

    Args:
        on_event: called with every event of the ranks, in this thread.

    Raises:
        TrainingPreempted: SIGTERM arrived and the ranks wrote a checkpoint.
        VlmflowError: the error a rank reported, as its own class; else StepFailed with a dead rank's last lines.
    """
    lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
    tails: list[deque[str]] = [deque(maxlen=LAST_LINES) for _ in range(world)]
    reported: list[VlmflowError] = []
    with tempfile.TemporaryDirectory(prefix="vlmflow-ranks-") as meeting:
        ranks = [_start(jobs, rank, world, f"file://{meeting}/rendezvous", threads, lines) for rank in range(world)]
        restore = _forward_sigterm(ranks)
        try:
            alive = world
            failed: int | None = None
            while alive:
                rank, line = lines.get()
                if line is None:
                    alive -= 1
                    if ranks[rank].wait() not in (0, PREEMPTED) and failed is None:
                        failed = rank
                        _kill(ranks)
                elif line.startswith(EVENT):
                    event = json.loads(line[1:])
                    if event["event"] == "error":
                        reported.append(_error(event))
                    else:
                        on_event(event)
                elif line.strip():
                    tails[rank].append(line.rstrip())
        finally:
            _kill(ranks)
            restore()
    if reported:
        raise reported[0]
    if failed is not None:
        raise StepFailed(_death(failed, world, ranks[failed].returncode, tails[failed]))
    if any(process.returncode == PREEMPTED for process in ranks):
        raise TrainingPreempted(
            "training stopped on SIGTERM after writing a checkpoint; run the step again to continue"
        )


def _start(
    jobs: list[Path], rank: int, world: int, rendezvous: str, threads: int, lines: queue.Queue
) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmflow.training.worker", *map(str, jobs)],
        env=rank_environment(rank, world, rendezvous, threads),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put((rank, line))
        lines.put((rank, None))

    threading.Thread(target=read, daemon=True, name=f"rank-{rank}").start()
    return process


def _kill(ranks: list[subprocess.Popen]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.kill()


def _forward_sigterm(ranks: list[subprocess.Popen]) -> Callable[[], None]:
    """Pass SIGTERM on to the ranks while they run; only the main thread may install handlers."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def forward(*_: Any) -> None:
        for process in ranks:
            if process.poll() is None:
                process.terminate()

    before = signal.signal(signal.SIGTERM, forward)

    def restore() -> None:
        signal.signal(signal.SIGTERM, before)

    return restore


def _error(event: dict[str, Any]) -> VlmflowError:
    kind = getattr(errors, event["kind"], StepFailed)
    return kind(event["message"])


def _death(rank: int, world: int, code: int, tail: deque[str]) -> str:
    how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (often: the machine ran out of memory)" if code == -signal.SIGKILL else ""
    text = "\n  ".join(tail) or "(it printed nothing)"
    return f"training rank {rank} of {world} {how}{hint}; all ranks were stopped. Its last lines:\n  {text}"
