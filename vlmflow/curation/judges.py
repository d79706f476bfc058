"""Bodies become accepted images or refusals, in threads, several at a time.

Handing one body to a thread costs about as much as hashing it, so a thread takes all that wait (up to a number) at once:
at low load that is one, at full speed many. Pillow and the hash release the interpreter's lock while they work. Threads that
take turns at the lock cost more than they bring where a body needs a tenth of a millisecond: a further one starts only when
`patience` bodies wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

BATCH = 16


class Judges:
    """`await judge(work, *arguments)`: the result of `work(*arguments)`, computed in one of `threads` threads of `pool`.

    Args:
        patience: calls that wait before a thread starts beside those at work; 0 = every thread at once.
    """

    def __init__(self, pool: Executor, threads: int, patience: int = 0) -> None:
        self._pool, self._free, self._threads, self._patience = pool, threads, threads, patience
        self._waiting: deque[tuple[Callable[..., Any], tuple[Any, ...], asyncio.Future[Any]]] = deque()
        self._loop = asyncio.get_running_loop()

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        result = self._loop.create_future()
        self._waiting.append((work, arguments, result))
        if self._free and (self._free == self._threads or len(self._waiting) > self._patience):
            self._free -= 1
            self._loop.call_soon(self._start)  # after what else is ready in this turn of the loop
        return result

    def _start(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
        if not batch:
            self._free += 1
            return
        done = self._loop.run_in_executor(self._pool, _all, [(work, arguments) for work, arguments, _ in batch])
        done.add_done_callback(lambda _: self._finish(batch, done))

    def _finish(self, batch: list[Any], done: asyncio.Future[list[Any]]) -> None:
        for (_, _, result), outcome in zip(batch, done.result(), strict=True):
            if result.cancelled():
                continue
            if isinstance(outcome, Exception):
                result.set_exception(outcome)
            else:
                result.set_result(outcome)
        self._start()


def _all(batch: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    results: list[Any] = []
    for work, arguments in batch:
        try:
            results.append(work(*arguments))
        except Exception as error:
            results.append(error)
    return results
