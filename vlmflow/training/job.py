"""What a training process needs to know, as one JSON file, and how it talks back, whoever launches it."""

from __future__ import annotations

import fcntl
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vlmflow import storage
from vlmflow.models import store
from vlmflow.recipe.mixture import DataUse
from vlmflow.recipe.stage import StageSpec

PREEMPTED = 75  # exit code after SIGTERM with a checkpoint written: run again to go on
EVENT = "\x1e"  # a line that starts with this is an event for the launcher


def emit(**event: Any) -> None:
    """Write one event line to standard output, for whoever launched this rank."""
    sys.stdout.write(EVENT + json.dumps(event) + "\n")
    sys.stdout.flush()


class Publication(BaseModel):
    """What rank 0 does with the trained model.

    Attributes:
        root: store prefix to publish under.
        name: name of the model.
        lineage: how its weights came to be.
    """

    model_config = ConfigDict(extra="forbid")

    root: str
    name: str
    lineage: store.ModelLineage


class Job(BaseModel):
    """One stage of training. Everything it names is a URI, so that a rank on another machine can run it.

    Attributes:
        label: name shown to people and put before metrics; decides nothing.
        key: train digest; names the checkpoints.
        model: URI of the initial model's reference (its ``model.json``).
        uses: ingredients with the URI of the dataset each takes from.
        plan: URI of the pack plan's JSON.
        scratch: local disk for caches, work files and the result; None = that of the machine (``VLMFLOW_SCRATCH``).
        checkpoints: URI prefix of this training's checkpoints.
        references: URI prefix of the log-probabilities that preferences are measured against (`reference.address`).
        tracking: experiment, run name and tags for MLflow.
        folder: URI prefix of this training's files: job, plan, log, table, errors.
        publication: where the model goes; None = it stays in `out`.
    """

    model_config = ConfigDict(extra="forbid")

    label: str
    key: str
    family: str
    model: str
    stage: StageSpec
    uses: list[tuple[DataUse, str]]
    plan: str
    seed: int
    scratch: str | None = None
    checkpoints: str
    references: str
    tracking: dict[str, Any] = {}
    folder: str
    publication: Publication | None = None

    @property
    def cache(self) -> Path:
        """Local disk of this machine."""
        return Path(self.scratch) if self.scratch else storage.default_scratch()

    @property
    def work(self) -> Path:
        """Local folder for the log, files on their way and the result; may be deleted between attempts."""
        return self.cache / "training" / self.key[:32]

    def fetch(self) -> None:
        """Bring what the job names to this machine. One process of a machine does it; the others wait and find it."""
        from vlmflow.training import plan_file

        self.work.mkdir(parents=True, exist_ok=True)
        with open(self.work / "fetch.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.model_folder()
            plan_file.load(self.plan, self.cache)

    def model_folder(self) -> Path:
        """The initial model on local disk. Files of a ``file://`` store were verified when the job was made."""
        ref = store.load_ref(self.model)
        return storage.local_path(ref.uri) or store.fetch(ref, self.cache)

    @property
    def out(self) -> Path:
        """Folder of the trained model."""
        return self.work / "out"

    @property
    def log(self) -> Path:
        """Training log of this attempt, earlier steps included."""
        return self.work / "train_log.jsonl"
