"""Worker processes that read text, each image at most killing its own: a step must survive what kills or hangs OpenCV or ONNX
Runtime.

A process that dies (segmentation fault, out of memory, kill -9) loses its chunk of samples, never the step: a new process takes
its place, the chunk is halved until one sample is left, and that one is tried once more with every other process idle, so that
memory is not what it lacks. Dead again, it gets a row with the reason. A process that gives no answer in time is killed, and its
samples are read one by one; the one that is late again gets a row with the reason. Only when one sample after the other ends so,
and nothing succeeds between, the machine is to blame and the step stops.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmflow.curation.ocr_engine import Crop, Line, Reader, Settings
from vlmflow.curation.ocr_text import language
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError, ServiceError, StepFailed

CHUNK = {"cpu": 4, "cuda": 32}  # samples handed to a process at a time; their crops are recognised together
GIVEN_UP = 3  # samples in a row that kill their process, alone on the machine, before the step gives up

Span = dict[str, list[int]]  # (offset, length) of a sample's members in the tar
Chunk = list[tuple[str, Span]]
Row = dict[str, Any]


class Died(Exception):
    """A worker process ended without an answer; the text says how."""


class Stuck(Died):
    """A worker process gave no answer in time and was killed."""


class Workers:
    """`count` processes, started with their first chunk. Use as a context; `read` may be called from several threads.

    `make` is what a process reads with, made there once. `timeout`: seconds that an image may take.
    """

    def __init__(
        self, count: int, settings: Settings, max_pixels: int, timeout: float,
        make: Callable[[Settings], Reader] = Reader,
    ) -> None:  # fmt: skip
        self.count, self.chunk, self._timeout = count, CHUNK[settings.provider], timeout
        self._idle: queue.Queue[_Worker] = queue.Queue()
        for _ in range(count):
            self._idle.put(_Worker(settings, max_pixels, make))
        self._threads = ThreadPoolExecutor(count)
        self._alone = threading.Lock()
        self._given_up = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def start(self) -> list[int]:
        """Start every process now instead of with its first chunk; their process ids. Raises ServiceError as `read` does."""
        held = [self._idle.get() for _ in range(self.count)]
        try:
            return [worker.start() for worker in held]
        finally:
            for worker in held:
                self._idle.put(worker)

    def read(self, reader: ShardReader) -> Iterator[Row]:
        """Rows of one shard, in order.

        Raises:
            StepFailed: every sample kills the process that reads it, or holds it beyond the timeout.
            ServiceError: a process cannot load the models.
        """
        keys = reader.keys()
        size = self.chunk
        chunks = [[(key, reader.index[key]) for key in keys[i : i + size]] for i in range(0, len(keys), size)]
        # the largest first: a dense page costs fifty times a photograph, and the last one alone would keep others waiting
        order = sorted(
            range(len(chunks)), key=lambda n: -sum(span[1] for _, spans in chunks[n] for span in spans.values())
        )
        futures = {n: self._threads.submit(self._rows, str(reader.path), chunks[n]) for n in order}
        try:
            for n in range(len(chunks)):
                yield from futures[n].result()
        finally:
            for future in futures.values():
                future.cancel()

    def _rows(self, path: str, chunk: Chunk) -> list[Row]:
        worker = self._idle.get()
        try:
            rows = worker.rows(path, chunk, self._patience(chunk))
            self._given_up = 0
            return rows
        except Died as death:
            end = death
        finally:
            self._idle.put(worker)
        stuck = isinstance(end, Stuck)
        if len(chunk) == 1:
            return self._late(chunk, end) if stuck else self._last_try(path, chunk)
        size = 1 if stuck else -(-len(chunk) // 2)  # one by one: every try of what hangs takes the whole time
        return [row for start in range(0, len(chunk), size) for row in self._rows(path, chunk[start : start + size])]

    def _patience(self, chunk: Chunk) -> float:
        """Seconds to wait for a chunk: what its sample with most images may take. A chunk that is only slow is read again one
        sample at a time."""
        return self._timeout * max(1, *(len(spans.keys() - {"json"}) for _, spans in chunk))

    def _late(self, chunk: Chunk, end: Died) -> list[Row]:
        with self._alone:
            self._count(
                f"gave no answer within their time ({end})",
                "Give the step a faster machine or fewer workers, raise curation.ocr.timeout or lower curation.ocr.limit_side.",
            )
        return [_dead(chunk, f"reading it takes too long: {end}")]

    def _count(self, what: str, todo: str) -> None:
        """One more sample given up. Raises StepFailed when it is one too many in a row."""
        self._given_up += 1
        if self._given_up >= GIVEN_UP:
            raise StepFailed(f"ocr: the last {self._given_up} samples each {what}. {todo}")

    def _last_try(self, path: str, chunk: Chunk) -> list[Row]:
        """One sample that killed its process, read once more while every other process waits."""
        with self._alone:
            held = [self._idle.get() for _ in range(self.count)]
            try:
                rows = held[0].rows(path, chunk, self._patience(chunk))
            except Died as death:
                self._count(
                    f"ended the process that read them, alone on the machine ({death})",
                    "A large page needs up to 2.3 GB: give the step more memory or lower curation.ocr.limit_side.",
                )
                return [_dead(chunk, f"reading it ends the process: {death}")]
            finally:
                for worker in held:
                    self._idle.put(worker)
        self._given_up = 0
        return rows


class _Worker:
    """One process and the pipe to it; started when it is first needed and again after it died."""

    def __init__(self, settings: Settings, max_pixels: int, make: Callable[[Settings], Reader]):
        self._arguments = (settings, max_pixels, make)
        self._process: Any = None
        self._pipe: Any = None

    def rows(self, path: str, chunk: Chunk, patience: float) -> list[Row]:
        """Rows of some samples of a local tar. Raises Died, Stuck when they take longer than `patience` seconds (loading the
        models not counted), or ServiceError when the models cannot be loaded."""
        try:
            self.start()
            self._pipe.send((path, chunk))
            if not self._pipe.poll(patience):
                self.stop()
                raise Stuck(f"no answer after {patience:g} s")
            return self._pipe.recv()
        except (EOFError, OSError):  # OSError: the pipe broke while sending
            raise Died(self._end()) from None

    def start(self) -> int:
        """The id of the process, started if there is none."""
        import multiprocessing

        if self._process is not None:
            return self._process.pid
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        failed = self._pipe.recv()
        if failed:
            self.stop()
            raise ServiceError(failed)
        return self._process.pid

    def _end(self) -> str:
        self._process.join()
        code = self._process.exitcode
        self._process = None
        self._pipe.close()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"

    def stop(self) -> None:
        """End the process at once; what it was doing is lost."""
        if self._process is not None:
            self._process.kill()
            self._end()


def _serve(pipe: Any, settings: Settings, max_pixels: int, make: Callable[[Settings], Reader]) -> None:
    """A worker process: load the models, answer chunks, and end with the parent whatever kills it."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    try:
        reader = make(settings)
    except ServiceError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    while True:
        try:
            path, chunk = pipe.recv()
        except EOFError:
            return
        pipe.send(read_chunk(reader, Path(path), chunk, max_pixels))


@dataclass
class _Picture:
    """One image on its way: where it lies in the tar, and what became of it."""

    sample: int
    number: int
    span: list[int]
    error: str | None = None
    crops: list[Crop] = field(default_factory=list)
    text: str = ""
    lines: list[Line] = field(default_factory=list)


def read_chunk(reader: Reader, path: Path, chunk: Chunk, max_pixels: int) -> list[Row]:
    """Rows of some samples of a local tar. Images are decoded a few at a time; all their crops are recognised together."""
    from vlmflow.vision.image import decode

    spans = [[span for name, span in members.items() if name != "json"] for _, members in chunk]
    pictures = [_Picture(s, n, span) for s, mine in enumerate(spans) for n, span in enumerate(mine)]
    with open(path, "rb") as file:

        def decoded(some: list[_Picture]) -> list[Any]:
            return [decode(os.pread(file.fileno(), p.span[1], p.span[0]), max_pixels) for p in some]

        for start in range(0, len(pictures), reader.pictures):
            group = pictures[start : start + reader.pictures]
            images = _each(group, decoded, group)
            whole = [picture for picture in group if picture.error is None]
            found = _each(whole, reader.detect, [i for i in images if i is not None])
            for picture, crops in zip(whole, found, strict=True):
                picture.crops = crops or []
    whole = [picture for picture in pictures if picture.error is None]
    for picture, page in zip(whole, _each(whole, reader.recognise, [p.crops for p in whole]), strict=True):
        picture.text, picture.lines = page or ("", [])
    return [_row(key, [p for p in pictures if p.sample == sample]) for sample, (key, _) in enumerate(chunk)]


def _each(pictures: list[_Picture], step: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Any]:
    """`step` on all items at once, or one by one when that fails: a failed picture gets its error and None."""
    try:
        return step(items) if items else []
    except Exception as error:  # OpenCV and ONNX Runtime raise their own kinds; one image must not stop the others
        if len(items) > 1:
            return [_each([p], step, [item])[0] for p, item in zip(pictures, items, strict=True)]
        reason = str(error) if isinstance(error, DataError) else type(error).__name__
        pictures[0].error = f"image {pictures[0].number}: {reason}"
        return [None]


def _dead(chunk: Chunk, error: str) -> Row:
    """The row of a sample that is given up."""
    return _row(chunk[0][0], [_Picture(0, 0, [], error=error)])


def _row(key: str, pictures: list[_Picture]) -> Row:
    row: Row = {"key": key, "text": "", "lines": [], "score": None, "language": None}
    if error := next((p.error for p in pictures if p.error), None):
        return {**row, "error": error}
    lines = [{"image": p.number, **line} for p in pictures for line in p.lines]
    text = "\n".join(p.text for p in pictures if p.text)
    score = round(sum(line["score"] for line in lines) / len(lines), 4) if lines else None
    return {**row, "text": text, "lines": lines, "score": score, "language": language(text), "error": None}
