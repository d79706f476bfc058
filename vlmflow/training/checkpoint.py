"""Checkpoints that are complete or absent, belong to one training, and do not know how many processes wrote them.

``{root}/checkpoints/{train digest}/step-XXXXXXXX/`` holds the trained parameters in fp32 (``model.safetensors``), the
AdamW moments by parameter name (``optimizer.safetensors``), ``state.json``, the log so far, and last of all
``COMPLETE.json`` with the hash of each file. Frozen parameters are not repeated: they are those of the stage's initial
model, whose hash is part of the train digest. Random numbers need no state, because every step seeds itself from
(seed, step, rank).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmflow import storage
from vlmflow.digest import sha256_bytes, sha256_file
from vlmflow.errors import CheckpointError, DataError, NotFound

MARKER = "COMPLETE.json"
WEIGHTS, MOMENTS, STATE, LOG = "model.safetensors", "optimizer.safetensors", "state.json", "train_log.jsonl"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on local disk, hashes verified.

    Attributes:
        step: optimizer steps done; training goes on with the step of this number.
        state: plan digest, world size, seed.
        log: training log up to this step.
        ignored: newer checkpoints that were passed over, with the reason.
    """

    step: int
    state: dict[str, Any]
    log: str
    folder: Path
    ignored: list[str]

    def tensors(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(weights, moments) as torch tensors on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.folder / WEIGHTS), load_file(self.folder / MOMENTS)


def save(
    base: str,
    step: int,
    weights: dict[str, Any],
    moments: dict[str, Any],
    state: dict[str, Any],
    log: str,
    work: Path,
    keep: int,
) -> str:
    """Write one checkpoint, the marker last, then delete the oldest beyond ``keep`` complete ones; returns its URI."""
    from safetensors.torch import save_file

    uri = storage.join(base, f"step-{step:08d}")
    storage.delete(storage.join(uri, MARKER))  # a damaged checkpoint of this step may lie there
    work.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name, tensors in ((WEIGHTS, weights), (MOMENTS, moments)):
        path = work / name
        save_file(tensors, path)
        hashes[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        storage.put_file(path, storage.join(uri, name))
        path.unlink()
    texts = {STATE: json.dumps({**state, "step": step}, sort_keys=True).encode(), LOG: log.encode()}
    for name, data in texts.items():
        hashes[name] = {"sha256": sha256_bytes(data), "bytes": len(data)}
        storage.write_bytes(storage.join(uri, name), data)
    storage.write_json(storage.join(uri, MARKER), {"step": step, "files": hashes})
    prune(base, keep)
    return uri


def _steps(base: str) -> dict[int, set[str]]:
    """step -> names of files that are there."""
    found: dict[int, set[str]] = {}
    prefix = re.compile(r"/step-(\d{8})/([^/]+)$")
    for item in storage.list_uris(base):
        if match := prefix.search(item.uri):
            found.setdefault(int(match.group(1)), set()).add(match.group(2))
    return found


def prune(base: str, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints, and partial ones older than those; marker first."""
    steps = _steps(base)
    complete = sorted(step for step, names in steps.items() if MARKER in names)
    if not complete:
        return
    oldest_kept = complete[-keep:][0]
    for step, names in steps.items():
        if step < oldest_kept:
            for name in sorted(names, key=lambda n: n != MARKER):
                storage.delete(storage.join(base, f"step-{step:08d}", name))


def clear(base: str) -> None:
    """Delete every checkpoint of a training that has been published; markers first."""
    for step, names in _steps(base).items():
        for name in sorted(names, key=lambda n: n != MARKER):
            storage.delete(storage.join(base, f"step-{step:08d}", name))


def newest(base: str, plan: str, work: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, copied to ``work`` and verified, and what was passed over with its reason.

    A directory without a marker was being written when the run died; a hash that differs means a cut or changed file.
    Either is passed over for the one before it.

    Args:
        plan: digest of the pack plan that the checkpoint must have been trained by.

    Raises:
        StorageError: the store does not answer, or the disk of ``work`` is full: that says nothing of the checkpoint.
        CheckpointError: a complete checkpoint belongs to another plan, so its step number means something else.
    """
    ignored: list[str] = []
    steps = _steps(base)
    for step in sorted(steps, reverse=True):
        name = f"step-{step:08d}"
        if MARKER not in steps[step]:
            ignored.append(f"{name}: no {MARKER}; it was not finished")
            continue
        try:
            folder = _fetch(storage.join(base, name), work / name)
        except (CheckpointError, DataError, NotFound, ValueError, KeyError, TypeError, AttributeError) as error:
            ignored.append(f"{name}: {error}")
            continue
        state = json.loads((folder / STATE).read_text())
        if state["plan"] != plan:
            raise CheckpointError(
                f"{storage.join(base, name)} was trained by pack plan {state['plan'][:12]}, this run has {plan[:12]}: its step "
                f"{step} is another position in the data. Delete the checkpoint, or restore the recipe that made it."
            )
        return Checkpoint(step, state, (folder / LOG).read_text(), folder, ignored), ignored
    return None, ignored


def _fetch(uri: str, folder: Path) -> Path:
    files = storage.read_json(storage.join(uri, MARKER))["files"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, about in files.items():
        path = folder / name
        storage.get_file(storage.join(uri, name), path)
        if (size := path.stat().st_size) != about["bytes"]:
            raise CheckpointError(f"{name} has {size} bytes, {about['bytes']} were recorded: it was cut or changed")
        if (found := sha256_file(path)) != about["sha256"]:
            raise CheckpointError(
                f"{name} has sha256 {found[:16]}…, {about['sha256'][:16]}… was recorded: its content was cut or changed after it was written"
            )
    return folder
