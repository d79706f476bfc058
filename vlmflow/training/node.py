"""The ranks of one node of a TrainJob: the command of its pods.

``python -m vlmflow.training.node JOB_URI`` takes its place from the variables that Trainer's torch policy sets for
torchrun (``PET_*``). It is used instead of torchrun for three reasons: torchrun ends ranks 30 s after SIGTERM, in the
middle of a checkpoint; with a longer limit it would also wait that long for ranks that hang because another died; and
it exits with 1 whatever happened, so the cluster could not tell bad input from a lost node. The worker itself runs under
torchrun as well.

Ranks' lines go to the pod's log, events of rank 0 among them. What ended the ranks is left in the store, under the
training's folder, for the launcher.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any

from vlmflow import storage
from vlmflow.errors import ServiceError, StorageError, VlmflowError
from vlmflow.training import failure
from vlmflow.training.job import EVENT, Job
from vlmflow.training.launch import Node, TrainingPreempted, launch


def place() -> Node:
    """This node's place. Raises ServiceError when the torch policy's variables are missing or no numbers."""
    names = ("PET_NPROC_PER_NODE", "PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in names}
    wrong = [name for name in names if name != "PET_MASTER_ADDR" and not values[name].isdigit()]
    if wrong or not values["PET_MASTER_ADDR"]:
        raise ServiceError(
            f"this pod does not know its place among the nodes: {values}. The TrainingRuntime must have `mlPolicy.torch`, and "
            "the TrainJob numNodes and numProcPerNode."
        )
    ranks, nodes, number, port = (int(values[name]) for name in names if name != "PET_MASTER_ADDR")
    return Node(ranks, nodes, number, (values["PET_MASTER_ADDR"], port))


def main(uri: str) -> int:
    """Run this node's ranks; returns the exit code of the pod."""

    def pass_on(event: dict[str, Any]) -> None:
        print(EVENT + json.dumps(event), flush=True)

    folder = uri.rsplit("/", 1)[0]
    who = "node-unknown"
    try:
        node = place()
        who = f"node-{node.number:05d}"
        failure.clear(folder, who)  # of this pod's predecessor
        job = Job.model_validate(storage.read_json(uri))
        launch([uri], node, job.stage.threads, pass_on, lambda line: print(line, end="", flush=True))
    except TrainingPreempted as stopped:
        print(stopped, file=sys.stderr, flush=True)
        return stopped.exit_code
    except VlmflowError as error:
        pass_on({"event": "error", "kind": type(error).__name__, "message": str(error)})
        with suppress(StorageError):  # the event in the log is what is left then
            failure.write(folder, who, error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
