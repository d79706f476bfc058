"""Deletes what a run left on the cluster: nothing else ends a TrainJob when its pipeline is terminated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmflow.training.trainjob import client, spec
from vlmflow.training.trainjob.client import Api, Refused
from vlmflow.training.trainjob.clock import Clock
from vlmflow.training.trainjob.config import TrainJobConfig
from vlmflow.training.trainjob.wait import condition, path_of

PATIENCE = 60.0  # seconds


def clean(
    run_id: str,
    config: TrainJobConfig,
    clock: Clock | None = None,
    connect: Callable[[], Any] = client.connect,
) -> list[str]:
    """Delete the TrainJobs that ``run_id`` created and that have not ended; returns their names. Their pods still write a
    checkpoint. Raises ServiceError when the API refuses or stays silent."""
    api = Api(clock or Clock(), PATIENCE, lambda _: None, connect)
    wanted = {spec.MANAGED_LABEL: "vlmflow", spec.RUN_LABEL: spec.label_value(run_id)}
    selector = ",".join(f"{name}={value}" for name, value in wanted.items())
    deleted = []
    for job in api.json("GET", path_of(config.namespace), {"labelSelector": selector}).get("items") or []:
        meta = job["metadata"]
        mine = wanted.items() <= (meta.get("labels") or {}).items()
        if not mine or condition(job, "Complete") or condition(job, "Failed") or meta.get("deletionTimestamp"):
            continue
        try:
            api.json("DELETE", path_of(config.namespace, meta["name"]), body=spec.deletion(meta["uid"]))
        except Refused as refused:
            if refused.status not in (404, 409):
                raise
            continue
        deleted.append(meta["name"])
    return deleted
