"""The ranks of one machine as child processes of this one.

Does what torchrun does, without its import and rendezvous time: environment for each rank, one dead rank ends all, and
the error shows that rank's last lines. SIGTERM is passed on, so that a checkpoint is written before a pod goes away, and
nobody is killed while writing it. On one machine ranks meet at a file (no port to race for); as one of several nodes
(`node`) at the first node's address.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmflow.errors import StepFailed, VlmflowError
from vlmflow.training import failure
from vlmflow.training.job import EVENT, PREEMPTED

LAST_LINES = 25


class TrainingPreempted(StepFailed):
    """Training was asked to stop and left a checkpoint; running the step again goes on from there."""

    exit_code = PREEMPTED


class RankDied(StepFailed):
    """A rank ended without saying why; on several nodes often because another one did."""


@dataclass(frozen=True)
class Node:
    """One machine among those that train together.

    Attributes:
        ranks: processes on this machine.
        nodes: machines with as many processes each.
        number: which of them this one is.
        address: host and port of the first machine; None on a single machine.
    """

    ranks: int
    nodes: int = 1
    number: int = 0
    address: tuple[str, int] | None = None

    @property
    def world(self) -> int:
        """Processes on all machines."""
        return self.ranks * self.nodes


def rank_environment(local: int, node: Node, rendezvous: str, threads: int) -> dict[str, str]:
    """Environment of one rank of this machine."""
    env = {
        **os.environ,
        "RANK": str(node.number * node.ranks + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(node.world),
        "LOCAL_WORLD_SIZE": str(node.ranks),
    }
    if node.address is not None:
        env |= {"MASTER_ADDR": node.address[0], "MASTER_PORT": str(node.address[1])}
    env |= {"VLMFLOW_RENDEZVOUS": rendezvous, "VLMFLOW_LAUNCHER": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    env |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    env.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if node.nodes == 1 and "lo" in (name for _, name in socket.if_nameindex()):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    source = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [env.get("PYTHONPATH")])])
    return env


def launch(
    jobs: Sequence[str | Path],
    ranks: int | Node,
    threads: int,
    on_event: Callable[[dict[str, Any]], None],
    on_line: Callable[[str], None] = lambda _: None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run the ranks of this machine to their end; several jobs run one after another in the same processes.

    Args:
        jobs: URIs or paths of jobs.
        ranks: their number, or this machine's place among several.
        on_event: called with every event of the ranks, in this thread.
        on_line: called with every other line that they write.
        environment: more variables for the ranks.

    Raises:
        TrainingPreempted: SIGTERM arrived and the ranks wrote a checkpoint.
        VlmflowError: the error a rank reported, as its own class; else StepFailed with a dead rank's last lines.
    """
    node = ranks if isinstance(ranks, Node) else Node(ranks)
    lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
    tails: list[deque[str]] = [deque(maxlen=LAST_LINES) for _ in range(node.ranks)]
    reported: list[VlmflowError] = []
    with tempfile.TemporaryDirectory(prefix="vlmflow-ranks-") as meeting:
        rendezvous = f"file://{meeting}/rendezvous" if node.address is None else "env://"
        environments = [
            {**rank_environment(local, node, rendezvous, threads), **(environment or {})} for local in range(node.ranks)
        ]
        started = [_start(jobs, local, env, lines) for local, env in enumerate(environments)]
        stopping, restore = _forward_sigterm(started)
        try:
            alive = node.ranks
            failed: int | None = None
            while alive:
                rank, line = lines.get()
                if line is None:
                    alive -= 1
                    if started[rank].wait() not in (0, PREEMPTED) and failed is None:
                        failed = rank
                        _kill(started)
                elif line.startswith(EVENT):
                    event = json.loads(line[1:])
                    if event["event"] == "error":
                        reported.append(failure.restore(event))
                    else:
                        on_event(event)
                elif line.strip():
                    tails[rank].append(line.rstrip())
                    on_line(line)
        finally:
            _kill(started)
            restore()
    if reported:
        raise reported[0]
    # a rank that SIGTERM met while it was starting had nothing to save
    early = stopping.is_set() and failed is not None and started[failed].returncode == -signal.SIGTERM
    if failed is not None and not early:
        number = node.number * node.ranks + failed
        raise RankDied(_death(number, node.world, started[failed].returncode, tails[failed]))
    if early or any(process.returncode == PREEMPTED for process in started):
        raise TrainingPreempted("training stopped on SIGTERM; run the step again to go on from the newest checkpoint")


def _start(jobs: Sequence[str | Path], rank: int, env: dict[str, str], lines: queue.Queue) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmflow.training.worker", *map(str, jobs)],
        env=env,
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


def _forward_sigterm(ranks: list[subprocess.Popen]) -> tuple[threading.Event, Callable[[], None]]:
    """Pass SIGTERM on to the ranks while they run; returns (whether it came, how to end this). Only the main thread may
    install handlers."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        return stopping, lambda: None

    def forward(*_: Any) -> None:
        stopping.set()
        for process in ranks:
            if process.poll() is None:
                process.terminate()

    before = signal.signal(signal.SIGTERM, forward)

    def restore() -> None:
        signal.signal(signal.SIGTERM, before)

    return stopping, restore


def _death(rank: int, world: int, code: int, tail: deque[str]) -> str:
    how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (often: the machine ran out of memory)" if code == -signal.SIGKILL else ""
    text = "\n  ".join(tail) or "(it printed nothing)"
    return f"training rank {rank} of {world} {how}{hint}; all ranks were stopped. Its last lines:\n  {text}"
