"""Time as the launcher sees it; a test has its own, in which an hour of queueing passes at once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable


class Clock:
    """Monotonic seconds and a sleep that a request to stop ends early.

    Args:
        stop: set from outside (SIGTERM).
        chance: numbers in [0, 1) for jitter, so that many launchers do not ask at the same moment.
    """

    def __init__(self, stop: threading.Event | None = None, chance: Callable[[], float] = random.random) -> None:
        self.stop = stop or threading.Event()
        self.chance = chance

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        self.stop.wait(seconds)

    def pause(self, seconds: float) -> None:
        """Sleep between 0.8 and 1.2 times ``seconds``."""
        self.sleep(seconds * (0.8 + 0.4 * self.chance()))
