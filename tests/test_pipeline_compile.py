"""The compiled pipeline keeps every rule, each rule can fail, and the committed package is what the source compiles to."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from vlmflow import compiler
from vlmflow.compiler import Package
from vlmflow.compiler_rules import ARGUMENT_LIMIT, RULES, UNCACHED
from vlmflow.errors import VlmflowError
from vlmflow.installation import step_of

ROOT = Path(__file__).resolve().parents[1]
DIGEST = "registry.example/vlmflow@sha256:" + "a" * 64


@pytest.fixture(scope="module")
def package() -> Package:
    return compiler.compile_pipeline("points")


def root_task(spec, name):
    return spec["components"]["comp-exit-handler-1"]["dag"]["tasks"][name]


def parameter(spec, name):
    return spec["root"]["inputDefinitions"]["parameters"][name]


def container(spec, name):
    return spec["deploymentSpec"]["executors"][f"exec-{name}"]["container"]


def every_image(spec, image):
    for executor in spec["deploymentSpec"]["executors"].values():
        executor["container"]["image"] = image


def importer(spec):
    spec["deploymentSpec"]["executors"]["exec-ocr"] = {"importer": {}}


def plain_container(spec):
    container(spec, "ocr")["command"] = ["python3", "-m", "vlmflow.ocr"]


def named_loop(spec):
    loop = root_task(spec, "for-loop-2")
    source = loop["parameterIterator"]["items"]["inputParameter"]
    loop["inputs"]["parameters"][source]["taskOutputParameter"]["outputParameterKey"] = "items"


def growing_not(spec):
    root_task(spec, "keep")["retryPolicy"]["backoffFactor"] = 1.0


def ignored(spec):
    root_task(spec, "report")["triggerPolicy"] = {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}


def huge(spec):
    root_task(spec, "pull")["inputs"]["parameters"]["dataset"] = {"runtimeValue": {"constant": "x" * ARGUMENT_LIMIT}}


def quoted(spec):
    expression = "inputs.parameter_values['pipelinechannel--x'] == 'it\\'s'"
    root_task(spec, "keep")["triggerPolicy"] = {"condition": expression}


BREAKS = [
    ("lightweight-only", importer),
    ("lightweight-only", plain_container),
    ("no-pip-install", lambda s: container(s, "ocr")["command"].append("pip install kfp")),
    ("one-image", lambda s: container(s, "ocr").update(image="other:1")),
    ("one-image", lambda s: every_image(s, "vlmflow:latest")),
    ("one-image", lambda s: every_image(s, "vlmflow")),
    ("image-digest", lambda s: every_image(s, "vlmflow:1")),
    ("described", lambda s: parameter(s, "recipe").pop("description")),
    ("described", lambda s: s["pipelineInfo"].pop("description")),
    ("no-none", lambda s: parameter(s, "evaluators").pop("defaultValue")),
    ("own-name", lambda s: s["pipelineInfo"].update(name="ocr")),
    ("literal-defaults", lambda s: parameter(s, "soup_choice").update(literals=["greedy"])),
    ("loops", named_loop),
    ("loops", lambda s: root_task(s, "for-loop-2")["parameterIterator"].update(items={"raw": "[]"})),
    ("conditions", quoted),
    ("no-ignored-failure", ignored),
    ("small-arguments", huge),
    (
        "no-private-parameters",
        lambda s: s["root"]["inputDefinitions"]["parameters"].update(s3_endpoint={"description": "x"}),
    ),
    (
        "no-private-parameters",
        lambda s: container(s, "ocr").update(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]),
    ),
    ("uncached", lambda s: root_task(s, "register").update(cachingOptions={"enableCache": True})),
    ("retried", lambda s: root_task(s, "keep").pop("retryPolicy")),
    ("retried", growing_not),
]


@pytest.mark.parametrize("name", compiler.PIPELINES)
def test_every_pipeline_keeps_every_rule(name):
    pinned = compiler.compile_pipeline(name, image=DIGEST, require_digest=True)
    assert compiler.check(compiler.compile_pipeline(name)) == []
    assert compiler.check(pinned, require_digest=True) == []


@pytest.mark.parametrize(("rule", "harm"), BREAKS, ids=[f"{r}-{i}" for i, (r, _) in enumerate(BREAKS)])
def test_each_rule_can_fail(rule, harm):
    pinned = compiler.compile_pipeline("points", image=DIGEST)
    spec = copy.deepcopy(pinned.spec)
    harm(spec)
    findings = compiler.check(Package(spec, pinned.platform, ""), require_digest=rule == "image-digest")
    broken = {finding.rule for finding in findings}
    assert broken == {rule}


def test_the_rule_about_root_can_fail(package):
    platform = copy.deepcopy(package.platform)
    platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-ocr"].pop("securityContext")
    findings = compiler.check(Package(package.spec, platform, ""))
    assert [(f.rule, f.where) for f in findings] == [("not-root", "exec-ocr")]


def test_every_rule_has_a_case_that_breaks_it():
    assert {rule.name for rule in RULES} == {rule for rule, _ in BREAKS} | {"not-root"}


def test_a_broken_pipeline_is_refused_with_all_findings(monkeypatch):
    import pipelines.points as module

    monkeypatch.setattr(module, "LITERALS", {"soup_choice": ["greedy"]})
    with pytest.raises(VlmflowError, match=r"\[literal-defaults\] root/soup_choice"):
        compiler.compile_pipeline("points")


def test_unknown_pipeline_and_unknown_literal_are_named():
    from pipelines.points import points

    with pytest.raises(VlmflowError, match="there are: curate, evaluate"):
        compiler.compile_pipeline("point")
    with pytest.raises(VlmflowError, match="soup_choices"):
        compiler.compile_function(points, {"soup_choices": ["a"]})


def test_the_form_in_the_ui(package):
    parameters = package.spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["soup_choice"]["literals"] == ["recipe", "greedy", "maximum", "average", "best"]
    assert set(parameters) == {"recipe", "overrides", "soup_choice", "evaluators", "shard_groups"}
    assert [name for name, p in parameters.items() if "defaultValue" not in p] == ["recipe"]


@pytest.mark.parametrize("name", compiler.PIPELINES)
def test_kfp_loads_the_package_with_its_literals(name):
    from kfp import components

    package = compiler.compile_pipeline(name)
    loaded = components.load_component_from_text(package.text)
    assert loaded.name == f"vlmflow-{name}"
    assert set(loaded.component_spec.inputs) == set(package.spec["root"]["inputDefinitions"]["parameters"])


@pytest.mark.parametrize("name", compiler.PIPELINES)
def test_the_committed_package_is_current(name):
    """After a change: `vlmflow compile`, and commit the result."""
    version = re.compile(r"sdkVersion: .*")
    committed = (ROOT / f"pipelines/compiled/{name}.yaml").read_text(encoding="utf-8")
    text = compiler.compile_pipeline(name).text
    assert version.sub("", committed) == version.sub("", text), "run: vlmflow compile"


def test_every_pipeline_has_a_committed_package_and_nothing_else_is_there():
    assert sorted(p.stem for p in (ROOT / "pipelines/compiled").iterdir()) == list(compiler.PIPELINES)
    sources = {path.stem for path in (ROOT / "pipelines").glob("*.py")} - {"__init__", "platform", "parts"}
    assert sources == set(compiler.PIPELINES)


@pytest.mark.parametrize("pipeline", compiler.PIPELINES)
def test_every_step_shows_something(pipeline):
    """DESIGN 6: every step gives the UI a page, and numbers where there are any."""
    silent = {"plan", "lineup", "groups", "deal", "contestants"}  # they only return the lists that loops run over
    for name, component in compiler.compile_pipeline(pipeline).spec["components"].items():
        if label := step_of(component.get("executorLabel", "")):
            kinds = {
                a["artifactType"]["schemaTitle"]
                for a in component.get("outputDefinitions", {}).get("artifacts", {}).values()
            }
            assert "system.HTML" in kinds or label in silent, name


def test_every_task_knows_its_run_and_the_services_a_recipe_may_name(package):
    """A recipe that a laptop runs must run on a cluster: what its fields name is mounted, and runs stay apart."""
    from vlmflow.recipe.curation import CaptionSpec, FuseSpec

    named = {getattr(spec(), field) for spec in (CaptionSpec, FuseSpec) for field in ("endpoint_env", "key_env")}
    executors = package.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == len(package.spec["deploymentSpec"]["executors"])
    for name, settings in executors.items():
        assert [e["name"] for e in settings["fieldPathAsEnv"]] == ["VLMFLOW_RUN_ID"], name
        maps = [*settings["configMapAsEnv"], *settings["secretAsEnv"]]
        assert named <= {pair["envVar"] for each in maps for pair in each["keyToEnv"]}, name


def test_uncached_steps_exist():
    steps = {
        step_of(name) for p in compiler.PIPELINES for name in compiler.executors(compiler.compile_pipeline(p).spec)
    }
    assert set(UNCACHED) <= steps


def test_package_has_no_yaml_aliases_and_two_documents(package):
    assert len(list(yaml.safe_load_all(package.text))) == 2
    assert not re.search(r"(: |- )[&*]id\d", package.text)
