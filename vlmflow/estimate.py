"""How long a run will still take: remembered seconds of each step, corrected by the speed of this run.

The first run of a recipe has no memory and uses `FIRST_RUN_SECONDS`, a rough guess for the tiny recipe on two cores that
is never stored or shown as a measurement; the speed of the run at hand scales all of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmflow.recipe import Recipe

LANES = 2  # tasks of a loop that kfp.local runs at a time (platform.md 1.2, L8)
FIRST_RUN_SECONDS = {
    "preflight": 1, "pull": 4, "initial": 4, "train-bootstrap": 85, "groups": 1, "ocr-1": 11, "caption-1": 7,
    "fuse-1": 1, "build-1": 1, "clean-1": 2, "perplexity-1": 9, "merge": 1, "ocr": 1, "caption": 1, "fuse": 1, "build": 1,
    "clean": 1, "perplexity": 1, "dedup": 1, "keep": 1, "deal": 1, "train-ocr": 11, "train-align": 7, "plan": 1, "train-sft": 30, "soup": 9,
    "lineup": 1, "evaluate": 18, "register": 2, "export": 8, "report": 1, "finish": 1,
}  # fmt: skip
UNKNOWN_SECONDS = 10.0
PRIOR = 0.1  # share of the whole that must be seen before this run's speed outweighs the remembered one
FOUND_AGAIN = 0.25  # a step that took less than this share of its expectation found finished work: no measure of speed
CREEP = 0.1  # share of a step that its clock may run ahead of its counter, which stands still while a model loads
LEAP = 0.25  # and its counter ahead of its clock: a step may have many counters, one after the other
LABEL_END = 0.9  # a finished counter inside a step counts as this much of the step: something always follows it


@dataclass(frozen=True)
class Planned:
    """A step that is expected: `seconds` alone on the machine's clock, `lanes` steps of its kind at a time."""

    name: str
    seconds: float
    lanes: int = 1

    @property
    def work(self) -> float:
        """Seconds of the run's clock that the step stands for."""
        return self.seconds / self.lanes


LAYERS = ("ocr", "caption", "fuse", "build", "clean", "perplexity")  # in a group and, sealing, over all shards


def expected_steps(
    recipe: Recipe, evaluators: int, memory: Mapping[str, float], pipeline: str = "points", groups: int = 1
) -> list[Planned]:
    """The steps of a pipeline for a recipe, in order, with `groups` of shards; models are evaluated by `evaluators` tasks, and as
    many tasks of a loop run at a time. Of the smaller pipelines, those that an earlier run had."""
    if pipeline not in ("points", "curate"):
        return [Planned(name, seconds) for name, seconds in memory.items()]
    numbers = range(1, groups + 1)
    names: list[tuple[str, int]] = [("preflight", 1), ("pull-seed", 1), ("deal-web", 1)]
    names += [(f"pull-web-{n}", min(evaluators, groups)) for n in numbers]
    names += [(name, 1) for name in ("pull-web", "pull-sft", "initial", "train-bootstrap", "groups")]
    names += [(f"{layer}-{n}", min(evaluators, groups)) for n in numbers for layer in LAYERS]
    names += [(name, 1) for name in ("merge", *LAYERS, "dedup", "keep")]
    if pipeline == "points":
        candidates = list(recipe.soup.candidates) if recipe.soup else []
        names += [(name, 1) for name in ("train-ocr", "train-align", "plan")]
        names += [(f"train-sft-{name}", min(evaluators, len(candidates))) for name in candidates]
        names += [("soup", 1), ("lineup", 1)]
        names += [(f"evaluate-{i}", evaluators) for i in range(1, evaluators + 1)]
        names += [(n, 1) for n in ("register", "export", "report")]
    names.append(("finish", 1))
    return [Planned(name, memory.get(name, first_run_seconds(name)), lanes) for name, lanes in names]


def first_run_seconds(name: str) -> float:
    """Seconds for a step nobody has seen yet: by its name, or by the longest table entry that begins it."""
    matches = [kind for kind in FIRST_RUN_SECONDS if name == kind or name.startswith(f"{kind}-")]
    return float(FIRST_RUN_SECONDS[max(matches, key=len)]) if matches else UNKNOWN_SECONDS


@dataclass
class _Running:
    started: float
    label: str = ""
    floor: float = 0.0  # share done before the counter at hand
    share: float | None = None  # None: no counter seen, judge by time


@dataclass
class Estimate:
    """Follows a run by its events and says how much is done and left. Times are in seconds of one clock."""

    plan: list[Planned]
    ended: dict[str, float] = field(default_factory=dict)
    running: dict[str, _Running] = field(default_factory=dict)
    began: float | None = None

    def event(self, event: Mapping[str, Any], now: float) -> None:
        """Take in one progress event."""
        name, state = str(event.get("step", "")), event.get("state")
        self.began = now if self.began is None else self.began
        if state == "start":
            self.running[name] = _Running(now)
            if name not in {step.name for step in self.plan}:
                self.plan.append(Planned(name, first_run_seconds(name)))
        elif state in ("end", "failed"):
            at = self.running.pop(name, None)
            if state == "end":
                self.ended[name] = float(event.get("seconds") or (now - at.started if at else 0.0))
        elif state == "progress" and name in self.running and event.get("total"):
            step = self.running[name]
            if event.get("label") != step.label:
                step.label, step.floor = str(event.get("label")), step.share or 0.0
            ratio = min(1.0, float(event.get("done", 0)) / float(event["total"]))
            step.share = max(step.share or 0.0, step.floor + (LABEL_END - step.floor) * ratio)

    def work(self) -> float:
        """Expected seconds of the whole run."""
        return sum(step.work for step in self.plan)

    def done(self, now: float) -> float:
        """Expected seconds of what is done."""
        total = 0.0
        for step in self.plan:
            if step.name in self.ended:
                total += step.work
            elif at := self.running.get(step.name):
                by_time = min(LABEL_END, (now - at.started) / step.seconds) if step.seconds > 0 else LABEL_END
                counted = by_time if at.share is None else min(at.share, by_time + LEAP)
                total += step.work * max(counted, min(by_time, counted + CREEP))
        return total

    def share(self, now: float) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.done(now) / self.work() if self.work() else 0.0

    def left(self, now: float) -> float:
        """Seconds left: what is not done yet, times how much slower than expected this run has been so far."""
        if self.began is None:
            return self.work()
        done, prior = self.done(now), max(5.0, PRIOR * self.work())
        again = [s for s in self.plan if self.ended.get(s.name, s.seconds) < FOUND_AGAIN * s.seconds]
        worked = done - sum(step.work for step in again)
        took = now - self.began - sum(self.ended[step.name] / step.lanes for step in again)
        return max(0.0, self.work() - done) * (max(0.0, took) + prior) / (worked + prior)


def recall(path: Path, recipe: str) -> dict[str, float]:
    """Remembered seconds a step of a recipe; empty when there is no (readable) memory."""
    try:
        return {str(k): float(v) for k, v in json.loads(path.read_text())[recipe].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def remember(path: Path, recipe: str, ended: Mapping[str, float]) -> None:
    """Store a run's seconds. A step that found its finished work again took no time: it at most halves the memory."""
    from vlmflow import storage

    try:
        whole = json.loads(path.read_text())
        whole = whole if isinstance(whole, dict) else {}
    except (OSError, ValueError):
        whole = {}
    old = recall(path, recipe)
    whole[recipe] = old | {name: round(max(seconds, old.get(name, 0.0) / 2), 2) for name, seconds in ended.items()}
    storage.write_json(str(path.absolute()), whole)


def human(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
