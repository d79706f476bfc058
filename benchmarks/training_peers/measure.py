"""What is counted in a step, by the same rules for every contender."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch

COUNTED = ("tokens", "slots", "squares", "tiles", "targets")


@dataclass
class Steps:
    """Numbers of each optimizer step; the first ``warmup`` steps are left out of every figure.

    ``tokens`` are real ones (neither padding nor the dummy tile's), ``slots`` are the positions computed, ``squares`` the
    sum of squared sample lengths, ``tiles`` the image tiles, ``targets`` the tokens with a loss.
    """

    total: int
    warmup: int
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    _now: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0])
    _started: float = 0.0

    def begin(self) -> None:
        """The clock starts; called once, before the first step."""
        self._started = clock()

    def add(self, lengths: list[int], slots: int, tiles: int, targets: int) -> None:
        """One micro-batch."""
        made = (sum(lengths), slots, sum(n * n for n in lengths), tiles, targets)
        self._now = [a + b for a, b in zip(self._now, made, strict=True)]

    def end(self) -> None:
        """One optimizer step is done."""
        now = clock()
        self.seconds.append(now - self._started)
        for name, value in zip(COUNTED, self._now, strict=True):
            getattr(self, name).append(value)
        self._now = [0, 0, 0, 0, 0]
        self._started = now

    def as_json(self) -> dict[str, Any]:
        """The timed steps and this process's peak memory in MiB."""
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated() / 2**20
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            **{n: getattr(self, n)[self.warmup :] for n in ("seconds", *COUNTED)},
            "memory_mb": round(memory, 1),
            **self.extra,
        }


def clock() -> float:
    """Seconds, after all work on the device is done; of this process alone with ``--cpu-clock``."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() if os.environ.get("VLMFLOW_BENCHMARK_CPU_CLOCK") else time.perf_counter()


def matmul_peak(seconds: float = 0.6) -> float:
    """FLOP/s of the largest fp32 matrix product this machine does with the pinned threads: the CPU's "peak" of MFU."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best, stop = 1e9, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        began = clock()
        a @ b
        best = min(best, clock() - began)
    return 2 * 1024**3 / best
