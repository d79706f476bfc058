"""Compile a pipeline to the package that Kubeflow takes, and refuse what would break in one of its runners.

KFP accepts pipelines that later fail in the local runner, in a restricted cluster or in the UI (platform.md 1.2: L1-L13).
Each known trap is a rule in `vlmflow/compiler_rules.py`; `compile_pipeline` runs all of them. The compiler also writes
what KFP's own cannot: `literals` (menus in the UI; platform.md 1.4) and the released image in the place of the name
used in the source.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlmflow.compiler_rules import RULES, Finding
from vlmflow.errors import VlmflowError
from vlmflow.installation import Installation, apply

PIPELINES = ("curate", "evaluate", "export", "points", "promote", "soup", "train")


@dataclass(frozen=True)
class Package:
    """A compiled pipeline: `spec` is the IR, `platform` the Kubernetes half, `text` both as a YAML package."""

    spec: dict[str, Any]
    platform: dict[str, Any]
    text: str


def compile_pipeline(
    name: str, image: str | None = None, require_digest: bool = False, installation: Installation | None = None
) -> Package:
    """Compile a pipeline by name and check it.

    Args:
        installation: node pools, secrets and images of the cluster that the package is for.
        image: image put in the place of the one named in the source, e.g. ``registry/vlmflow@sha256:...``; steps that the
            installation names an image for keep theirs.
        require_digest: refuse images that are not pinned by digest (platform.md 9.2).

    Raises:
        VlmflowError: unknown pipeline, or rules broken; the message lists every finding.
    """
    if name not in PIPELINES:
        raise VlmflowError(f"there is no pipeline '{name}'; there are: {', '.join(PIPELINES)}")
    module = importlib.import_module(f"pipelines.{name}")
    package = compile_function(getattr(module, name), getattr(module, "LITERALS", {}), image, installation)
    findings = check(package, require_digest)
    if installation is not None and installation.images:  # several images are what was asked for
        findings = [finding for finding in findings if finding.rule != "one-image"]
    if findings:
        lines = "\n".join(f"  {finding}" for finding in findings)
        raise VlmflowError(
            f"pipeline '{name}' breaks {len(findings)} rule(s); each fails in some runner of Kubeflow:\n{lines}"
        )
    return package


def compile_function(
    pipeline: Any,
    literals: dict[str, list[Any]] | None = None,
    image: str | None = None,
    installation: Installation | None = None,
) -> Package:
    """Compile one `@dsl.pipeline` function without checking it. Raises VlmflowError for literals of no parameter."""
    import json

    from google.protobuf import json_format

    spec = json_format.MessageToDict(pipeline.pipeline_spec)
    platform = json_format.MessageToDict(pipeline.platform_spec)
    parameters = spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    for parameter, values in (literals or {}).items():
        if parameter not in parameters:
            raise VlmflowError(f"literals name the parameter '{parameter}', the pipeline has: {sorted(parameters)}")
        parameters[parameter]["literals"] = list(values)
    if image or installation is not None:
        asked = installation or Installation.model_validate({})
        apply(asked.model_copy(update={"image": image or asked.image}), spec, platform)
    # through JSON: no YAML anchors, and integers as integers
    documents = [json.loads(json.dumps(part)) for part in (spec, platform) if part]
    text = yaml.safe_dump_all(documents, sort_keys=True, width=120, allow_unicode=True)
    return Package(spec, platform, text)


def executors(spec: dict[str, Any]) -> dict[str, Any]:
    """Executor name -> executor of a compiled pipeline."""
    return spec.get("deploymentSpec", {}).get("executors", {})


def check(package: Package, require_digest: bool = False) -> list[Finding]:
    """Every rule that the package breaks, in a stable order."""
    findings: list[Finding] = []
    for rule in RULES:
        if rule.name == "image-digest" and not require_digest:
            continue
        findings += [Finding(rule.name, where, why) for where, why in rule.check(package.spec, package.platform)]
    return findings


def write(package: Package, path: str | Path) -> Path:
    """Write the YAML package atomically and return its path."""
    from vlmflow import storage

    target = Path(path).absolute()
    storage.write_bytes(target.as_uri(), package.text.encode())
    return target
