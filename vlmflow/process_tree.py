"""End a process with everything it started, also children that moved to sessions of their own (torchrun's workers do).

Linux only: reads /proc. Used by the local runner, whose tasks are shells that start Python that starts trainers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1  # prctl(2)


def descendants(pid: int) -> list[int]:
    """Pids of all living processes below `pid`, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := stat(int(entry))) and fields[0] not in "ZX":
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, open_ = [], [pid]
    while open_:
        below = children.get(open_.pop(0), [])
        found += below
        open_ += below
    return found


def stop(pids: list[int], grace: float) -> None:
    """SIGTERM, then SIGKILL to those that live after `grace` seconds. A pid that was given away meanwhile is spared."""
    starts = {pid: fields[19] for pid in pids if (fields := stat(pid))}

    def alive() -> list[int]:
        return [p for p, s in starts.items() if (f := stat(p)) and f[19] == s and f[0] not in "ZX"]

    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        for pid in alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        limit = time.monotonic() + seconds
        while alive() and time.monotonic() < limit:
            time.sleep(POLL_SECONDS)


def with_variable(name: str, prefix: str) -> list[int]:
    """Pids of our own processes whose environment variable `name` begins with `prefix`, without this process."""
    wanted = f"{name}={prefix}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
                if any(variable.startswith(wanted) for variable in variables):
                    found.append(int(entry))
    return found


def die_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when its parent ends, however that happens."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the request was in place
        os.kill(os.getpid(), signal.SIGTERM)


def stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state letter on: 0 state, 1 parent, 19 start time in ticks (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    return text[text.rindex(")") + 2 :].split()
