"""Answers that were paid for or fetched, kept until the layer part that holds them is written.

A part is written when its whole shard is done; a kill before that would pay for every answer of the shard again. So
each answer is appended to a local file at once, and every 256 answers or 15 seconds the new ones become an object in the
store, where another machine finds them. A journal is named like the part it serves, ``LAYER/DIGEST/SHARD``: a changed
parameter never meets old answers, and a journal whose part exists is known to be spent.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from vlmflow import storage
from vlmflow.digest import digest
from vlmflow.storage_file import translated

if TYPE_CHECKING:
    from vlmflow.step import Context

FOLDER = "journal"
CHUNK = 256  # answers after which they are put into the store ...
SECONDS = 15.0  # ... or after this time, whichever comes first


class Journal:
    """Answers by key; safe to use from several threads, and beside other writers of the same name.

    Args:
        name: ``LAYER/DIGEST/SHARD`` of the layer part that the answers are for.
    """

    def __init__(self, ctx: Context, name: str) -> None:
        self.name = name
        self._local = _local_folder(ctx) / f"{name}.jsonl"
        self._stored = storage.join(ctx.root, FOLDER, name)
        self._lock, self._file = Lock(), -1
        self._fresh: list[bytes] = []
        self._since = time.monotonic()
        self._writer = secrets.token_hex(4)  # chunks of two writers lie side by side
        self._chunks = 0
        self._uploads = ThreadPoolExecutor(1, "journal")
        self._putting: list[Future[None]] = []

    def found(self) -> dict[str, Any]:
        """All answers that this or another attempt has written down, here or in the store."""
        answers: dict[str, Any] = {}
        for chunk in storage.list_uris(self._stored):
            answers.update(_lines(storage.read_bytes(chunk.uri)))
        if self._local.exists():
            answers.update(_lines(self._local.read_bytes()))
        return answers

    def add(self, key: str, value: Any) -> None:
        """Write down one answer (anything JSON can hold); it survives a kill from here on.

        Raises:
            NoSpace, StorageError: the local disk or, some answers later, the store refused.
        """
        line = json.dumps([key, value]).encode() + b"\n"
        with self._lock, translated(str(self._local), writing=len(line)):
            if self._file < 0:
                self._file = _open(self._local)
            if (written := os.write(self._file, line)) != len(line):
                os.write(self._file, line[written:])
            self._fresh.append(line)
            if len(self._fresh) >= CHUNK or time.monotonic() - self._since >= SECONDS:
                self._put()
        for put in [p for p in self._putting if p.done()]:
            self._putting.remove(put)
            put.result()

    def _put(self) -> None:
        uri = storage.join(self._stored, f"{self._chunks:05d}-{self._writer}.jsonl")
        self._putting.append(self._uploads.submit(storage.write_bytes, uri, b"".join(self._fresh)))
        self._chunks += 1
        self._fresh, self._since = [], time.monotonic()

    def close(self, done: bool = True) -> None:
        """`done`: the part is written, so forget the answers; else bring the last ones to the store."""
        with self._lock:
            if not done and self._fresh:
                self._put()
            self._uploads.shutdown(wait=True)
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
        for put in self._putting:
            put.result()
        if done:
            _delete(self._local, self._stored)


def sweep(ctx: Context, layer: str) -> int:
    """Delete journals of a layer whose parts exist (a kill came between the two); returns how many there were."""
    root = _local_folder(ctx)
    chunks = storage.list_uris(storage.join(ctx.root, FOLDER, layer))
    names = {"/".join(chunk.uri.split("/")[-4:-1]) for chunk in chunks}
    names |= {str(path.relative_to(root).with_suffix("")) for path in (root / layer).glob("*/*.jsonl")}
    spent = [name for name in sorted(names) if storage.exists(storage.join(ctx.root, "layers", name + ".parquet"))]
    for name in spent:
        _delete(root / f"{name}.jsonl", storage.join(ctx.root, FOLDER, name))
    return len(spent)


def _local_folder(ctx: Context) -> Path:
    """One folder a store: two stores may hold the same shard."""
    return Path(ctx.scratch) / FOLDER / digest(ctx.root)[:8]


def _open(path: Path) -> int:
    """Open for appending; a line that a kill or a full disk left unfinished is ended first, so that it spoils no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")
    return file


def _lines(data: bytes) -> Iterator[tuple[str, Any]]:
    for line in data.splitlines():
        with suppress(ValueError):
            match json.loads(line):
                case [str(key), value]:
                    yield key, value


def _delete(local: Path, stored: str) -> None:
    for chunk in storage.list_uris(stored):
        storage.delete(chunk.uri)
    local.unlink(missing_ok=True)
