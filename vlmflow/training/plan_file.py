"""A plan in the store: three flat arrays and, last of all, the JSON that names their hashes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from vlmflow import storage
from vlmflow.digest import sha256_bytes
from vlmflow.errors import DataError, NotFound
from vlmflow.training.flops import CostModel
from vlmflow.training.plan import ITEM, VERSION, Plan
from vlmflow.training.pool import ShardUse

MARKER = "plan.json"
ARRAYS = ("items", "pack_start", "step_start")


def save(plan: Plan, uri: str) -> str:
    """Write a plan below ``uri``; it exists when its JSON does. Returns the JSON's URI. Equal plans give equal bytes."""
    hashes = {}
    for name in ARRAYS:
        buffer = io.BytesIO()
        np.save(buffer, getattr(plan, name), allow_pickle=False)
        data = buffer.getvalue()
        hashes[name] = sha256_bytes(data)
        storage.write_bytes(storage.join(uri, f"{name}.npy"), data)
    marker = storage.join(uri, MARKER)
    content = {
        "version": VERSION,
        "digest": plan.digest(),
        "arrays": hashes,
        "shards": [entry.model_dump(mode="json") for entry in plan.shards],
        "cost": list(plan.cost.values()),
        "report": plan.report,
        "examples": plan.examples,
    }
    storage.write_json(marker, content)
    return marker


def load(marker: str, scratch: Path | None = None) -> Plan:
    """Read a plan, its arrays mapped from local disk.

    Raises:
        DataError: an array or the JSON was cut or changed.
        NotFound: there is no such plan.
    """
    content = storage.read_json(marker)
    base = marker.removesuffix(f"/{MARKER}")
    try:
        arrays: dict[str, Any] = {
            name: np.load(
                storage.cached(storage.join(base, f"{name}.npy"), content["arrays"][name], scratch),
                mmap_mode="r",
                allow_pickle=False,
            )
            for name in ARRAYS
        }
        shards = [ShardUse.model_validate(entry) for entry in content["shards"]]
        plan = Plan(
            **arrays,
            shards=shards,
            cost=CostModel(*content["cost"]),
            report=content["report"],
            examples=content["examples"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{marker} is not a pack plan ({error!r}); delete it and run the stage again") from error
    if plan.items.dtype != ITEM or content.get("version") != VERSION or plan.digest() != content["digest"]:
        raise DataError(
            f"{marker}: the arrays give plan {plan.digest()[:16]}… of version {content.get('version')}, the file says "
            f"{str(content.get('digest'))[:16]}… and this program reads version {VERSION}; delete it and run the stage again"
        )
    return plan


def find(marker: str, scratch: Path | None = None) -> Plan | None:
    """The plan that an earlier attempt left, or None; a damaged one is made again."""
    try:
        return load(marker, scratch)
    except (NotFound, DataError):
        return None
