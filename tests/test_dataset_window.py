"""Shards on local disk within a limit: who downloads, who evicts, and what happens when the store misbehaves."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmflow import storage
from vlmflow.dataset import fetch
from vlmflow.dataset.manifest import ShardRef
from vlmflow.dataset.window import LIMIT_ENV, Stopped, Window, default_limit
from vlmflow.dataset.workers import Workers
from vlmflow.digest import sha256_bytes
from vlmflow.errors import DataError, NoSpace, NotFound, StorageError, Unreachable

SIZE = 40_000


class Fake:
    """A store in memory that counts reads and can be told to fail."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.reads: list[tuple[str, int, int]] = []
        self.fail: Callable[[str, int], None] = lambda uri, offset: None

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        self.reads.append((uri, offset, length or 0))
        self.fail(uri, offset)
        if uri not in self.objects:
            raise NotFound(f"{uri}: the store has no such object or bucket")
        return self.objects[uri][offset:][:length]

    def size(self, uri: str) -> int:
        return len(self.objects[uri])

    def shard(self, number: int, size: int = SIZE) -> ShardRef:
        data = random.Random(number).randbytes(size)
        uri = f"s3://bucket/shard-{number}.tar"
        self.objects[uri] = data
        return ShardRef(uri=uri, sha256=sha256_bytes(data), bytes=size, samples=1, source="a")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(storage, "_store", lambda uri: made)
    monkeypatch.setattr(fetch, "BACK_OFF", 0.001)
    return made


@pytest.fixture
def window(tmp_path: Path) -> Iterator[Window]:
    made = Window(tmp_path / "shards", limit=3 * SIZE, part=7_000)
    yield made
    made.close()


def tars(window: Window) -> set[str]:
    return {path.stem for path in window.folder.glob("*.tar")}


def leftovers(window: Window) -> list[str]:
    return [path.name for path in window.folder.iterdir() if path.suffix not in (".tar", ".lock", "")]


def test_a_shard_comes_in_large_ranged_reads_and_only_once(store: Fake, window: Window) -> None:
    shard = store.shard(1)
    lease = window.lease(shard)
    assert lease.read(0, SIZE) == store.objects[shard.uri]
    assert lease.read(39_990, 100) == store.objects[shard.uri][39_990:], "fewer bytes at the end"
    assert sorted(length for _, _, length in store.reads) == [5_000, *[7_000] * 5]
    lease.release()
    lease.release()
    assert window.lease(shard).read(5, 5) == store.objects[shard.uri][5:10]
    assert len(store.reads) == 6
    assert leftovers(window) == []


def test_the_limit_holds_and_the_least_recently_used_goes_first(store: Fake, window: Window) -> None:
    shards = [store.shard(i) for i in range(5)]
    for number, shard in enumerate(shards[:3]):
        lease = window.lease(shard)
        lease.release()
        os.utime(lease.path, (number, number))
    os.utime(window.folder / f"{shards[0].sha256}.tar", (9, 9))  # used again
    window.lease(shards[3]).release()
    assert tars(window) == {shards[i].sha256 for i in (0, 2, 3)}


def test_a_leased_shard_is_never_evicted_and_waiting_ends_when_it_is_released(store: Fake, window: Window) -> None:
    leases = [window.lease(store.shard(i)) for i in range(3)]
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(window.lease(store.shard(3))), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and len(tars(window)) == 3
    leases[1].release()
    waiting.join(20)
    assert found and tars(window) == {store.shard(i).sha256 for i in (0, 2, 3)}
    assert leases[0].read(0, 9) == store.objects["s3://bucket/shard-0.tar"][:9]


def test_no_room_for_ever_is_an_error_with_the_numbers(
    store: Fake, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmflow.dataset.window.PATIENCE", 0.05)
    held = [window.lease(store.shard(i)) for i in range(3)]
    with pytest.raises(NoSpace, match=rf"{SIZE} bytes, and {3 * SIZE} of the {3 * SIZE} bytes"):
        window.lease(store.shard(3))
    assert len(held) == 3


def test_a_shard_above_the_limit_says_both_numbers(store: Fake, window: Window) -> None:
    with pytest.raises(NoSpace, match=rf"s3://bucket/shard-1.tar, are {4 * SIZE} bytes, .* may hold {3 * SIZE}"):
        window.lease(store.shard(1, 4 * SIZE))
    assert store.reads == []


def test_two_processes_download_once_and_see_the_same_bytes(tmp_path: Path) -> None:
    """Each of three processes reads all of four shards, from a store of files that pretends to be remote."""
    remote = tmp_path / "remote"
    remote.mkdir()
    code = f"""
import sys, time
from pathlib import Path
from vlmflow import storage
from vlmflow.dataset.manifest import ShardRef
from vlmflow.dataset.window import Window
from vlmflow.digest import sha256_bytes
import random
remote, log = Path({str(remote)!r}), open({str(tmp_path / "log")!r}, "a")
class Store:
    def read(self, uri, offset, length):
        log.write(f"{{uri}} {{offset}}\\n"); log.flush(); time.sleep(0.02)
        return (remote / uri.rsplit("/", 1)[1]).read_bytes()[offset:][:length]
storage._store = lambda uri: Store()
window = Window(Path({str(tmp_path / "shards")!r}), limit={4 * SIZE}, part=30_000)
for number in range(4):
    data = random.Random(number).randbytes({SIZE})
    shard = ShardRef(uri=f"s3://b/{{number}}", sha256=sha256_bytes(data), bytes={SIZE}, samples=1, source="a")
    assert window.lease(shard).read(0, {SIZE}) == data
"""
    for number in range(4):
        (remote / str(number)).write_bytes(random.Random(number).randbytes(SIZE))
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    reads = (tmp_path / "log").read_text().split("\n")[:-1]
    assert len(reads) == len(set(reads)) == 8, "two parts of four shards, each read by one process"


def test_what_a_dead_process_left_is_no_obstacle(store: Fake, window: Window) -> None:
    shard, other = store.shard(1), store.shard(2)
    (window.folder / f"{shard.sha256}.part").write_bytes(b"x" * SIZE)
    (window.folder / f"{shard.sha256}.lock").touch()
    (window.folder / f"{other.sha256}.part").write_bytes(b"x" * 2 * SIZE)  # its lock file is gone too
    assert window.lease(shard).read(0, SIZE) == store.objects[shard.uri]
    assert leftovers(window) == []


def test_a_store_that_stumbles_is_asked_again(store: Fake, window: Window) -> None:
    random_ = random.Random(3)
    failed = []

    def stumble(uri: str, offset: int) -> None:
        if random_.random() < 0.4:
            failed.append(offset)
            raise Unreachable(f"{uri}: connection reset")

    store.fail = stumble
    for number in range(3):
        shard = store.shard(number)
        assert window.lease(shard).read(0, SIZE) == store.objects[shard.uri]
    assert failed


def test_a_short_answer_is_asked_again(store: Fake, window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cuts = store.read, [100, 0]
    monkeypatch.setattr(store, "read", lambda *a: whole(*a)[: cuts.pop()] if cuts else whole(*a))
    shard = store.shard(1)
    assert window.lease(shard).read(0, SIZE) == store.objects[shard.uri]
    assert not cuts


def test_a_store_that_stays_down_is_an_error_that_says_how_often(store: Fake, window: Window) -> None:
    def down(uri: str, offset: int) -> None:
        raise Unreachable(f"{uri}: no S3 store answers")

    store.fail = down
    with pytest.raises(Unreachable, match=r"no S3 store answers \(tried 6 times\)"):
        window.lease(store.shard(1))
    assert tars(window) == set() and leftovers(window) == []


def test_deleted_cut_and_changed_shards_are_named(store: Fake, window: Window) -> None:
    gone, cut, changed, torn = (store.shard(i) for i in range(4))
    del store.objects[gone.uri]
    store.objects[cut.uri] = store.objects[cut.uri][:12_345]
    store.objects[changed.uri] = b"y" * SIZE
    with pytest.raises(NotFound, match=r"shard-0.tar.*deleted after its dataset was made"):
        window.lease(gone)
    with pytest.raises(DataError, match=r"shard-1.tar has 12345 bytes but 40000 were recorded"):
        window.lease(cut)
    with pytest.raises(DataError, match=r"shard-2.tar has sha256 .* was recorded"):
        window.lease(changed)
    assert tars(window) == set() and leftovers(window) == []
    real = store.objects[torn.uri]
    store.objects[torn.uri] = b"z" * SIZE

    def restore(uri: str, offset: int) -> None:
        if len([r for r in store.reads if r[0] == torn.uri]) > 6:
            store.objects[torn.uri] = real

    store.fail = restore
    assert window.lease(torn).read(0, SIZE) == real, "replaced while it was read: read once more"


def test_a_full_disk_says_both_numbers(store: Fake, window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpace, match=rf"a shard needs {SIZE} bytes, \d+ are free"):
        window.lease(store.shard(1))
    assert tars(window) == set() and leftovers(window) == []


def test_files_are_read_in_place_and_verified_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"content")
    window = Window(tmp_path / "shards", limit=1)
    shard = ShardRef(uri=f"file://{path}", sha256=sha256_bytes(b"content"), bytes=7, samples=1, source="a")
    lease = window.lease(shard)
    assert lease.path == path and lease.read(3, 4) == b"tent" and tars(window) == set()
    changed = shard.model_copy(update={"sha256": sha256_bytes(b"other")})
    with pytest.raises(DataError, match="was recorded"):
        window.lease(changed)


def test_a_folder_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.raises(StorageError, match=r"shards: the shard cache needs a file system with locks.*VLMFLOW_SCRATCH"):
        Window(tmp_path / "shards")


def test_closing_ends_every_wait(store: Fake, tmp_path: Path) -> None:
    window = Window(tmp_path / "shards", limit=2 * SIZE)
    held = [window.lease(store.shard(i)) for i in range(2)]
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            window.lease(store.shard(2))
        except BaseException as error:
            ended.append(error)

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    window.close()
    for thread in threads:
        thread.join(20)
    assert [type(error) for error in ended] == [Stopped, Stopped]
    assert held[0].read(0, 5) == store.objects["s3://bucket/shard-0.tar"][:5]


def test_the_limit_is_a_number_of_bytes_or_half_of_the_free_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_ENV, "12345")
    assert default_limit(tmp_path) == 12345
    monkeypatch.setenv(LIMIT_ENV, "64GB")
    with pytest.raises(StorageError, match="'64GB'; it must be a number of bytes"):
        default_limit(tmp_path)
    monkeypatch.delenv(LIMIT_ENV)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert 0.3 * free < default_limit(tmp_path) < 0.7 * free


def test_workers_keep_order_and_never_outlive_close() -> None:
    workers = Workers(1, "test")
    gate = threading.Event()
    seen: list[int] = []
    first = workers.submit(gate.wait)
    later = [workers.submit(lambda i=i: seen.append(i)) for i in range(3)]  # type: ignore[misc]
    workers.submit(lambda: 1 / 0)
    gate.set()
    assert first.result(20) is True
    for future in later:
        future.result(20)
    assert seen == [0, 1, 2]
    workers.close()
    assert workers.submit(lambda: 1).cancelled()
