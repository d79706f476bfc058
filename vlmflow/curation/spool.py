"""What a shard in progress has already: accepted images and verdicts, row by row on local disk.

One file of images, and two append-only files of lines: one an image (where it lies, and what it is), one a refusal. A pull
that was killed finds there all that had landed and fetches only what was in flight. Images are hashed when they are found
again, so a file that was cut (or a disk that lost its last writes) costs a fetch, never a wrong byte. It is also what keeps
memory flat: no image waits in memory for its shard to be complete.

The file of images of a finished shard is written over by a later one (`spare`): fresh pages of a file cost twice what the
bytes do, and their removal once more. What it held before counts for nothing, as no line speaks of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlmflow.digest import sha256_bytes

IMAGES, KEPT, REFUSED = "images", "kept.jsonl", "refused.jsonl"
SPARE = "spare"  # folder beside those of spools
PAGE = 4096  # images begin and end with pages: none is read from disk to be written over in part


@dataclass(frozen=True)
class Spooled:
    """An accepted image: where its bytes lie in the spool, and its entry in ``meta["images"]``."""

    url: str
    offset: int
    length: int
    about: dict[str, Any]


class Spool:
    """The folder of one shard in progress; safe for threads. `found` holds what an earlier attempt left, by URL.

    A folder that another process works in is left to it: this one then works in a folder of its own.

    Args:
        spare: folder of files to be written over, which other spools share; None = every spool makes its own file.
    """

    def __init__(self, folder: Path, spare: Path | None = None) -> None:
        self._lock, self._spare = threading.Lock(), spare
        for number in range(1000):
            self.folder = folder if not number else folder.with_name(f"{folder.name}.{number}")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._kept: IO[bytes] = open(self.folder / KEPT, "a+b", buffering=0)  # noqa: SIM115
            try:
                fcntl.flock(self._kept, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                self._kept.close()
        self._images: IO[bytes] | None = None  # none before the first image
        if (self.folder / IMAGES).exists():
            self._images = self._open()
        self._refused: IO[str] | None = None
        self.found: dict[str, Spooled | tuple[str, str]] = {}
        self._end = self._read_kept()
        self._read_refused()

    def _open(self) -> IO[bytes]:
        path = self.folder / IMAGES
        if self._spare and not path.exists():
            with suppress(FileNotFoundError, StopIteration):  # there is none, or another spool was quicker
                next(self._spare.iterdir()).rename(path)
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)

    def _read_kept(self) -> int:
        """Fill `found`; returns where the next image may begin."""
        end = 0
        self._kept.seek(0)
        for line in self._kept.read().splitlines():
            try:
                image = Spooled(*json.loads(line))
            except (ValueError, TypeError):  # it was cut
                continue
            if sha256_bytes(self.read(image)) == image.about["sha256"]:
                self.found[image.url] = image
                end = max(end, image.offset + image.length)
        return -(-end // PAGE) * PAGE

    def _read_refused(self) -> None:
        path = self.folder / REFUSED
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                url, reason, detail = json.loads(line)
            except (ValueError, TypeError):
                continue
            self.found.setdefault(url, (reason, detail))

    def keep(self, url: str, data: bytes, about: dict[str, Any]) -> Spooled:
        """Add an accepted image. Raises OSError when the disk is full."""
        padding = bytes(-len(data) % PAGE)
        with self._lock:
            if self._images is None:
                self._images = self._open()
            image = Spooled(url, self._end, len(data), about)
            line = b"\n" + json.dumps([url, image.offset, image.length, about]).encode()  # the one before may be cut
            written = os.pwritev(self._images.fileno(), [data, padding], image.offset)
            if written != len(data) + len(padding) or self._kept.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
            self._end += written
        return image

    def refuse(self, url: str, reason: str, detail: str) -> None:
        """Note a refusal that a later attempt need not ask for again."""
        with self._lock:
            if self._refused is None:
                self._refused = open(self.folder / REFUSED, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
                self._refused.write("\n")  # ends a line that was cut
            self._refused.write(json.dumps([url, reason, detail]) + "\n")
            self._refused.flush()

    def read(self, image: Spooled) -> bytes:
        """The bytes of an image."""
        return os.pread(self._images.fileno(), image.length, image.offset) if self._images else b""

    def close(self, done: bool) -> None:
        """Give the folder up; `done` removes it."""
        if done:
            if self._spare and self._images:
                with suppress(OSError):
                    self._spare.mkdir(exist_ok=True)
                    (self.folder / IMAGES).rename(self._spare / secrets.token_hex(8))
            shutil.rmtree(self.folder, ignore_errors=True)
        for file in (self._images, self._kept, self._refused):
            if file:
                file.close()

    def forget_refusals(self) -> None:
        """A verdict against the dataset asks for one more look at what failed."""
        (self.folder / REFUSED).unlink(missing_ok=True)


class Images(Sequence[bytes]):
    """Images of one sample, read when they are looked at: a row may name hundreds of large ones."""

    def __init__(self, spool: Spool, images: list[Spooled]) -> None:
        self._spool, self._images = spool, images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: Any) -> Any:
        return self._spool.read(self._images[place])

    def __iter__(self) -> Iterator[bytes]:
        return map(self._spool.read, self._images)


def discard(folder: Path) -> None:
    """Remove what an attempt left of a shard that is finished by now, unless another process works in it."""
    if (folder / KEPT).exists():
        with open(folder / KEPT, "rb") as kept, suppress(OSError):
            fcntl.flock(kept, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
