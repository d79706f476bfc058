"""Checkpoints that are complete or absent, belong to one training, and do not know how many processes wrote them.

``{root}/checkpoints/{train digest}/step-XXXXXXXX/`` holds the trained parameters in fp32 (``model.safetensors``), the
AdamW moments by parameter name (``optimizer.safetensors``), ``state.json``, the log so far, and last of all
``COMPLETE.json`` with the hash of each file. Frozen parameters are not repeated: they are those of the stage's initial
model, whose hash is part of the train digest. Random numbers need no state, because every step seeds itself from
(seed, step, rank).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vlmflow import storage
from vlmflow.digest import sha256_bytes, sha256_file
from vlmflow.errors import CheckpointError, DataError, NotFound

MARKER = "COMPLETE.json"
WEIGHTS, MOMENTS, STATE, LOG = "model.safetensors", "optimizer.safetensors", "state.json", "train_log.jsonl"
FILES = (WEIGHTS, MOMENTS, STATE, LOG)
PIECE = 1 << 24  # bytes written and hashed at a time


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory; nothing here may be changed by training that goes on.

    Attributes:
        step: optimizer steps done.
        weights, moments: fp32 tensors by name, on the CPU.
        state: plan digest, family, world size, seed, health.
        log: training log up to this step.
    """

    step: int
    weights: dict[str, Any]
    moments: dict[str, Any]
    state: dict[str, Any]
    log: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on local disk, hashes verified.

    Attributes:
        step: optimizer steps done; training goes on with the step of this number.
        state: as it was saved.
        log: training log up to this step.
    """

    step: int
    state: dict[str, Any]
    log: str
    folder: Path

    def tensors(self) -> tuple[Tensors, Tensors]:
        """(weights, moments), read one by one as they are asked for."""
        return Tensors(self.folder / WEIGHTS), Tensors(self.folder / MOMENTS)

    def check(self, plan: str, family: str) -> None:
        """Refuse a checkpoint whose step or weights would mean something else here.

        Args:
            plan: digest of this run's pack plan.

        Raises:
            CheckpointError: another pack plan or family. (Other parameters: ``engine_state.restore``.)
        """
        name = f"the checkpoint of step {self.step}"
        if self.state["plan"] != plan:
            raise CheckpointError(
                f"{name} was trained by pack plan {self.state['plan'][:12]}, this run has {plan[:12]}: its step number is "
                "another position in the data. Delete the checkpoint, or restore the recipe that made it."
            )
        if (found := self.state.get("family", family)) != family:
            raise CheckpointError(f"{name} is of family '{found}', this run trains '{family}'; restore the recipe")


class Tensors(Mapping[str, Any]):
    """Tensors of a safetensors file by name; each is read when it is asked for, so the file is never in memory whole."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, "pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def folder_of(base: str, step: int) -> str:
    """URI of the checkpoint of a step."""
    return storage.join(base, f"step-{step:08d}")


def save(base: str, snapshot: Snapshot, work: Path, keep: int, keep_every: int | None = None) -> str:
    """Write one checkpoint, the marker last, then delete what the policy no longer keeps; returns its URI."""
    uri = write(base, snapshot, work)
    prune(base, snapshot.step, keep, keep_every)
    return uri


def write(base: str, snapshot: Snapshot, work: Path) -> str:
    """Write one checkpoint, the marker last; returns its URI.

    Args:
        work: local folder for one file at a time.

    Raises:
        StorageError: the store or the disk failed; what lies there has no marker, and writing again starts anew.
    """
    uri = folder_of(base, snapshot.step)
    _remove(base, snapshot.step, {MARKER})  # a damaged or partial checkpoint of this step may lie there
    work.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, tensors in ((WEIGHTS, snapshot.weights), (MOMENTS, snapshot.moments)):
        path = work / name
        try:
            files[name] = write_tensors(tensors, path)
            storage.put_file(path, storage.join(uri, name))
        finally:
            path.unlink(missing_ok=True)
    state = json.dumps({**snapshot.state, "step": snapshot.step}, sort_keys=True)
    for name, data in ((STATE, state.encode()), (LOG, snapshot.log.encode())):
        files[name] = {"sha256": sha256_bytes(data), "bytes": len(data)}
        storage.write_bytes(storage.join(uri, name), data)
    storage.write_json(storage.join(uri, MARKER), {"step": snapshot.step, "files": files})
    return uri


def write_tensors(tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write fp32 CPU tensors as a safetensors file; returns its ``sha256`` and ``bytes``.

    The library's own writer first copies everything into bytes objects while it holds the interpreter lock; here pieces
    of the tensors' own memory are hashed and written, both without the lock, so that training goes on beside it.
    """
    header, start = {}, 0
    for name in sorted(tensors):
        end = start + tensors[name].numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    hashed = hashlib.sha256()

    def put(file: BinaryIO, data: Any) -> None:
        hashed.update(data)
        file.write(data)

    with open(path, "wb") as file:
        put(file, len(text).to_bytes(8, "little") + text)
        for name in header:
            data = memoryview(tensors[name].numpy().reshape(-1).view("uint8"))
            for begin in range(0, len(data), PIECE):
                put(file, data[begin : begin + PIECE])
    return {"sha256": hashed.hexdigest(), "bytes": 8 + len(text) + start}


def _steps(base: str) -> dict[int, set[str]]:
    """step -> names of files that are there; none when a write was cut before its first file had its name."""
    found: dict[int, set[str]] = {}
    for item in storage.list_uris(base):
        if match := re.search(r"/step-(\d{8,})/([^/]+)$", item.uri):
            found.setdefault(int(match.group(1)), set()).add(match.group(2))
    if here := storage.local_path(base):
        for folder in here.glob("step-*"):
            if match := re.fullmatch(r"step-(\d{8,})", folder.name):
                found.setdefault(int(match.group(1)), set())
    return found


def _remove(base: str, step: int, names: set[str]) -> None:
    uri = folder_of(base, step)
    for name in sorted(names, key=lambda n: n != MARKER):  # the marker first: what is half deleted is absent
        storage.delete(storage.join(uri, name))
    if here := storage.local_path(uri):  # what a killed write left under no name takes up space
        shutil.rmtree(here, ignore_errors=True)


def prune(base: str, written: int, keep: int, keep_every: int | None = None) -> None:
    """Delete what the policy does not keep, once the checkpoint of step ``written`` is complete.

    Kept are the newest ``keep`` complete ones and those whose step is a multiple of ``keep_every``; partial ones older
    than the newest go. What lies beyond ``written`` was passed over when this attempt began: it neither counts as one
    that is kept nor is it touched.
    """
    steps = {step: names for step, names in _steps(base).items() if step <= written}
    complete = sorted(step for step, names in steps.items() if MARKER in names)
    if written not in complete:
        return
    kept = set(complete[-keep:]) | {step for step in complete if keep_every and step % keep_every == 0}
    for step in sorted(steps.keys() - kept):
        _remove(base, step, steps[step])


def clear(base: str) -> None:
    """Delete every checkpoint of a training that has been published; markers first."""
    for step, names in _steps(base).items():
        _remove(base, step, names)


def newest(base: str, work: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, on local disk and verified, and what was passed over with its reason.

    A directory without a marker was being written when the run died; a hash that differs means a cut or changed file.
    Either is passed over for the one before it.

    Raises:
        StorageError: the store does not answer, or the disk of ``work`` is full: that says nothing of the checkpoint.
    """
    ignored: list[str] = []
    steps = _steps(base)
    for step in sorted(steps, reverse=True):
        if MARKER not in steps[step]:
            ignored.append(f"step {step}: no {MARKER}; it was not finished")
            continue
        try:
            return fetch(base, step, work), ignored
        except (CheckpointError, DataError, NotFound) as error:
            ignored.append(f"step {step}: {error}")
    return None, ignored


def fetch(base: str, step: int, work: Path) -> Checkpoint:
    """The checkpoint of one step, verified; copied to ``work`` unless the store is this machine's disk.

    Raises:
        CheckpointError: the marker is unreadable, or a file is not the one it names.
        NotFound, DataError: the marker or a file is gone, or is not JSON.
    """
    uri = folder_of(base, step)
    marker = storage.read_json(storage.join(uri, MARKER))
    folder, remote = _place(base, step, work)
    try:
        files = {name: (str(marker["files"][name]["sha256"]), int(marker["files"][name]["bytes"])) for name in FILES}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{MARKER} does not name the hash of every file ({error!r}); it was changed") from error
    for name, (sha256, size) in files.items():
        path = folder / name
        if remote:
            storage.get_file(storage.join(uri, name), path)
        if not path.is_file():
            raise CheckpointError(f"{name} is missing; it was deleted after it was written")
        if (found_size := path.stat().st_size) != size:
            raise CheckpointError(f"{name} has {found_size} bytes, {size} were recorded: it was cut or changed")
        if (found := sha256_file(path)) != sha256:
            raise CheckpointError(
                f"{name} has sha256 {found[:16]}…, {sha256[:16]}… was recorded: its content was cut or changed after it "
                "was written"
            )
    return opened(base, step, work)


def opened(base: str, step: int, work: Path) -> Checkpoint:
    """A checkpoint that a rank of this machine has fetched."""
    folder, _ = _place(base, step, work)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(step, state, (folder / LOG).read_text(encoding="utf-8"), folder)


def _place(base: str, step: int, work: Path) -> tuple[Path, bool]:
    """(local folder of a fetched checkpoint, whether its files must be copied there)."""
    uri = folder_of(base, step)
    here = storage.local_path(uri)
    return (here, False) if here else (work / uri.rsplit("/", 1)[-1], True)
