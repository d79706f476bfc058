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
import signal
import sys
from contextlib import suppress
from typing import Any

from vlmflow import storage
from vlmflow.errors import ServiceError, StorageError, VlmflowError
from vlmflow.training import failure
from vlmflow.training.job import EVENT, PREEMPTED, Job
from vlmflow.training.launch import Node, RankDied, TrainingPreempted, launch

UNKNOWN = 1


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

    told: list[int] = []  # SIGTERM before the ranks are there to be told, or after they ended
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    folder, who = uri.rsplit("/", 1)[0], "node-unknown"
    try:
        node = place()
        who = f"node-{node.number:05d}"
        failure.clear(folder, who)  # of this pod's predecessor
        job = Job.model_validate(storage.read_json(uri))
        if told:
            return PREEMPTED
        launch([uri], node, job.stage.threads, pass_on, lambda line: print(line, end="", flush=True))
    except TrainingPreempted as stopped:
        print(stopped, file=sys.stderr, flush=True)
        return PREEMPTED
    except VlmflowError as error:
        pass_on({"event": "error", "kind": type(error).__name__, "message": str(error)})
        with suppress(StorageError):  # the event in the log is what is left then
            failure.write(folder, who, error)
        # a rank that died without a word may have lost its peer or its GPU: worth a restart, unlike what it says itself
        return UNKNOWN if isinstance(error, RankDied) else error.exit_code
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the exit code is decided
    sys.exit(code)
