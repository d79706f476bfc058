"""Memory settings of a process that handles many pictures.

Freed picture buffers stay with the process that will want the next one at once.

glibc gives every block above 128 KiB back to the kernel when it is freed, so each picture pays for fresh pages: 0.45 ms of
system time beside 3.9 ms of decoding, shrinking and encoding one of 0.74 megapixels. Other C libraries are left alone.

Python looks for reference cycles every 700 new objects, and now and then among all objects of all imported libraries: a
fifteenth of the time of a pull that keeps originals. Few of its objects are in cycles.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h
KEPT = 4 << 20  # bytes up to which a block is kept; with 16 MiB, the size of Pillow's blocks, threads kept 600 MiB
SPARE = 32 << 20  # bytes at the end of the heap above which it shrinks
CYCLES = (10_000, 20, 50)  # new objects before a look for cycles; a request makes about 50, and may hold 256 KiB in one


@contextmanager
def few_collections() -> Iterator[None]:
    """Look for cycles seldom, and not among what was there before."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*CYCLES)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@cache
def keep_buffers() -> None:
    """Set this once for the process; harmless where it has no effect."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, KEPT)
    mallopt(_M_TRIM_THRESHOLD, SPARE)
