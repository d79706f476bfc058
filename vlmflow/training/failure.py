"""Errors of ranks as objects in the store, so that they reach a launcher on another machine as what they were."""

from __future__ import annotations

import time
from typing import Any

from vlmflow import errors, storage
from vlmflow.errors import StepFailed, VlmflowError

DIED = "RankDied"  # class of the error of a rank that ended without a word


def _folder(folder: str) -> str:
    return storage.join(folder, "errors")


def write(folder: str, who: str, error: VlmflowError) -> None:
    """Leave an error below a training's folder; ``who`` names the rank or node."""
    record = {"kind": type(error).__name__, "message": str(error), "time": time.time()}
    storage.write_json(storage.join(_folder(folder), f"{who}.json"), record)


def clear(folder: str, who: str | None = None) -> None:
    """Forget what an earlier attempt left: of one rank or node, or of all."""
    if who is not None:
        storage.delete(storage.join(_folder(folder), f"{who}.json"))
        return
    for item in storage.list_uris(_folder(folder)):
        storage.delete(item.uri)


def read(folder: str) -> list[VlmflowError]:
    """The errors of this attempt: what ranks reported before what ended them unsaid, the first one first. Later ones are
    often consequences."""
    records = [storage.read_json(item.uri) for item in storage.list_uris(_folder(folder))]
    return [restore(record) for record in sorted(records, key=lambda r: (r["kind"] == DIED, r["time"]))]


def restore(record: dict[str, Any]) -> VlmflowError:
    """An error as its own class again; StepFailed where the class is not one of `vlmflow.errors`."""
    kind = getattr(errors, str(record.get("kind")), None)
    known = isinstance(kind, type) and issubclass(kind, VlmflowError)
    return (kind if known else StepFailed)(str(record.get("message")))  # type: ignore[misc]
