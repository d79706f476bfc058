"""The TrainJob of one stage as a plain dictionary: the only place that knows how that API is spelled.

The name follows from the store and the train digest alone. Whoever asks for the same training at the same time (a
retried task, another run of the same recipe) meets the TrainJob that is there and waits for it; two would write the
same checkpoints.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from vlmflow.digest import digest
from vlmflow.training.trainjob import config as settings

if TYPE_CHECKING:
    from vlmflow.training.launchers import LaunchRequest
    from vlmflow.training.trainjob.config import Pool, Shape, TrainJobConfig

GROUP, VERSION, PLURAL, KIND = "trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob"
MANAGER = "vlmflow.io/launcher"  # owner of our runtimePatches; Kueue writes others beside them
NODE = "node"  # name of the replicated job and of its container in every torch runtime
KEY_LABEL, RUN_LABEL, MANAGED_LABEL = "vlmflow.io/train-key", "vlmflow.io/run", "app.kubernetes.io/managed-by"
QUEUE_LABEL, PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
KILLED_AFTER = 15  # a checkpoint's time ends these seconds before the pod's
MOUNTS = {"shm": "/dev/shm", "scratch": "/scratch", "tmp": "/tmp"}
CACHES = {  # the root file system is read-only
    "VLMFLOW_SCRATCH": "/scratch",
    "HOME": "/tmp",
    "HF_HOME": "/scratch/hf",
    "TORCHINDUCTOR_CACHE_DIR": "/scratch/inductor",
    "TRITON_CACHE_DIR": "/scratch/triton",
}
# Which MLflow run this task is; set by Kubeflow Pipelines. No credential is among them.
FORWARDED = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_WORKSPACE")


def name_of(request: LaunchRequest) -> str:
    """Name of the TrainJob: at most 40 characters, because Kubernetes appends to it up to 63 for host names."""
    slug = re.sub(r"[^a-z0-9]+", "-", request.label.lower()).strip("-")[:18].strip("-")
    return "-".join(filter(None, ["vlmflow", slug, digest([request.folder, request.key])[:12]]))


def label_value(text: str) -> str:
    """``text`` as a Kubernetes label value (63 characters of letters, digits, ``-_.``)."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:63].strip("-_.")


def train_job(request: LaunchRequest, config: TrainJobConfig, shape: Shape) -> dict[str, Any]:
    """The TrainJob that runs ``request`` on nodes of this installation."""
    _, pool = config.pool(request.stage)
    labels = {
        MANAGED_LABEL: "vlmflow",
        KEY_LABEL: label_value(request.key),
        RUN_LABEL: label_value(request.run_id),
    }
    if pool.queue:
        labels[QUEUE_LABEL] = pool.queue
    if pool.priority:
        labels[PRIORITY_LABEL] = pool.priority
    trainer: dict[str, Any] = {
        # our own node agent instead of torchrun, which ends a node's ranks after 30 s and exits with 1 whatever failed
        "command": ["python", "-m", "vlmflow.training.node", request.job],
        "env": _environment(request, config),
        "numNodes": shape.nodes,
        "numProcPerNode": shape.processes,  # left out, Trainer starts one process a CPU core where there is no GPU
        "resourcesPerNode": _resources(pool, shape),
    }
    if config.image:
        trainer["image"] = config.image
    spec: dict[str, Any] = {
        "runtimeRef": {"apiGroup": GROUP, "kind": config.runtime_kind, "name": config.runtime},
        "activeDeadlineSeconds": config.deadline_seconds,
        "trainer": trainer,
        "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": _patch(config, pool)}],
    }
    if pool.queue:
        spec["suspend"] = True  # Kueue starts it
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {
            "name": name_of(request),
            "namespace": config.namespace,
            "labels": labels,
            "annotations": {
                "vlmflow.io/train-key": request.key,
                "vlmflow.io/run-id": request.run_id,
                "vlmflow.io/stage": request.label,
                "vlmflow.io/job": request.job,
            },
        },
        "spec": spec,
    }


def _environment(request: LaunchRequest, config: TrainJobConfig) -> list[dict[str, Any]]:
    env: dict[str, dict[str, Any]] = {}
    for key, name in settings.CONFIG_KEYS.items():
        env[name] = {"configMapKeyRef": {"name": settings.CONFIG_MAP, "key": key, "optional": True}}
    secrets = {settings.STORE_SECRET: settings.STORE_KEYS, settings.MLFLOW_SECRET: settings.MLFLOW_KEYS}
    for secret, keys in secrets.items():
        for key, name in keys.items():
            env[name] = {"secretKeyRef": {"name": config.secrets.get(secret, secret), "key": key, "optional": True}}
    entries: dict[str, dict[str, Any]] = {name: {"name": name, "valueFrom": source} for name, source in env.items()}
    plain = {**CACHES, "PYTHONUNBUFFERED": "1", "VLMFLOW_RUN_ID": request.run_id}
    plain["VLMFLOW_TRAIN_GRACE"] = str(config.grace_seconds - KILLED_AFTER)
    plain |= {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    entries |= {name: {"name": name, "value": value} for name, value in plain.items()}
    entries |= {entry["name"]: entry for entry in config.env}
    return list(entries.values())


def _resources(pool: Pool, shape: Shape) -> dict[str, Any]:
    memory = quantity(pool.memory_gib * shape.processes + pool.shm_gib)
    limits: dict[str, Any] = {"memory": memory}
    if pool.gpus:
        limits[pool.gpu_resource] = str(shape.processes)
    cpu = f"{round(pool.cpus * shape.processes * 1000)}m"
    return {"limits": limits, "requests": {**limits, "cpu": cpu}}


def quantity(gib: float) -> str:
    """GiB as a Kubernetes quantity in MiB."""
    return f"{round(gib * 1024)}Mi"


def _patch(config: TrainJobConfig, pool: Pool) -> dict[str, Any]:
    """What the runtime's pods get from this installation. The container's environment cannot be patched here."""
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": quantity(pool.shm_gib)}},
        {"name": "scratch", "emptyDir": {"sizeLimit": quantity(pool.scratch_gib)}},
        {"name": "tmp", "emptyDir": {}},
    ]
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": config.grace_seconds,
        "volumes": volumes,
        "containers": [
            {"name": NODE, "volumeMounts": [{"name": name, "mountPath": path} for name, path in MOUNTS.items()]}
        ],
    }
    if pool.node_selector:
        pod["nodeSelector"] = dict(pool.node_selector)
    if pool.tolerations:
        pod["tolerations"] = [dict(toleration) for toleration in pool.tolerations]
    if config.service_account:
        pod["serviceAccountName"] = config.service_account
    if config.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in config.image_pull_secrets]
    return {
        "template": {"spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}]}}
    }


def deletion(uid: str) -> dict[str, Any]:
    """Delete this object and no other of its name, and keep its name taken until its pods are gone."""
    options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
    return options | {"preconditions": {"uid": uid}}
