"""What an installation says about its cluster: which runtime, which pools of nodes, which queue.

It comes from ``VLMFLOW_TRAINJOB_CONFIG`` (YAML or JSON text, or the path of such a file), which the platform mounts
beside the endpoints. A recipe knows none of it; it only says how many processes a stage has.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vlmflow.errors import RecipeError, ServiceError

VARIABLE = "VLMFLOW_TRAINJOB_CONFIG"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

# Endpoints and credentials of the training pods: the same ConfigMap and Secret that the pipeline's tasks use. Only
# names of keys are ever written into a TrainJob, never a value.
CONFIG_MAP = "vlmflow"
CONFIG_KEYS = {
    "root": "VLMFLOW_ROOT",
    "s3Endpoint": "VLMFLOW_S3_ENDPOINT",
    "s3Region": "AWS_REGION",
    "mlflowTrackingUri": "MLFLOW_TRACKING_URI",
}
STORE_SECRET = "mlpipeline-minio-artifact"
STORE_KEYS = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
MLFLOW_SECRET = "vlmflow-mlflow"
MLFLOW_KEYS = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}


class Shape(NamedTuple):
    """How many nodes, and how many processes on each."""

    nodes: int
    processes: int


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pool(_Strict):
    """Equal nodes that a stage may be trained on."""

    gpus: int = Field(8, ge=0, description="GPUs of one node; one process each. 0 = CPU processes")
    processes: int = Field(1, ge=1, description="processes of one node where gpus is 0")
    shared: bool = Field(False, description="a training smaller than one node may take a part of it")
    gpu_resource: str = Field("nvidia.com/gpu", description="name of the GPU resource")
    cpus: float = Field(4.0, gt=0, description="CPU cores requested for each process")
    memory_gib: float = Field(32.0, gt=0, description="memory of each process, GiB; requested and limit")
    shm_gib: float = Field(8.0, gt=0, description="/dev/shm of a node, GiB; counts as memory")
    scratch_gib: float = Field(200.0, gt=0, description="local disk of a node for models and shards, GiB")
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels that the nodes carry")
    tolerations: list[dict[str, Any]] = Field(default_factory=list, description="taints that the pods tolerate")
    queue: str = Field("", description="Kueue LocalQueue; empty = no queue")
    priority: str = Field("", description="Kueue WorkloadPriorityClass")

    def shape(self, processes: int, name: str) -> Shape:
        """Nodes for ``processes`` ranks. Raises RecipeError when they do not fill nodes of this pool."""
        width = self.gpus or self.processes
        if processes % width == 0:
            return Shape(processes // width, width)
        if self.shared and processes < width:
            return Shape(1, processes)
        what = f"{width} GPUs" if self.gpus else f"{width} CPU processes"
        below = processes - processes % width
        fits = [*([below] if below else []), below + width, *([below + 2 * width] if not below else [])]
        hint = "" if self.shared else " (or let the installation set `shared: true` for less than one node)"
        raise RecipeError(
            f"processes: {processes} were asked for, but a node of pool '{name}' has {what} and is given whole: "
            f"{-processes % width} of them would stand idle and be paid for. Use {fits[0]} or {fits[1]}{hint}."
        )


class TrainJobConfig(_Strict):
    """Settings of the TrainJob launcher."""

    namespace: str = Field("", description="where TrainJobs are made; empty = the namespace of this pod")
    runtime: str = Field("vlmflow-train", description="TrainingRuntime that the jobs refer to")
    runtime_kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"] = Field(
        "TrainingRuntime", description="kind of that runtime"
    )
    image: str = Field("", description="training image; empty = the image of the runtime")
    service_account: str = Field("", description="service account of the training pods")
    image_pull_secrets: list[str] = Field(default_factory=list, description="secrets for the image registry")
    secrets: dict[str, str] = Field(
        default_factory=dict, description="name of a secret in this file -> its name in this installation"
    )
    deadline_seconds: int = Field(
        14 * 86400, ge=60, le=2**31 - 1, description="a running TrainJob is ended after this; queueing does not count"
    )
    grace_seconds: int = Field(600, ge=30, description="time for a checkpoint between SIGTERM and SIGKILL, s")
    patience_seconds: float = Field(
        3600, gt=0, description="how long the Kubernetes API may be out of reach before the launcher gives up, s"
    )
    env: list[dict[str, Any]] = Field(
        default_factory=list, description="more environment of the training pods, as Kubernetes EnvVars"
    )
    pools: dict[str, Pool] = Field(
        default_factory=lambda: {"default": Pool()},
        description="pools by name of a stage; `default` is for every stage without one of its own",
    )

    @field_validator("pools")
    @classmethod
    def _has_default(cls, pools: dict[str, Pool]) -> dict[str, Pool]:
        if "default" not in pools:
            raise ValueError(
                f"there is no pool 'default' among {sorted(pools)}; stages without a pool of their own need it"
            )
        return pools

    @field_validator("env")
    @classmethod
    def _no_secret_values(cls, env: list[dict[str, Any]]) -> list[dict[str, Any]]:
        words = ("SECRET", "PASSWORD", "TOKEN", "KEY")
        for entry in env:
            name = str(entry.get("name", ""))
            if "value" in entry and any(word in name.upper() for word in words):
                raise ValueError(
                    f"'{name}' is given as a value; anyone who may read the TrainJob would read it. Use valueFrom.secretKeyRef"
                )
        return env

    def pool(self, stage: str) -> tuple[str, Pool]:
        """(name, pool) of a stage."""
        name = stage if stage in self.pools else "default"
        return name, self.pools[name]

    def shape(self, stage: str, processes: int) -> Shape:
        """Nodes of a stage. Raises RecipeError when its processes do not fill nodes."""
        name, pool = self.pool(stage)
        return pool.shape(processes, name)


def from_environment() -> TrainJobConfig:
    """Settings of this installation.

    Raises:
        ServiceError: they are not YAML, have an unknown or wrong field (named), or no namespace is known.
    """
    text = os.environ.get(VARIABLE, "")
    if text.startswith("/"):
        path = Path(text)
        if not path.is_file():
            raise ServiceError(f"{VARIABLE} names {path}, which is not a file; mount the installation's settings there")
        text = path.read_text(encoding="utf-8")
    try:
        config = TrainJobConfig.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise ServiceError(f"{VARIABLE} is not YAML: {error}") from error
    except ValidationError as error:
        problems = "".join(f"\n  - {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ServiceError(f"{VARIABLE} has wrong settings:{problems}") from error
    if config.namespace:
        return config
    if not NAMESPACE_FILE.is_file():
        raise ServiceError(
            f"no namespace: {VARIABLE} names none and this process does not run in a pod ({NAMESPACE_FILE} is missing). "
            "Set `namespace`, or train with VLMFLOW_TRAIN_LAUNCHER=local."
        )
    return config.model_copy(update={"namespace": NAMESPACE_FILE.read_text(encoding="utf-8").strip()})
