"""What a person sees while a run goes on: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vlmflow.estimate import Estimate, human

if TYPE_CHECKING:
    from rich.console import Console, Group

PLAIN_INTERVAL = 10.0  # seconds between plain lines about steps under way
BAR = 20  # characters; names, bars and words fit 80 columns
FRAMES = 4  # live frames a second


class Display:
    """Takes progress events; `tick` redraws. The estimate it shows is its `estimate`."""

    def __init__(self, estimate: Estimate, console: Console | None = None) -> None:
        from rich.console import Console

        self.estimate = estimate
        self.console = console or Console(highlight=False)
        self.latest: dict[str, dict[str, Any]] = {}  # running step -> its last progress event
        self._live: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(self._frame(), console=self.console, refresh_per_second=FRAMES, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Take in one event and say when a step begins or ends."""
        now = time.monotonic()
        self.estimate.event(event, now)
        name, state = event.get("step", ""), event.get("state")
        if state == "start":
            self.latest[name] = {}
            if not self._live:
                self._line(f"{name} ...")
        elif state == "progress":
            self.latest[name] = event
        elif state == "notice":
            self._line(f"{name}: {event.get('note', '')}")
        elif state in ("end", "failed"):
            note = self.latest.pop(name, {}).get("note", "")
            if state == "end":
                took = human(self.estimate.ended.get(name, 0.0))
                self._line(f"{name} done in {took}" + (f" ({note})" if note else ""))
            else:
                self._line(f"{name} FAILED")

    def tick(self) -> None:
        """Redraw, or say from time to time what is under way."""
        now = time.monotonic()
        if self._live:
            self._live.update(self._frame())
        elif now - self._said >= PLAIN_INTERVAL:
            for name, event in self.latest.items():
                self._line("  " + _describe(name, event))
            self._said = now

    def _line(self, text: str) -> None:
        now = time.monotonic()
        left = f"{self.estimate.share(now):4.0%}  {human(self.estimate.left(now)):>12} left"
        self.console.print(f"{left}  {text}", markup=False, highlight=False, soft_wrap=True)
        self._said = now

    def _frame(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        table = Table.grid(padding=(0, 2))
        table.add_column(width=22, no_wrap=True, overflow="ellipsis")
        table.add_column(width=BAR)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name, event in list(self.latest.items()):
            total = event.get("total") or 0
            bar = ProgressBar(total=total, completed=event.get("done", 0), width=BAR) if total else Text("")
            table.add_row(Text(f"  {name}", style="cyan"), bar, Text(_describe("", event)))
        share = self.estimate.share(now)
        table.add_row(
            Text("whole run", style="bold"),
            ProgressBar(total=1.0, completed=share, width=BAR),
            Text(f"{share:.0%}  about {human(self.estimate.left(now))} left", style="bold"),
        )
        return Group(table)


def _describe(name: str, event: dict[str, Any]) -> str:
    parts = [name] if name else []
    if event.get("label") and event.get("label") != name:
        parts.append(str(event["label"]))
    if event.get("total"):
        parts.append(f"{event.get('done', 0)}/{event['total']} {event.get('unit', '')}".strip())
    if event.get("note"):
        parts.append(str(event["note"]))
    return "  ".join(parts)
