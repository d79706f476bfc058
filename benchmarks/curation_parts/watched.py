"""A command run to its end under watch: CPU time of its process tree, wall time, peak memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.05  # seconds between looks at the memory


@dataclass(frozen=True)
class Watched:
    """`cpu` and `wall` in seconds; `pss` and `largest` in MiB: of the whole tree, and the resident peak of its largest process."""

    cpu: float
    wall: float
    pss: float
    largest: float
    out: str
    code: int


def run(command: list[str], environment: dict[str, str] | None = None, timeout: float = 900.0) -> Watched:
    """Run a command; CPU time counts all children that it waited for."""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            peak[0] = max(peak[0], sum(_pss(pid) for pid in _tree(process.pid)))
            if time.monotonic() - start > timeout:
                os.killpg(process.pid, 9)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    out = process.stdout.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - start
    done.set()
    watcher.join()
    cpu = usage.ru_utime + usage.ru_stime
    return Watched(cpu, wall, peak[0], usage.ru_maxrss / 1024, out, process.returncode)


def _tree(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, left = [], [root]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def _pss(pid: int) -> float:
    """Proportional share of memory of a process in MiB; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0
