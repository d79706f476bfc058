"""Checkpoints are complete or absent, whatever fails while they are written, and the newest complete one always lives."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmflow import storage
from vlmflow.errors import AccessDenied, CheckpointError, NoSpace, StepFailed, StorageError, Unreachable
from vlmflow.training import checkpoint, checkpoint_writer
from vlmflow.training.checkpoint import MARKER, Snapshot, folder_of
from vlmflow.training.checkpoint_writer import Writer

torch = pytest.importorskip("torch")
STATE = {"plan": "p", "family": "points", "world": 1}


def snapshot(step: int) -> Snapshot:
    made = torch.Generator().manual_seed(step)
    weights = {"b": torch.randn(3, 5, generator=made), "a": torch.randn(7, generator=made)}
    moments = {f"{n}.{m}": torch.rand(t.shape, generator=made) for n, t in weights.items() for m in ("x", "y")}
    return Snapshot(step, weights, moments, STATE, f'{{"step": {step - 1}}}\n')


def holds(found: checkpoint.Checkpoint | None, step: int) -> bool:
    expected = snapshot(step)
    assert found is not None
    weights, moments = found.tensors()
    return (
        found.step == step
        and found.log == expected.log
        and all(torch.equal(weights[n], t) for n, t in expected.weights.items())
        and all(torch.equal(moments[n], t) for n, t in expected.moments.items())
    )


@pytest.fixture
def base(tmp_path: Path) -> str:
    return (tmp_path / "store" / "checkpoints").as_uri()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "PAUSE", 0.0)


class Told(list):
    """Events of a writer."""

    def __call__(self, **event: Any) -> None:
        self.append(event)

    def notes(self) -> str:
        return "\n".join(e["text"] for e in self if e["event"] == "note")

    def written(self) -> list[int]:
        return [e["step"] for e in self if e["event"] == "checkpoint"]


def writer(base: str, work: Path, told: Told, **fields: Any) -> Writer:
    given = {"keep": 2, "keep_every": None, "background": True, "complete": None} | fields
    return Writer(base, work, tell=told, **given)


def saved(made: Writer, step: int) -> None:
    assert made.ready(30)
    made.write(snapshot(step))


def complete(base: str) -> list[int]:
    return sorted(step for step, names in checkpoint._steps(base).items() if MARKER in names)


def test_files_are_those_of_the_safetensors_library(work: Path) -> None:
    from safetensors.torch import save_file

    work.mkdir()
    tensors = {**snapshot(1).weights, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "größe": torch.ones(1)}
    about = checkpoint.write_tensors(tensors, work / "ours")
    save_file(tensors, work / "theirs")
    assert (work / "ours").read_bytes() == (work / "theirs").read_bytes()
    assert about["bytes"] == (work / "ours").stat().st_size
    assert about["sha256"] == checkpoint.sha256_file(work / "ours")


def test_what_was_saved_comes_back_on_another_store_too(
    base: str, work: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (base, s3):
        for step in (3, 6, 9):
            checkpoint.save(place, snapshot(step), work / "saving", keep=2)
        found, ignored = checkpoint.newest(place, work / "resume")
        assert holds(found, 9) and not ignored and complete(place) == [6, 9]
        assert list((work / "saving").iterdir()) == []
        checkpoint.clear(place)
        assert storage.list_uris(place) == []


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    from vlmflow.storage_s3 import s3_store

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("VLMFLOW_S3_ENDPOINT", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3_store().make_bucket("bucket")
    yield "s3://bucket/checkpoints"
    server.stop()


def test_policy_keeps_the_newest_and_every_nth(base: str, work: Path) -> None:
    for step in range(2, 21, 2):
        checkpoint.save(base, snapshot(step), work, keep=2, keep_every=6)
    assert complete(base) == [6, 12, 18, 20]


def test_a_damaged_newer_one_is_not_counted_as_kept(base: str, work: Path) -> None:
    """A run that went back to step 3 must not lose step 6 for the sake of a damaged step 9."""
    for step in (3, 9):
        checkpoint.save(base, snapshot(step), work, keep=2)
    damage(base, 9, checkpoint.WEIGHTS)
    found, ignored = checkpoint.newest(base, work)
    assert holds(found, 3) and "step 9: model.safetensors has sha256" in ignored[0]
    checkpoint.save(base, snapshot(6), work, keep=1)
    assert holds(checkpoint.newest(base, work)[0], 6)
    assert complete(base) == [6, 9]
    checkpoint.save(base, snapshot(9), work, keep=1)
    assert holds(checkpoint.newest(base, work)[0], 9) and complete(base) == [9]


def test_the_older_one_goes_only_after_the_newer_ones_marker(
    base: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(base, snapshot(3), work, keep=1)
    actions: list[str] = []
    write, delete = storage.write_json, storage.delete
    monkeypatch.setattr(storage, "write_json", lambda u, o: (write(u, o), actions.append(u)))
    monkeypatch.setattr(storage, "delete", lambda u: (actions.append(f"-{u}"), delete(u)))
    checkpoint.save(base, snapshot(6), work, keep=1)
    marker, gone = f"{folder_of(base, 6)}/{MARKER}", [a for a in actions if a.startswith(f"-{folder_of(base, 3)}")]
    assert gone[0].endswith(MARKER) and actions.index(marker) < actions.index(gone[0]) and len(gone) == 5


def test_newest_is_by_step_not_by_clock(base: str, work: Path) -> None:
    """A clock that was set back between two checkpoints changes nothing."""
    for step in (3, 6):
        checkpoint.save(base, snapshot(step), work, keep=2)
    for info in storage.list_uris(base):
        stamp = 2e9 if "step-00000003" in info.uri else 1e6
        os.utime(storage.local_path(info.uri), (stamp, stamp))  # type: ignore[arg-type]
    assert holds(checkpoint.newest(base, work)[0], 6)
    checkpoint.save(base, snapshot(9), work, keep=2)
    assert complete(base) == [6, 9]


def damage(base: str, step: int, name: str, data: Callable[[bytes], bytes] | None = None) -> None:
    path = storage.local_path(f"{folder_of(base, step)}/{name}")
    assert path is not None
    old = path.read_bytes()
    path.write_bytes(data(old) if data else bytes([*old[:-1], old[-1] ^ 1]))


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "torn upload": (checkpoint.MOMENTS, lambda d: d[: len(d) // 2], "bytes, 266 were recorded|cut or changed"),
    "one bit": (checkpoint.WEIGHTS, lambda d: bytes([*d[:-1], d[-1] ^ 1]), "sha256"),
    "log changed": (checkpoint.LOG, lambda d: d.replace(b"5", b"4"), "sha256"),
    "state changed": (checkpoint.STATE, lambda d: d.replace(b"6", b"7"), "sha256"),
    "marker of another hash": (MARKER, lambda d: d.replace(b'"sha256": "', b'"sha256": "0', 1), "was recorded"),
    "marker is not JSON": (MARKER, lambda d: d[:20], "not JSON"),
    "marker is a list": (MARKER, lambda d: b"[]", "does not name the hash"),
    "marker names less": (MARKER, lambda d: json.dumps({"files": {}}).encode(), "does not name the hash"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_passed_over_with_the_reason(base: str, work: Path, name: str) -> None:
    for step in (3, 6):
        checkpoint.save(base, snapshot(step), work, keep=2)
    file, change, reason = DAMAGES[name]
    damage(base, 6, file, change)
    found, ignored = checkpoint.newest(base, work)
    assert holds(found, 3) and len(ignored) == 1
    import re

    assert ignored[0].startswith("step 6: ") and re.search(reason, ignored[0]), ignored


def test_an_unfinished_one_and_a_missing_file_are_passed_over(base: str, work: Path) -> None:
    for step in (3, 6, 9):
        checkpoint.save(base, snapshot(step), work, keep=3)
    storage.delete(f"{folder_of(base, 9)}/{MARKER}")
    storage.delete(f"{folder_of(base, 6)}/{checkpoint.MOMENTS}")
    found, ignored = checkpoint.newest(base, work)
    assert holds(found, 3)
    assert "not finished" in ignored[0] and "optimizer.safetensors is missing" in ignored[1]


def test_a_store_that_is_down_is_not_taken_for_no_checkpoint(
    base: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(base, snapshot(3), work, keep=2)

    def down(*_: Any) -> None:
        raise Unreachable("no store answers")

    for name in ("list_uris", "read_json"):
        with monkeypatch.context() as patched, pytest.raises(Unreachable):
            patched.setattr(storage, name, down)
            checkpoint.newest(base, work)


def test_what_does_not_fit_this_run_is_refused_with_the_reason(base: str, work: Path) -> None:
    checkpoint.save(base, snapshot(3), work, keep=2)
    found, _ = checkpoint.newest(base, work)
    assert found is not None
    found.check("p", "points")
    with pytest.raises(CheckpointError, match="another position in the data"):
        found.check("q", "points")
    with pytest.raises(CheckpointError, match="family 'points', this run trains 'catty'"):
        found.check("p", "catty")


class FullDisk:
    """ENOSPC at chosen writes of this process, counted over work files and stored objects alike."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
        self.count, self.fails = 0, fails
        sync, opened = os.fsync, io.open

        def fsync(number: int) -> None:
            self.hit()
            sync(number)

        def open_(path: Any, mode: str = "r", **options: Any) -> Any:
            file = opened(path, mode, **options)
            if mode == "wb":
                write = file.write
                proxy = _Proxy(file)
                proxy.write = lambda data: (self.hit(), write(data))[1]  # type: ignore[method-assign]
                return proxy
            return file

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(checkpoint, "open", open_, raising=False)

    def hit(self) -> None:
        self.count += 1
        if self.fails(self.count):
            raise OSError(errno.ENOSPC, "No space left on device")


class _Proxy:
    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        return self.file.write(data)

    def __enter__(self) -> _Proxy:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def test_a_disk_full_at_any_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = 0
    while True:
        at += 1
        base, work, told = (tmp_path / str(at) / "store").as_uri(), tmp_path / str(at) / "work", Told()
        checkpoint.save(base, snapshot(3), work, keep=1)
        before = {i.uri: storage.read_bytes(i.uri) for i in storage.list_uris(base)}
        made = writer(base, work, told, complete=3, keep=1)
        with monkeypatch.context() as patched:
            disk = FullDisk(patched, lambda n, at=at: n >= at)  # type: ignore[misc]
            saved(made, 6)
            assert made.ready(30)
            if disk.count < at:
                break
        assert "CHECKPOINT NOT WRITTEN at step 6" in told.notes() and "falls back to step 3" in told.notes()
        assert "No space left" in told.notes()
        assert made.complete == 3 and holds(checkpoint.newest(base, work)[0], 3)
        assert before.items() <= {i.uri: storage.read_bytes(i.uri) for i in storage.list_uris(base)}.items()
        assert list(work.iterdir()) == [], "what could not be written frees its space"
        saved(made, 9)  # space was made
        assert made.ready(30) and holds(checkpoint.newest(base, work)[0], 9) and complete(base) == [9]
    assert at > 10 and complete(base) == [6]


def test_a_disk_full_for_a_moment_costs_only_another_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(1, 12):
        base, work, told = (tmp_path / str(at) / "store").as_uri(), tmp_path / str(at) / "work", Told()
        made = writer(base, work, told)
        with monkeypatch.context() as patched:
            FullDisk(patched, lambda n, at=at: n == at)  # type: ignore[misc]
            saved(made, 3)
            assert made.ready(30)
        assert told.written() == [3] and holds(checkpoint.newest(base, work)[0], 3)


def test_a_store_that_fails_one_call_in_twenty(base: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or after it did what was asked; at every instant the newest complete checkpoint is whole."""
    chance, calls, failures = random.Random(7), 0, 0

    def flaky(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls, failures
            calls += 1
            fails, before = chance.random() < 0.05, chance.random() < 0.5
            failures += fails
            if fails and before:
                raise StorageError("the store broke off")
            result = act(*arguments)
            if fails:
                raise StorageError("the store's answer was lost")
            return result

        return call

    told = Told()
    made = writer(base, work, told)
    with monkeypatch.context() as patched:
        for name in ("put_file", "write_bytes", "write_json", "delete", "list_uris"):
            patched.setattr(storage, name, flaky(getattr(storage, name)))
        for step in range(1, 61):
            saved(made, step)
    assert made.ready(30)
    assert failures > 20 and calls > 500
    assert told.written() == list(range(1, 61)), told.notes()
    assert holds(checkpoint.newest(base, work)[0], 60)
    assert len(complete(base)) <= 4


def test_training_goes_on_while_one_checkpoint_is_written(
    base: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, put = threading.Event(), storage.put_file
    monkeypatch.setattr(storage, "put_file", lambda *a: (gate.wait(30), put(*a)))
    told = Told()
    made = writer(base, work, told)
    saved(made, 3)
    made.poll()
    assert complete(base) == [] and told == [] and made.complete is None
    assert not made.ready(0.01), "never two at a time"
    with pytest.raises(AssertionError):
        made.write(snapshot(6))
    assert not made.close(0.01)
    assert "step 3 was not finished within 0 s" in told.notes() and "VLMFLOW_TRAIN_GRACE" in told.notes()
    gate.set()
    assert made.close(30) and told.written() == [3] and made.complete == 3
    assert holds(checkpoint.newest(base, work)[0], 3)
    foreground = writer(base, work, told, background=False)
    foreground.write(snapshot(6))
    assert told.written() == [3, 6] and complete(base) == [3, 6]


def test_without_any_checkpoint_a_failing_store_ends_the_training(
    base: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fails(error: StorageError) -> Callable[..., None]:
        def call(*_: Any) -> None:
            tries.append(error)
            raise error

        return call

    for error, attempts in ((Unreachable("down"), 5), (NoSpace("full"), 5), (AccessDenied("who are you"), 1)):
        tries.clear()
        monkeypatch.setattr(storage, "put_file", fails(error))
        made = writer(base, work, Told())
        saved(made, 3)
        with pytest.raises(type(error), match=str(error)):
            made.ready(30)
        assert len(tries) == attempts
        told = Told()
        made = writer(base, work, told, complete=1)
        saved(made, 3)
        assert made.ready(30) and made.complete == 1 and str(error) in told.notes()


def test_a_defect_is_not_taken_for_a_failing_store(base: str, work: Path) -> None:
    made = writer(base, work, Told(), complete=1)
    made.write(Snapshot(3, {"a": torch.zeros(2, dtype=torch.bfloat16)}, {}, STATE, ""))
    with pytest.raises(TypeError):
        made.ready(30)


def test_old_checkpoints_that_cannot_be_deleted_are_said(
    base: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    made = writer(base, work, told, keep=1)
    saved(made, 3)
    assert made.ready(30)
    delete = storage.delete

    def refused(uri: str) -> None:
        if "step-00000003" in uri:
            raise AccessDenied("no deleting here")
        delete(uri)

    monkeypatch.setattr(storage, "delete", refused)
    saved(made, 6)
    assert made.ready(30) and told.written() == [3, 6] and "no deleting here" in told.notes()


@pytest.mark.parametrize("given", ["soon", "-1", "inf", "nan"])
def test_the_grace_time_must_be_seconds(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMFLOW_TRAIN_GRACE", given)
    with pytest.raises(StepFailed, match="VLMFLOW_TRAIN_GRACE"):
        checkpoint_writer.grace()
    monkeypatch.setenv("VLMFLOW_TRAIN_GRACE", "25")
    assert checkpoint_writer.grace() == 25.0
