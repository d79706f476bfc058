"""The TrainingRuntime that vlmflow's TrainJobs refer to.

None of Trainer's stock runtimes restarts anything. This one restarts the whole JobSet, because ranks cannot rejoin a
training that goes on; the ranks then continue from the newest complete checkpoint.

- A node that was taken away (drain, spot, preemption) costs nothing of `restarts`.
- A rank that ended with bad input (exit codes 2 and 4 of vlmflow.errors) fails at once: a restart would meet it again.
- Anything else (an out-of-memory kill, a network error, a lost GPU) is restarted up to `restarts` times.

``python -m vlmflow.training.trainjob.runtime IMAGE`` prints it as YAML.
"""

from __future__ import annotations

import sys
from typing import Any

from vlmflow.training.trainjob.schema import API_VERSION
from vlmflow.training.trainjob.spec import MANAGED_LABEL, MOUNTS, NODE

PERMANENT = [2, 4]  # exit codes of errors that come again: recipe, data, model, checkpoint; a failed step
RESTARTS = 5
GRACE_SECONDS = 600


def training_runtime(
    image: str,
    name: str = "vlmflow-train",
    kind: str = "TrainingRuntime",
    restarts: int = RESTARTS,
    user: int = 10001,
) -> dict[str, Any]:
    """The runtime as a dictionary.

    Args:
        image: training image, by digest in production.
        kind: TrainingRuntime or ClusterTrainingRuntime.
        restarts: how often one TrainJob is restarted for other reasons than a lost node.
        user: numeric id that the image runs as; Kubernetes refuses to guess it.
    """
    metadata: dict[str, Any] = {
        "name": name,
        "labels": {MANAGED_LABEL: "vlmflow", "trainer.kubeflow.org/framework": "torch"},
    }
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": metadata,
        "spec": {
            "mlPolicy": {"numNodes": 1, "torch": {}},
            "template": {
                "spec": {
                    # the first node's address is looked up before its pod is ready
                    "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                    "failurePolicy": {"maxRestarts": restarts, "restartStrategy": "Recreate", "rules": _RESTART_RULES},
                    "replicatedJobs": [{"name": NODE, "replicas": 1, "template": _job(image, user)}],
                }
            },
        },
    }


# Kubernetes words both as "... matching FailJob rule at index N"; N is the rule's place in `podFailurePolicy`.
_RESTART_RULES = [
    {
        "name": "badInput",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": ["rule at index 0$"],
    },
    {
        "name": "lostNode",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": ["rule at index 1$"],
    },
]
_POD_RULES = [
    {"action": "FailJob", "onExitCodes": {"containerName": NODE, "operator": "In", "values": PERMANENT}},
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
]


def _job(image: str, user: int) -> dict[str, Any]:
    return {
        "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
        "spec": {
            "backoffLimit": 0,  # a single pod cannot be replaced; the JobSet restarts all
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _POD_RULES},
            "template": {"spec": _pod(image, user)},
        },
    }


def _pod(image: str, user: int) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "scratch", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
        ],
        "containers": [
            {
                "name": NODE,
                "image": image,
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": name, "mountPath": path} for name, path in MOUNTS.items()],
            }
        ],
    }


if __name__ == "__main__":
    import yaml

    yaml.safe_dump(training_runtime(sys.argv[1]), sys.stdout, sort_keys=False)
