"""The end of a training: log and table beside the job, the model in the store, its marker last."""

from __future__ import annotations

from typing import Any

from vlmflow import storage
from vlmflow.models import store
from vlmflow.training.job import Job

LOG, SUMMARY = "train_log.jsonl", "trainable.json"


def publish(job: Job, summary: dict[str, Any]) -> None:
    """Put what rank 0 wrote into the store. Whoever waits for this training finds the model by the job's key.

    Args:
        summary: table of what was trained, report of the plan.
    """
    assert job.publication is not None
    storage.put_file(job.log, storage.join(job.folder, LOG))  # not among the model's files: it holds clock times
    storage.write_json(storage.join(job.folder, SUMMARY), summary)
    store.publish_under(job.publication.root, job.out, job.publication.name, job.publication.lineage, job.key)
