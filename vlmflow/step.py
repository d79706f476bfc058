"""The frame around a step: where it writes, how it shows progress, how long it took.

A Kubeflow component opens the frame and calls one library function inside it. Endpoints and credentials come from
the environment (mounted configuration), never from pipeline parameters:
``VLMFLOW_ROOT`` (store prefix), ``VLMFLOW_SCRATCH`` (local cache), ``VLMFLOW_RUN_ID``, ``VLMFLOW_PROGRESS`` (file
that receives progress events as JSON lines).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmflow import storage
from vlmflow.errors import RecipeError, VlmflowError
from vlmflow.recipe import Recipe, load
from vlmflow.storage_file import full_disk

EVENT_INTERVAL = 0.5  # seconds between progress events of one task


def emit(**event: Any) -> None:
    """Append one event to the progress file, if the runner asked for one. A line is written in one call."""
    if path := os.environ.get("VLMFLOW_PROGRESS"):
        line = json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False) + "\n"
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)


class Progress:
    """Counts work done and says so: as events for the runner, else as plain lines on standard error."""

    def __init__(self, step: str, label: str, total: int, unit: str) -> None:
        self.step, self.label, self.total, self.unit = step, label, total, unit
        self.done = 0
        self.text = ""
        self._started = self._shown = time.monotonic()
        self._plain = not os.environ.get("VLMFLOW_PROGRESS") and os.environ.get("VLMFLOW_QUIET") != "1"

    def __enter__(self) -> Progress:
        self._show(force=True)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._show(force=kind is None)

    def advance(self, n: int = 1) -> None:
        """``n`` more units are done."""
        self.done += n
        self._show()

    def note(self, text: str) -> None:
        """A short text shown beside the count (a loss, a rate)."""
        self.text = text

    def _show(self, force: bool = False) -> None:
        now = time.monotonic()
        interval = EVENT_INTERVAL if not self._plain else 5.0
        if not force and now - self._shown < interval:
            return
        self._shown = now
        emit(
            step=self.step,
            label=self.label,
            done=self.done,
            total=self.total,
            unit=self.unit,
            note=self.text,
            state="progress",
        )
        if self._plain and self.done:
            rate = self.done / max(now - self._started, 1e-9)
            left = (self.total - self.done) / rate
            print(
                f"[{self.label}] {self.done}/{self.total} {self.unit}, {left:.0f} s left {self.text}",
                file=sys.stderr,
                flush=True,
            )


@dataclass
class Context:
    """What every step function receives.

    Attributes:
        root: store prefix of all datasets, layers and models, e.g. ``s3://vlmflow``.
        scratch: local disk for caches.
        run_id: names this run in logs and reports; never part of a digest.
        parts_only: the step works on a group of shards: it writes their layer parts and seals no manifest.
    """

    recipe: Recipe
    root: str
    scratch: Path
    run_id: str = "local"
    step: str = ""
    parts_only: bool = False

    def progress(self, label: str, total: int, unit: str = "items") -> Progress:
        """A progress counter; use it as a context manager."""
        return Progress(self.step or label, label, total, unit)

    def notice(self, text: str) -> None:
        """Tell a person something that is neither progress nor an error, e.g. where an interrupted training goes on."""
        emit(step=self.step, state="notice", note=text)
        print(f"[{self.step or 'step'}] {text}", file=sys.stderr, flush=True)


def store_root() -> str:
    """Store prefix of this installation. Raises RecipeError when VLMFLOW_ROOT is not set."""
    root = os.environ.get("VLMFLOW_ROOT")
    if not root:
        raise RecipeError(
            "VLMFLOW_ROOT is not set: it names the store prefix, e.g. s3://vlmflow or file:///data/vlmflow"
        )
    return root


def run_id() -> str:
    """Names this run in logs and reports."""
    return os.environ.get("VLMFLOW_RUN_ID", "local")


def run_folder() -> str:
    """Where timings, report and summary of this run lie in the store. Raises RecipeError without VLMFLOW_ROOT."""
    return storage.join(store_root(), "runs", run_id())


def context(recipe: Recipe, step: str = "") -> Context:
    """A context from the environment. Raises RecipeError when VLMFLOW_ROOT is not set."""
    return Context(recipe, store_root(), storage.default_scratch(), run_id(), step)


def _failed(name: str, error: BaseException, code: int) -> None:
    with suppress(OSError):  # the disk of the events may be the one that is full; the error itself must get out
        emit(step=name, state="failed", note=f"{type(error).__name__}: {error}", code=code)


@contextmanager
def frame(name: str) -> Iterator[None]:
    """Frame of one component: emits start and end, and stores the step's wall time in seconds."""
    emit(step=name, state="start")
    started = time.time()
    try:
        yield
    except VlmflowError as error:
        _failed(name, error, error.exit_code)
        raise
    except Exception as error:
        if (full := full_disk(error)) is not None:
            _failed(name, full, full.exit_code)
            raise full from error
        _failed(name, error, 1)
        raise
    except BaseException as error:
        _failed(name, error, 1)
        raise
    seconds = round(time.time() - started, 3)
    record = {"step": name, "started": round(started, 3), "seconds": seconds}
    storage.write_json(storage.join(run_folder(), "steps", f"{name}.json"), record)
    emit(step=name, state="end", seconds=seconds)


@contextmanager
def open_step(name: str, recipe_path: str | Path) -> Iterator[Context]:
    """`frame` of a component that works by a recipe: loads it and yields the context."""
    with frame(name):
        yield context(load(recipe_path), name)
