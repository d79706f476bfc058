"""Processes that outlive the command that started them: know one again, measure it, stop it, and never hit another.

A pid alone is not an identity, because the system hands it out again. A mark is pid + start time (+ boot), read from
/proc, so a stale pid file can never get a stranger killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vlmflow import process_tree

STOP_SECONDS = 10.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Mark:
    """Identity of a process: `started` is clock ticks since boot (proc(5), stat field 22), `boot` the boot's id.

    `folder` is the working directory it was started in; its children are known by it when the process itself is gone.
    """

    pid: int
    started: int
    boot: str
    folder: str


def write_private(path: Path, text: str) -> None:
    """Write a file atomically with mode 0600 from its first byte on."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp creates with 0600
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_mark(path: Path, pid: int, folder: Path) -> None:
    """Remember a process that was just started in `folder`, as the leader of its own session."""
    stat = _stat(pid)
    data = {"pid": pid, "started": stat[1] if stat else 0, "boot": _boot(), "folder": str(folder)}
    write_private(path, json.dumps(data))


def read_mark(path: Path) -> Mark | None:
    """The remembered process, or None when nothing (readable) is remembered."""
    try:
        data = json.loads(path.read_text())
        return Mark(
            pid=int(data["pid"]), started=int(data["started"]), boot=str(data["boot"]), folder=str(data["folder"])
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def alive(mark: Mark) -> bool:
    """True when exactly that process runs: same pid, same start time, same boot, and not a zombie."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(mark.pid, os.WNOHANG)  # reap it when it is our own dead child
    stat = _stat(mark.pid)
    return stat is not None and stat[0] not in "ZX" and stat[1] == mark.started and mark.boot == _boot()


def stop_session(mark: Mark) -> None:
    """End the marked process and what it started in its session: SIGTERM, then SIGKILL after 10 s.

    A process that has the pid but not the start time is a stranger and is left alone. When the marked process died
    and its children live on, they are ended too: they are in its session and work in its folder.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _members(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        limit = time.monotonic() + STOP_SECONDS
        while _members(mark) and time.monotonic() < limit:
            time.sleep(POLL_SECONDS)
        if not _members(mark):
            return


def session_rss(session: int) -> int:
    """Resident memory in bytes of all processes of a session (shared pages counted once per process)."""
    total = 0
    page = os.sysconf("SC_PAGE_SIZE")
    for pid in _pids():
        try:
            if os.getsid(pid) == session:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue
    return total


def _members(mark: Mark) -> list[int]:
    """Live processes of the marked session; empty when the session id belongs to a stranger by now."""
    leader = alive(mark)
    stat = _stat(mark.pid)
    if mark.boot != _boot() or (stat is not None and stat[1] != mark.started):
        return []
    found = [mark.pid] if leader else []
    for pid in _pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, FileNotFoundError):
            stat = _stat(pid)
            if pid == mark.pid or stat is None or stat[0] in "ZX" or os.getsid(pid) != mark.pid:
                continue
            if leader or os.readlink(f"/proc/{pid}/cwd") == mark.folder:
                found.append(pid)
    return found


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start time in ticks) of a process, or None when there is none."""
    fields = process_tree.stat(pid)
    return (fields[0], int(fields[19])) if fields else None


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
