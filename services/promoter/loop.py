"""Reconcile, wait for the period or a wake-up, reconcile again; a failure of one model or one round stops nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from vlmflow.errors import VlmflowError
from vlmflow.registry.promote import Outcome

log = logging.getLogger("vlmflow.promoter")

SOONER = 5.0  # seconds until a failed round is repeated; doubles with each failure, up to the period


@dataclass
class State:
    """What the probes and Prometheus show.

    Attributes:
        rounds: finished rounds; failures: rounds of a model that raised; actions: outcomes by (model, action).
        last_success: clock of the last round in which every model was looked at; 0 = none yet.
    """

    rounds: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    actions: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    last_success: float = 0.0
    last: dict[str, Outcome] = field(default_factory=dict)


class Loop:
    """Runs in a thread of its own until `stop()`.

    Args:
        look: model -> reconcile one model (raises VlmflowError).
        after: called with each promotion; must be idempotent, it is repeated until it succeeds.
        period: seconds between rounds.
    """

    def __init__(
        self,
        models: list[str],
        look: Callable[[str], Outcome],
        after: Callable[[Outcome], None],
        period: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.models, self.look, self.after, self.period, self.clock = models, look, after, period, clock
        self.state = State()
        self._began, self._failed = clock(), 0
        self._followed: dict[str, str] = {}
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)

    def start(self) -> None:
        """Begin; the first round starts at once."""
        self._thread.start()

    def wake(self) -> None:
        """Start the next round now; several wake-ups during a round make one more round."""
        self._wake.set()

    def stop(self) -> None:
        """End after the round in progress."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        """The thread has not died."""
        return self._thread.is_alive()

    def ready(self) -> bool:
        """A round succeeded within the last three periods, or the first three are not over: in a new installation the
        bootstrap makes this promoter's identity when all pods are ready, so that waiting for a success would never end."""
        return self.clock() - (self.state.last_success or self._began) < max(3 * self.period, 60)

    def round(self) -> bool:
        """Look at every model once; returns whether all went well."""
        well = True
        for model in self.models:
            try:
                outcome = self.look(model)
                self.state.last[model] = outcome
                self.state.actions[model, outcome.action] += 1
                level = logging.INFO if outcome.action == "promoted" else logging.DEBUG
                log.log(
                    level,
                    "%s: %s, version %s, candidate %s. %s",
                    model,
                    outcome.action,
                    outcome.version,
                    outcome.candidate,
                    outcome.detail,
                )
                if outcome.version and self._followed.get(model) != outcome.version:
                    self.after(outcome)
                    self._followed[model] = outcome.version
            except VlmflowError as error:
                well = False
                self.state.failures[model] += 1
                log.warning("%s: %s; trying again", model, error)
            except Exception:
                well = False
                self.state.failures[model] += 1
                log.exception("%s: unexpected failure; trying again", model)
        self.state.rounds += 1
        self._failed = 0 if well else self._failed + 1
        if well:
            self.state.last_success = self.clock()
        return well

    def pause(self) -> float:
        """Seconds until the next round."""
        return min(self.period, SOONER * 2.0 ** min(self._failed - 1, 20)) if self._failed else self.period

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            self.round()
            self._wake.wait(self.pause())
