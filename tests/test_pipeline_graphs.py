"""What the compiled pipelines are: who waits for whom, what is cached, what is retried, what a form asks."""

from __future__ import annotations

import pytest

from vlmflow import compiler
from vlmflow.installation import step_of

FIRST = dict.fromkeys(compiler.PIPELINES, "preflight") | {"promote": "verify"}
FORMS = {
    "curate": (["recipe"], {"model", "overrides", "shard_groups"}),
    "evaluate": (["models", "recipe"], {"evaluators", "overrides", "split"}),
    "export": (["model"], {"overrides", "recipe"}),
    "points": (["recipe"], {"evaluators", "overrides", "shard_groups", "soup_choice"}),
    "promote": (["model"], {"candidate"}),
    "soup": (["checkpoint", "recipe"], {"evaluators", "overrides", "seed", "sft", "soup_choice", "web"}),
    "train": (["model", "recipe", "stage"], {"candidate", "overrides", "seed", "sft", "web"}),
}
INNER = "comp-exit-handler-1"


@pytest.fixture(scope="module")
def specs() -> dict:
    return {name: compiler.compile_pipeline(name) for name in compiler.PIPELINES}


def tasks(spec: dict, dag: str = INNER) -> dict:
    return spec["components"][dag]["dag"]["tasks"]


def before(spec: dict, name: str, dag: str = INNER) -> set[str]:
    """Every task of the DAG that must have ended before this one starts."""
    direct = set(tasks(spec, dag)[name].get("dependentTasks", []))
    return direct.union(*(before(spec, each, dag) for each in direct))


def shown(spec: dict, title: str, dag: str = INNER) -> str:
    """Key of the task that the UI shows under this name."""
    (found,) = [key for key, task in tasks(spec, dag).items() if task["taskInfo"]["name"] == title]
    return found


@pytest.mark.parametrize("name", compiler.PIPELINES)
def test_everything_waits_for_the_checks(specs, name):
    spec = specs[name].spec
    first = FIRST[name]
    assert [key for key, task in tasks(spec).items() if not task.get("dependentTasks")] == [first]
    assert all(first in before(spec, key) for key in tasks(spec) if key != first)


@pytest.mark.parametrize("name", compiler.PIPELINES)
def test_the_exit_handler_runs_after_everything_however_it_ended(specs, name):
    root = specs[name].spec["root"]["dag"]["tasks"]
    assert set(root) == {"finish", "exit-handler-1"}
    assert root["finish"]["dependentTasks"] == ["exit-handler-1"]
    assert root["finish"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert root["finish"]["inputs"]["parameters"]["status"]["taskFinalStatus"] == {"producerTask": "exit-handler-1"}
    assert "enableCache" not in root["finish"].get("cachingOptions", {})


@pytest.mark.parametrize("name", compiler.PIPELINES)
def test_every_task_is_retried_with_growing_pauses(specs, name):
    spec = specs[name].spec
    dags = [spec["root"], *(c for c in spec["components"].values() if "dag" in c)]
    found = [task for dag in dags for task in dag["dag"]["tasks"].values()]
    policies = [t["retryPolicy"] for t in found if "executorLabel" in spec["components"][t["componentRef"]["name"]]]
    assert {(p["maxRetryCount"], p["backoffDuration"], p["backoffFactor"]) for p in policies} == {(2, "30s", 2.0)}


@pytest.mark.parametrize("name", compiler.PIPELINES)
def test_the_form(specs, name):
    parameters = specs[name].spec["root"]["inputDefinitions"]["parameters"]
    required = sorted(key for key, value in parameters.items() if "defaultValue" not in value)
    assert (required, set(parameters) - set(required)) == FORMS[name]
    assert all(value["description"] for value in parameters.values())
    literals = {key: value["literals"] for key, value in parameters.items() if "literals" in value}
    soups = ["recipe", "greedy", "maximum", "average", "best"]
    expected = {
        "points": {"soup_choice": soups},
        "soup": {"soup_choice": soups},
        "evaluate": {"split": ["report", "selection"]},
    }
    assert literals == expected.get(name, {})


def test_a_model_that_a_name_stands_for_is_never_answered_from_the_cache(specs):
    """models:/NAME@champion is another model tomorrow."""
    for name in ("curate", "train", "soup", "export"):
        spec = specs[name].spec
        opened = [t for t in tasks(spec).values() if "runtimeValue" not in _given(t) and _given(t)]
        assert opened, name
        assert not any(t.get("cachingOptions", {}).get("enableCache") for t in opened), name


def _given(task: dict) -> dict:
    return task["inputs"].get("parameters", {}).get("given", {})


ROW_LOCAL = ["ocr", "caption", "fuse", "build", "clean", "perplexity"]


@pytest.mark.parametrize("name", ["curate", "points"])
def test_curation_goes_through_groups_before_the_manifest_is_sealed(specs, name):
    spec = specs[name].spec
    loop = tasks(spec, "comp-for-loop-3")
    assert set(loop) == set(ROW_LOCAL)
    assert all("group" in task["inputs"]["parameters"] for task in loop.values())
    assert before(spec, "perplexity", "comp-for-loop-3") == set(ROW_LOCAL[:-1])
    sealing = [*ROW_LOCAL, "dedup", "keep"]
    for earlier, later in zip(["merge", *sealing[:-1]], sealing, strict=True):
        assert shown(spec, earlier) in before(spec, shown(spec, later))
    for step in sealing:
        parameters = tasks(spec)[shown(spec, step)]["inputs"].get("parameters", {})
        assert "group" not in parameters and "for-loop-3" in before(spec, shown(spec, step))


@pytest.mark.parametrize("name", ["curate", "points"])
def test_duplicates_are_looked_for_in_the_other_datasets_too(specs, name):
    spec = specs[name].spec
    given = tasks(spec)["dedup"]["inputs"]["artifacts"]
    for other in ("seed", "sft"):
        wanted = {"outputArtifactKey": "data", "producerTask": shown(spec, f"pull {other}")}
        assert given[other]["taskOutputArtifact"] == wanted


@pytest.mark.parametrize("name", ["curate", "points"])
def test_web_data_are_pulled_in_groups_then_sealed_by_one_task(specs, name):
    spec = specs[name].spec
    (ahead,) = tasks(spec, "comp-for-loop-2").values()
    assert ahead["taskInfo"]["name"] == "pull web, a group" and "group" in ahead["inputs"]["parameters"]
    assert "deal" in before(spec, "for-loop-2")
    sealing = tasks(spec)[shown(spec, "pull web")]["inputs"]
    assert "for-loop-2" in before(spec, shown(spec, "pull web")) and "group" not in sealing["parameters"]
    for other in ("pull seed", "pull sft"):
        assert "for-loop-2" not in before(spec, shown(spec, other))


def test_candidates_of_a_soup_start_from_the_checkpoint(specs):
    spec = specs["soup"].spec
    start = tasks(spec)["for-loop-2"]["inputs"]["artifacts"]
    sources = {value["taskOutputArtifact"]["producerTask"] for value in start.values() if "taskOutputArtifact" in value}
    assert shown(spec, "open checkpoint") in sources and shown(spec, "initial") not in sources
    assert {"soup", "for-loop-3", "for-loop-2"} <= before(spec, "register")


def test_only_the_promoting_task_holds_the_promoters_login(specs):
    for name, package in specs.items():
        executors = package.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        for executor, settings in executors.items():
            secrets = {entry["secretName"] for entry in settings["secretAsEnv"]}
            promotes = name == "promote" and step_of(executor) == "promote"
            assert ("vlmflow-promoter" in secrets) == promotes and ("vlmflow-mlflow" in secrets) != promotes
    assert "verify" in before(specs["promote"].spec, "promote")


def test_loops_run_over_a_given_number_of_tasks(specs):
    """The number of groups and of evaluators reaches the task that deals them out."""
    for name in ("curate", "points"):
        groups = tasks(specs[name].spec)["groups"]["inputs"]["parameters"]["count"]
        assert groups == {"componentInputParameter": "pipelinechannel--shard_groups"}, name
    for name, dealer in (("points", "lineup"), ("soup", "lineup"), ("evaluate", "contestants")):
        given = tasks(specs[name].spec)[dealer]["inputs"]["parameters"]["evaluators"]
        assert given == {"componentInputParameter": "pipelinechannel--evaluators"}, name
