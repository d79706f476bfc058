"""Room in the scratch cache: what was used longest ago goes when the disk, or a stated limit, runs short.

A dataset is larger than a node's disk, and every step copies shards from the store. Whoever reads a file for longer than a
moment holds it (`hold`); a held file is never removed, nor is one that was asked for within the last minutes.

``VLMFLOW_SCRATCH_LIMIT``: bytes that the cache may take, such as ``200Gi``; without it, a tenth of the disk stays free.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from vlmflow.errors import RecipeError

VARIABLE = "VLMFLOW_SCRATCH_LIMIT"
FREE_SHARE = 0.1  # of the disk, where no limit is stated
GRACE = 600.0  # seconds for which a file stays after it was asked for: between its path and its opening nobody holds it
_UNITS = {"": 1, **{f"{letter}i": 1 << 10 * power for power, letter in enumerate("KMGT", 1)}}


def hold(path: str | Path) -> int:
    """An open descriptor of a cached file, which stays until the descriptor is closed (in every process that has it)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):  # file systems without locks: the grace has to do
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def touch(path: Path) -> None:
    """The file was asked for now."""
    with suppress(OSError):
        os.utime(path)


def trim(folder: Path, limit: int | None = None, grace: float = GRACE) -> list[str]:
    """Remove files of a cache folder, oldest use first, until the limit is kept; returns their names.

    Args:
        limit: bytes; None = what the environment says, or a tenth of the disk free.

    Raises:
        RecipeError: the environment's limit is no size.
    """
    limit = stated_limit() if limit is None else limit
    if limit is None:
        disk = shutil.disk_usage(folder)
        excess = int(disk.total * FREE_SHARE) - disk.free
        if excess <= 0:
            return []
        files = _files(folder)
    else:
        files = _files(folder)
        excess = sum(size for _, size, _ in files) - limit
    removed, now = [], time.time()
    for used, size, path in sorted(files):
        if excess <= 0 or now - used < grace:
            break
        if remove_unheld(path):
            removed.append(path.name)
            excess -= size
    return removed


def stated_limit() -> int | None:
    """``VLMFLOW_SCRATCH_LIMIT`` in bytes; None when it is not set. Raises RecipeError when it is no size."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    found = re.fullmatch(r"(\d+)\s*([KMGT]i)?", text)
    if not found:
        raise RecipeError(f"{VARIABLE} is '{text}', which is no size; write bytes, or a number with Ki, Mi, Gi or Ti")
    return int(found[1]) * _UNITS[found[2] or ""]


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, path) of every whole file; those that vanish meanwhile are left out."""
    found = []
    for entry in os.scandir(folder):
        with suppress(OSError):
            if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                about = entry.stat(follow_symlinks=False)
                found.append((about.st_mtime, about.st_size, Path(entry.path)))
    return found


def remove_unheld(path: Path) -> bool:
    """Remove a file unless somebody holds it; whether it is gone by this call."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
