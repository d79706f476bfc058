"""Where ranks run: chosen by the installation, never by a recipe.

``VLMFLOW_TRAIN_LAUNCHER`` names one of `LAUNCHERS` (default ``local``). The training step hands over a request and gets
events back; afterwards it looks in the store for the model, so that it need not know where it was trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmflow import storage
from vlmflow.errors import ServiceError

VARIABLE = "VLMFLOW_TRAIN_LAUNCHER"
OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class LaunchRequest:
    """One training to be run.

    Attributes:
        folder: URI of this training's files; ``job.json`` in it is the job.
        model: URI that exists once the model is published.
        key: train digest.
        label: stage (and candidate) as people see it.
        stage: name of the stage; installations may have a node pool for it.
        processes: ranks over all nodes.
        threads: CPU threads of one rank.
        run_id: who asks, for labels; decides nothing.
        scratch: local disk of this machine, for ranks that run here.
    """

    folder: str
    model: str
    key: str
    label: str
    stage: str
    processes: int
    threads: int
    run_id: str
    scratch: Path

    @property
    def job(self) -> str:
        """URI of the job."""
        return storage.join(self.folder, "job.json")


def _local(request: LaunchRequest, on_event: OnEvent) -> None:
    from vlmflow.training.launch import launch

    environment = {"VLMFLOW_SCRATCH": str(request.scratch.resolve())}
    launch([request.job], request.processes, request.threads, on_event, environment=environment)


def _trainjob(request: LaunchRequest, on_event: OnEvent) -> None:
    from vlmflow.training.trainjob.launch import launch

    launch(request, on_event)


LAUNCHERS: dict[str, Callable[[LaunchRequest, OnEvent], None]] = {"local": _local, "trainjob": _trainjob}


def chosen() -> str:
    """Name of this installation's launcher. Raises ServiceError for an unknown one."""
    name = os.environ.get(VARIABLE) or "local"
    if name not in LAUNCHERS:
        raise ServiceError(f"{VARIABLE} is '{name}'; known launchers are {list(LAUNCHERS)}")
    return name


def launch(request: LaunchRequest, on_event: OnEvent) -> None:
    """Run the ranks to their end; `on_event` gets what rank 0 reports.

    Raises:
        TrainingPreempted: stopped by SIGTERM with a checkpoint written.
        VlmflowError: what a rank reported, as its own class; else StepFailed or ServiceError with what is known.
    """
    LAUNCHERS[chosen()](request, on_event)
