"""The rules a compiled pipeline must keep: traps of KFP 2.17 that were measured (platform.md 1.2, numbers L1-L13), and
norms of security and operation (platform.md 7, 9.2).

A rule is a function from (pipeline spec, platform spec), both as plain dicts of the IR, to (where, why) pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vlmflow.installation import floats, step_of

Spec = dict[str, Any]
Findings = Iterator[tuple[str, str]]

# Steps whose answer depends on the world outside their inputs: a cached answer would be a lie.
UNCACHED = (
    "preflight",
    "contestants",
    "evaluate",
    "scoreboard",
    "register",
    "export",
    "report",
    "verify",
    "promote",
    "finish",
)
ARGUMENT_LIMIT = 64 * 1024  # bytes; Linux refuses one argument over 128 KiB (platform.md 1.1), and it holds all inputs
_PRIVATE = re.compile(r"(^|_)(endpoint|token|password|passwd|secret|credentials?|api_key|access_key|tracking_uri)($|_)")
_QUOTED = re.compile(r"inputs\.parameter_values\['[^']+'\]")


class Finding(NamedTuple):
    """A rule that is broken, where, and why it matters."""

    rule: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.where}: {self.why}"


class Rule(NamedTuple):
    """A named check."""

    name: str
    check: Callable[[Spec, Spec], Findings]


def _executors(spec: Spec) -> dict[str, Spec]:
    return spec.get("deploymentSpec", {}).get("executors", {})


def _dags(spec: Spec) -> Iterator[tuple[str, Spec]]:
    yield "root", spec.get("root", {})
    for name, component in spec.get("components", {}).items():
        if "dag" in component:
            yield name, component


def _tasks(spec: Spec) -> Iterator[tuple[str, Spec, Spec]]:
    """(place, task, component) of every task of every DAG."""
    for dag, component in _dags(spec):
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            yield f"{dag}/{name}", task, spec["components"].get(task.get("componentRef", {}).get("name", ""), {})


def _parameters(spec: Spec) -> Iterator[tuple[str, str, Spec]]:
    yield from (
        ("root", n, p) for n, p in spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {}).items()
    )
    for component, body in spec.get("components", {}).items():
        for name, parameter in body.get("inputDefinitions", {}).get("parameters", {}).items():
            yield component, name, parameter


def lightweight_only(spec: Spec, platform: Spec) -> Findings:
    """L2, L11, platform.md 1.1: only lightweight components run in all three runners; importers resolve no URI."""
    for name, executor in _executors(spec).items():
        if "importer" in executor:
            yield name, "an importer does not resolve s3:// or file:// locally (L11); let a component read the URI"
        elif "kfp.dsl.executor_main" not in " ".join(executor.get("container", {}).get("command", [])):
            yield name, "not a lightweight component; the local runner refuses it, its artifacts stay invisible (L2)"


def no_pip_install(spec: Spec, platform: Spec) -> Findings:
    """platform.md 1.1: `pip install kfp` in every task is slow and breaks air-gapped clusters."""
    for name, executor in _executors(spec).items():
        if "pip install" in " ".join(executor.get("container", {}).get("command", [])):
            yield name, "installs packages at start; set install_kfp_package=False and put them in the image"


def one_image(spec: Spec, platform: Spec) -> Findings:
    """All steps run one image, so that one digest says which code made a model."""
    images = {name: e["container"].get("image", "") for name, e in _executors(spec).items() if "container" in e}
    if len(set(images.values())) > 1:
        yield "deploymentSpec", f"several images {sorted(set(images.values()))}; set base_image of every component"
    for name, image in images.items():
        if floats(image):
            yield name, f"image '{image}' floats; name a version or a digest"


def image_digest(spec: Spec, platform: Spec) -> Findings:
    """platform.md 9.2: production packages pin images by digest. Checked on request."""
    for name, executor in _executors(spec).items():
        image = executor.get("container", {}).get("image", "")
        if not re.search(r"@sha256:[0-9a-f]{64}$", image):
            yield name, f"image '{image}' has no @sha256: digest"


def described(spec: Spec, platform: Spec) -> Findings:
    """platform.md 1.4: the UI shows descriptions from the docstring's Args section."""
    if not spec.get("pipelineInfo", {}).get("description"):
        yield "root", "the pipeline has no description; write a docstring"
    for name, parameter in spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {}).items():
        if not parameter.get("description"):
            yield f"root/{name}", "parameter without description; add it to the docstring's Args section"


def no_none(spec: Spec, platform: Spec) -> Findings:
    """L4: a parameter whose value is None crashes the local runner."""
    for component, name, parameter in _parameters(spec):
        given_by_kfp = parameter.get("parameterType") == "TASK_FINAL_STATUS"  # of an exit handler
        if parameter.get("isOptional") and parameter.get("defaultValue") is None and not given_by_kfp:
            yield f"{component}/{name}", "the default is None (L4); use '', 0 or {} to say 'not given'"


def own_name(spec: Spec, platform: Spec) -> Findings:
    """A pipeline that is named like one of its components: kfp's loader takes the component for the whole package."""
    name = spec.get("pipelineInfo", {}).get("name", "")
    if f"comp-{name}" in spec.get("components", {}):
        yield "pipelineInfo", f"the pipeline and one of its components are both named '{name}'; rename the pipeline"


def literal_defaults(spec: Spec, platform: Spec) -> Findings:
    """A default outside of its own menu is refused by the API server at every run."""
    for component, name, parameter in _parameters(spec):
        if parameter.get("literals") and parameter.get("defaultValue") not in parameter["literals"]:
            yield (
                f"{component}/{name}",
                f"default {parameter.get('defaultValue')!r} is not among {parameter['literals']}",
            )


def loops(spec: Spec, platform: Spec) -> Findings:
    """L5, L6: a loop over a named list output fails locally; a gathered empty loop crashes."""
    for place, task, _ in _tasks(spec):
        items = task.get("parameterIterator", {}).get("items", {})
        source = items.get("inputParameter", "")
        bound = task.get("inputs", {}).get("parameters", {}).get(source, {}).get("taskOutputParameter", {})
        if bound and bound.get("outputParameterKey") != "Output":
            yield (
                place,
                f"loops over the named output '{bound.get('outputParameterKey')}' (L5); return one unnamed list",
            )
        if "raw" in items and not json.loads(items["raw"]):
            yield place, "loops over an empty list; gathering its outputs crashes (L6)"


def conditions(spec: Spec, platform: Spec) -> Findings:
    """L7: conditions become Python source; a quote in a value breaks both branches. Compare numbers or plain words."""
    for place, task, _ in _tasks(spec):
        expression = _QUOTED.sub("", task.get("triggerPolicy", {}).get("condition", ""))
        for literal in re.findall(r"'((?:[^'\\]|\\.)*)'", expression):
            if not re.fullmatch(r"[\w.-]*", literal):
                yield place, f"compares with {literal!r} (L7); compare numbers or plain words"
        if expression.count("'") % 2:
            yield place, "an unbalanced quote in the condition (L7); compare numbers or plain words"


def no_ignored_failure(spec: Spec, platform: Spec) -> Findings:
    """L12: a task that ignores upstream failure and reads the failed output raises instead of using its default."""
    for place, task, _ in _tasks(spec):
        if task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED":
            inputs = task.get("inputs", {})
            reads = [*inputs.get("parameters", {}).values(), *inputs.get("artifacts", {}).values()]
            if any("taskOutputParameter" in value or "taskOutputArtifact" in value for value in reads):
                yield place, "ignores upstream failure but reads upstream outputs (L12); use an ExitHandler"


def small_arguments(spec: Spec, platform: Spec) -> Findings:
    """platform.md 1.1: all parameters travel as one program argument."""
    for place, task, _ in _tasks(spec):
        size = len(json.dumps(task.get("inputs", {}).get("parameters", {})))
        if size > ARGUMENT_LIMIT:
            yield place, f"parameters of {size} bytes, over {ARGUMENT_LIMIT}; carry them in an artifact"


def no_private_parameters(spec: Spec, platform: Spec) -> Findings:
    """platform.md 7: KFP stores parameters and copies them to MLflow; endpoints beside credentials can be redirected."""
    for component, name, _ in _parameters(spec):
        if _PRIVATE.search(name.lower()):
            yield (
                f"{component}/{name}",
                "endpoints and credentials come from mounted configuration, never from parameters",
            )
    for name, executor in _executors(spec).items():
        for variable in executor.get("container", {}).get("env", []):
            if _PRIVATE.search(variable.get("name", "").lower()) and variable.get("value"):
                yield name, f"{variable['name']} is written in the package; use a Secret"


def uncached(spec: Spec, platform: Spec) -> Findings:
    """platform.md 9.2: scores, registry and checks of the outer world are never answered from a cache."""
    for place, task, component in _tasks(spec):
        if step_of(component.get("executorLabel", "")) in UNCACHED and task.get("cachingOptions", {}).get(
            "enableCache"
        ):
            yield place, "may be answered from KFP's cache; set_caching_options(False)"


def retried(spec: Spec, platform: Spec) -> Findings:
    """platform.md 9.2: every step is idempotent, so every step survives a lost node; pauses must grow."""
    for place, task, component in _tasks(spec):
        if "executorLabel" in component:
            policy = task.get("retryPolicy", {})
            if not policy.get("maxRetryCount"):
                yield place, "is not retried; a lost node ends the run"
            elif policy.get("backoffFactor", 0) <= 1 or policy.get("backoffDuration", "0s") == "0s":
                yield place, "is retried without growing pauses; set backoff_duration and backoff_factor over 1"


def not_root(spec: Spec, platform: Spec) -> Findings:
    """platform.md 1.3: the `restricted` pod security standard needs runAsNonRoot on every task."""
    settings = platform.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    for name in _executors(spec):
        if not settings.get(name, {}).get("securityContext", {}).get("runAsNonRoot"):
            yield name, "may run as root; namespaces with the restricted standard refuse it"


RULES = [
    Rule("lightweight-only", lightweight_only),
    Rule("no-pip-install", no_pip_install),
    Rule("one-image", one_image),
    Rule("image-digest", image_digest),
    Rule("described", described),
    Rule("no-none", no_none),
    Rule("own-name", own_name),
    Rule("literal-defaults", literal_defaults),
    Rule("loops", loops),
    Rule("conditions", conditions),
    Rule("no-ignored-failure", no_ignored_failure),
    Rule("small-arguments", small_arguments),
    Rule("no-private-parameters", no_private_parameters),
    Rule("uncached", uncached),
    Rule("retried", retried),
    Rule("not-root", not_root),
]
