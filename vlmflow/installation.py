"""Platform configuration of an installation: where the steps of its pipelines run, in which images, with which secrets.

It is compiled into the packages that this installation registers, so neither a recipe nor the form in the UI decides
about machines or names a secret (DESIGN 6). Settings are merged into the compiled package as plain data.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from vlmflow.errors import RecipeError
from vlmflow.recipe.base import Name, Section

VARIABLE = "VLMFLOW_INSTALLATION"  # JSON
Plain = dict[str, Any]


class Toleration(Section):
    """As in Kubernetes."""

    key: str = Field(description="key of the taint")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="Exists: any value")
    value: str = Field("", description="value, for Equal")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field("", description="empty = all effects")


class NodePool(Section):
    """Machines for a kind of step, and what one task takes of a machine."""

    node_selector: dict[str, str] = Field(default_factory=dict, description="labels of the nodes")
    tolerations: list[Toleration] = Field(default_factory=list, description="taints of the nodes that are tolerated")
    cpu: str = Field("", description="CPU requested, such as 4 or 500m; empty = the namespace's default")
    memory: str = Field("", description="memory requested and limit, such as 16Gi; empty = the namespace's default")
    accelerator: str = Field("", description="resource name, such as nvidia.com/gpu; empty = none")
    accelerators: int = Field(1, ge=1, le=16, description="how many of it a task takes")
    shared_memory: str = Field("", description="size of /dev/shm, such as 8Gi; empty = as much as the task's memory")


# Secrets by the names that pipelines/platform.py gives them; a test holds both together.
SECRETS = ("mlpipeline-minio-artifact", "vlmflow-endpoints", "vlmflow-mlflow", "vlmflow-promoter")


# Steps that need no torch run in the image vlmflow-data, a third of the other's size; a test imports them without torch.
DATA_STEPS = ("clean", "deal", "dedup", "finish", "fuse", "groups", "keep", "merge", "promote", "pull")
OCR_STEPS = ("ocr",)


class Installation(Section):
    """What `vlmflow compile --installation` reads. Steps are named as their files in `components/`."""

    image: str = Field("", description="image of all steps; empty = the one in the source")
    images: dict[Name, str] = Field(default_factory=dict, description="image by step, where it is another one")
    pull_secrets: list[str] = Field(default_factory=list, description="names of image pull secrets")
    config_map: str = Field("vlmflow", min_length=1, description="name of the ConfigMap with endpoints")
    secrets: dict[str, str] = Field(
        default_factory=dict, description="name of a Secret in pipelines/platform.py -> its name in this installation"
    )
    pools: dict[Name, NodePool] = Field(default_factory=dict, description="node pools by name")
    steps: dict[Name, Name] = Field(default_factory=dict, description="step -> pool")
    default_pool: str = Field("", description="pool of the other steps; empty = wherever there is room")

    @model_validator(mode="after")
    def _consistent(self) -> Installation:
        named = {**self.steps, **({"default_pool": self.default_pool} if self.default_pool else {})}
        if unknown := {step: pool for step, pool in named.items() if pool not in self.pools}:
            raise ValueError(f"pools that are not defined: {unknown}; defined are {sorted(self.pools)}")
        if strangers := sorted(set(self.secrets) - set(SECRETS)):
            raise ValueError(f"secrets {strangers} are used by no step; the steps use {list(SECRETS)}")
        for image in filter(None, [self.image, *self.images.values()]):
            if floats(image):
                raise ValueError(f"image '{image}' floats; name a version or a digest")
        return self

    def pool(self, step: str) -> NodePool | None:
        """The pool of a step, or None."""
        name = self.steps.get(step, self.default_pool)
        return self.pools[name] if name else None


def with_images(asked: Installation | None, image: str, data: str = "", ocr: str = "") -> Installation:
    """The installation with the images of a release: `image` for all steps but those that `data` and `ocr` are made for.
    What the installation itself says of a step wins."""
    asked = asked or Installation.model_validate({})
    steps = {**dict.fromkeys(DATA_STEPS, data), **dict.fromkeys(OCR_STEPS, ocr)}
    images = {**{step: name for step, name in steps.items() if name}, **asked.images}
    return Installation.model_validate({**asked.model_dump(), "image": image or asked.image, "images": images})


def from_environment() -> Installation | None:
    """What the bootstrap job was given, or None. Raises RecipeError when it is none."""
    text = os.environ.get(VARIABLE, "")
    try:
        return Installation.model_validate_json(text) if text else None
    except ValidationError as error:
        raise RecipeError(f"{VARIABLE} is not the platform configuration of an installation: {error}") from error


def load(path: str | Path) -> Installation:
    """Read a YAML or JSON file. Raises RecipeError naming the field that is wrong."""
    import yaml

    try:
        return Installation.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise RecipeError(f"{path} is not the platform configuration of an installation: {error}") from error


def floats(image: str) -> bool:
    """Whether an image's name may mean another image tomorrow."""
    return image.endswith(":latest") or (":" not in image.rsplit("/", 1)[-1] and "@" not in image)


def step_of(executor: str) -> str:
    """Name of the component that an executor of a compiled pipeline runs: exec-ocr-2 -> ocr."""
    return re.sub(r"-\d+$", "", executor.removeprefix("exec-"))


def apply(asked: Installation, spec: Plain, platform: Plain) -> None:
    """Write the installation's settings into a compiled pipeline (both halves of its IR, changed in place).

    A Secret that this pipeline does not use is left out: others may.
    """
    settings = (
        platform.setdefault("platforms", {}).setdefault("kubernetes", {}).setdefault("deploymentSpec", {}).setdefault("executors", {})
    )  # fmt: skip
    for name, executor in spec.get("deploymentSpec", {}).get("executors", {}).items():
        step, own = step_of(name), settings.setdefault(name, {})
        if image := asked.images.get(step, asked.image):
            executor["container"]["image"] = image
        for each in own.get("configMapAsEnv", []):
            _rename(each, "configMapName", asked.config_map)
        for each in own.get("secretAsEnv", []):
            _rename(each, "secretName", asked.secrets.get(each["secretName"], each["secretName"]))
        if asked.pull_secrets:
            own["imagePullSecret"] = [_rename({}, "secretName", secret) for secret in asked.pull_secrets]
        if pool := asked.pool(step):
            _place(pool, executor["container"], own)


def _rename(entry: Plain, field: str, name: str) -> Plain:
    entry[field] = name
    entry[f"{field}Parameter"] = {"runtimeValue": {"constant": name}}
    return entry


def _place(pool: NodePool, container: Plain, own: Plain) -> None:
    if pool.node_selector:
        own["nodeSelector"] = {"labels": dict(pool.node_selector)}
    if pool.tolerations:
        own["tolerations"] = [
            {name: value for name, value in each.model_dump().items() if value} for each in pool.tolerations
        ]
    resources: Plain = {}
    if pool.cpu:
        resources["resourceCpuRequest"] = pool.cpu
    if pool.memory:
        resources |= {"resourceMemoryRequest": pool.memory, "resourceMemoryLimit": pool.memory}
    if pool.accelerator:
        resources["accelerator"] = {"resourceType": pool.accelerator, "resourceCount": str(pool.accelerators)}
    if resources:
        container["resources"] = resources
    if pool.shared_memory:
        for mount in own.get("emptyDirMounts", []):
            if mount.get("mountPath") == "/dev/shm":
                mount["sizeLimit"] = pool.shared_memory
