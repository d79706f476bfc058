"""Threads that fetch and prepare data in the background, in order, without ever holding up the end of the process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """Daemon threads that run functions in the order they were given.

    The standard library's pool joins its threads when the interpreter ends, so that a read that hangs would hang the exit.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._count = count
        self._closed = threading.Event()
        for number in range(count):
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """The future of ``function()``; cancelled when the workers were closed before it began."""
        future: Future[T] = Future()
        if self._closed.is_set():
            future.cancel()
        else:
            self._tasks.put((future, function))
        return future

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function = task
            if self._closed.is_set():
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def close(self) -> None:
        """Cancel what has not begun and let the threads end; returns at once."""
        self._closed.set()
        for _ in range(self._count):
            self._tasks.put(None)
