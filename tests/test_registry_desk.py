"""The pipeline `promote` and registered addresses against a real MLflow server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import registry_world as world

from vlmflow import local_stack, preflight
from vlmflow.client import Client
from vlmflow.errors import RecipeError, RegistryError, ServiceError
from vlmflow.registry import address, desk, tracking
from vlmflow.registry.policy import Policy


@pytest.fixture
def mlflow(stack, monkeypatch):
    for name, value in local_stack.environment(stack).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv(desk.VARIABLE, raising=False)
    return tracking.client()


def test_from_candidate_to_champion_and_its_address(mlflow, tmp_path: Path, monkeypatch) -> None:
    _, good = world.candidate(tmp_path / "a", 20, "m")
    _, bad = world.candidate(tmp_path / "b", 8, "m")  # under the floor of its recipe
    version, results = desk.verdict("m")
    assert version == "2" and [r.name for r in results if not r.passed] == ["absolute_floor"]
    with pytest.raises(RegistryError, match="absolute_floor"):
        desk.promote("m", "2")
    made = desk.promote("m")  # the newest that passes
    assert (made.action, made.candidate, made.version) == ("promoted", "1", "1")
    assert desk.promote("m").action == "unchanged"  # a retry changes nothing
    assert address.find("models:/m@champion") == address.find("models:/m-candidates/1") == good
    assert address.find("models:/m-candidates/2") == bad
    recipe = preflight.resolve("", ["seed=9"], pipeline="export", model="models:/m@champion")
    assert recipe.seed == 9 and recipe.registry.model == "m"
    with pytest.raises(RegistryError):
        address.find("models:/m@nobody")
    with pytest.raises(RecipeError, match="no registered version whose recipe could be looked up"):
        preflight.resolve("", [], pipeline="export", model="s3://vlmflow/models/x")


def test_the_installations_policy_is_asked_not_the_form(mlflow, tmp_path: Path, monkeypatch) -> None:
    world.candidate(tmp_path / "a", 20, "strict")
    monkeypatch.setenv(desk.VARIABLE, json.dumps({"strict": {"approval_tag": "approved-by"}}))
    assert desk.promote("strict").action == "waiting"
    with pytest.raises(RegistryError, match="approved-by"):
        desk.promote("strict", "1")
    with pytest.raises(ServiceError, match="does not look after 'other'"):
        desk.promote("other")
    monkeypatch.setenv(desk.VARIABLE, "[]")
    with pytest.raises(ServiceError, match="nothing is promoted while it is unclear"):
        desk.promote("strict", "1")


def test_a_machine_without_the_configuration_asks_what_the_promoter_wrote_down(mlflow, tmp_path: Path) -> None:
    world.candidate(tmp_path / "a", 20, "written")
    strict = Policy(approval_tag="approved-by", regression=0.1)
    desk.publish(mlflow, "written", strict)  # before there is a model: the next round writes it
    assert desk.policy_of(mlflow, "written") == Policy()
    mlflow.create_registered_model("written")
    desk.publish(mlflow, "written", strict)
    assert desk.policy_of(mlflow, "written") == strict
    with pytest.raises(RegistryError, match="approved-by"):
        Client(endpoint="http://127.0.0.1:1").promote("written", "1")
    with pytest.raises(ServiceError, match="is the tag 'approved-by', not 'mine'"):
        desk.verdict("written", "1", approval_tag="mine")
    mlflow.set_model_version_tag("written-candidates", "1", "approved-by", "a person")
    made = Client(endpoint="http://127.0.0.1:1").promote("written", "1", by="me")
    assert (made.action, made.version) == ("promoted", "1")


def test_who_promotes_may_ask_for_more(mlflow, tmp_path: Path) -> None:
    world.candidate(tmp_path / "a", 20, "free")
    _, results = desk.verdict("free", "1", approval_tag="seen-by")
    assert [r.name for r in results if not r.passed] == ["approval"]
    mlflow.create_registered_model("free")
    mlflow.set_registered_model_tag("free", desk.PUBLISHED, "{")
    with pytest.raises(ServiceError, match="nothing is promoted while it is unclear"):
        desk.promote("free", "1")


def test_without_a_candidate_there_is_nothing_to_judge(mlflow) -> None:
    with pytest.raises(RegistryError, match="nobody-candidates has no version"):
        desk.verdict("nobody")
