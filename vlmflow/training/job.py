"""What a training process needs to know, as one JSON file, and how it talks back, whoever launches it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vlmflow.dataset.manifest import Manifest
from vlmflow.recipe.mixture import DataUse
from vlmflow.recipe.stage import StageSpec

PREEMPTED = 75  # exit code after SIGTERM with a checkpoint written: run again to go on
EVENT = "\x1e"  # a line that starts with this is an event for the launcher


def emit(**event: Any) -> None:
    """Write one event line to standard output, for whoever launched this rank."""
    sys.stdout.write(EVENT + json.dumps(event) + "\n")
    sys.stdout.flush()


class Job(BaseModel):
    """One stage of training.

    Attributes:
        label: name shown to people and put before metrics; decides nothing.
        key: train digest; names the checkpoints.
        model: local folder of the initial model.
        work: local folder for prepared examples, plan, log and the result; may be deleted between attempts.
        checkpoints: URI prefix of this training's checkpoints.
        tracking: experiment, run name and tags for MLflow.
    """

    model_config = ConfigDict(extra="forbid")

    label: str
    key: str
    family: str
    model: str
    stage: StageSpec
    uses: list[tuple[DataUse, str]]
    seed: int
    work: str
    scratch: str
    checkpoints: str
    tracking: dict[str, Any] = {}

    def mixture(self) -> list[tuple[DataUse, Manifest]]:
        """Ingredients with their datasets; each distinct manifest is read once."""
        files = {path: Manifest.model_validate_json(Path(path).read_text()) for path in {p for _, p in self.uses}}
        return [(use, files[path]) for use, path in self.uses]

    @property
    def out(self) -> Path:
        """Folder of the trained model."""
        return Path(self.work) / "out"

    @property
    def log(self) -> Path:
        """Training log of this attempt, earlier steps included."""
        return Path(self.work) / "train_log.jsonl"
