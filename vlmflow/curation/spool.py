"""What a shard in progress has already: accepted images and verdicts, row by row on local disk.

One append-only file of images, each after a line that describes it, and one of refusals. A pull that was killed finds
there all that had landed and fetches only what was in flight. Images are hashed when they are found again, so a file that
was cut (or a disk that lost its last writes) costs a fetch, never a wrong byte. It is also what keeps memory flat: no
image waits in memory for its shard to be complete.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlmflow.digest import sha256_bytes

IMAGES, REFUSED = "images", "refused.jsonl"


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
    """

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        for number in range(1000):
            self.folder = folder if not number else folder.with_name(f"{folder.name}.{number}")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._images: IO[bytes] = open(self.folder / IMAGES, "a+b", buffering=0)  # noqa: SIM115
            try:
                fcntl.flock(self._images, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                self._images.close()
        self._refused: IO[str] | None = None
        self.found: dict[str, Spooled | tuple[str, str]] = {}
        self._end = self._read_images()
        if self._images.seek(0, os.SEEK_END) > self._end:  # ext4 writes a file that was emptied to disk as it is closed
            self._images.truncate(self._end)
        self._read_refused()

    def _read_images(self) -> int:
        """Fill `found`; returns where the last whole image ends."""
        end = 0
        with open(self.folder / IMAGES, "rb") as file:
            for line in file:
                try:
                    url, length, about = json.loads(line)
                    image = Spooled(url, end + len(line), length, about)
                    whole = sha256_bytes(file.read(length)) == about["sha256"]
                except (ValueError, TypeError, KeyError):
                    break
                if not whole:
                    break
                self.found[image.url] = image
                end = image.offset + image.length
        return end

    def _read_refused(self) -> None:
        path = self.folder / REFUSED
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                url, reason, detail = json.loads(line)
            except (ValueError, TypeError):
                continue
            self.found.setdefault(url, (reason, detail))

    def keep(self, url: str, data: bytes, about: dict[str, Any]) -> Spooled:
        """Append an accepted image. Raises OSError when the disk is full."""
        line = json.dumps([url, len(data), about]).encode() + b"\n"
        with self._lock:
            image = Spooled(url, self._end + len(line), len(data), about)
            written = os.writev(self._images.fileno(), [line, data])
            if written != len(line) + len(data):
                self._images.truncate(self._end)
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
        return os.pread(self._images.fileno(), image.length, image.offset)

    def close(self, done: bool) -> None:
        """Give the folder up; `done` removes it."""
        if done:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._images.close()
        if self._refused:
            self._refused.close()

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
    if (folder / IMAGES).exists():
        with open(folder / IMAGES, "rb") as images, suppress(OSError):
            fcntl.flock(images, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
