"""Promotion and rollback against a real MLflow server, killed between any two of its calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import registry_world as world

from vlmflow import local_stack, storage
from vlmflow.errors import RegistryError
from vlmflow.registry import promote, tracking
from vlmflow.registry.policy import Policy

WRITES = ("copy_model_version", "set_model_version_tag", "set_registered_model_alias")


class Died(BaseException):
    """The process is gone."""


class Mortal:
    """A client that dies right before or right after its n-th write."""

    def __init__(self, client: Any, after: int, answered: bool) -> None:
        self.client, self.left, self.answered = client, after, answered

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        if name not in WRITES:
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.answered:
                raise Died
            result = method(*args, **kwargs)
            if self.left == 0:
                raise Died
            return result

        return call


@pytest.fixture
def mlflow(stack, monkeypatch):
    for name, value in local_stack.environment(stack).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return tracking.client()


@pytest.fixture
def model(request) -> str:
    return "m-" + "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[-50:].strip("-")


def alias(mlflow: Any, model: str, name: str) -> str:
    found = promote._alias(mlflow, model, name)
    return "" if found is None else str(found.version)


def test_the_newest_passing_candidate_becomes_champion_once(mlflow: Any, model: str, tmp_path: Path) -> None:
    world.candidate(tmp_path / "a", 20, model)
    world.candidate(tmp_path / "b", 30, model)
    world.candidate(tmp_path / "c", 8, model)  # 0.2, under the floor of 0.3
    first = promote.reconcile(mlflow, model, Policy())
    assert (first.action, first.version, first.candidate) == ("promoted", "1", "2")
    again = promote.reconcile(mlflow, model, Policy())
    assert (again.action, again.version) == ("unchanged", "1")
    rejected = mlflow.get_model_version(f"{model}-candidates", "3").tags[promote.VERDICT]
    assert "absolute_floor" in rejected and "0.200 of 0.300" in rejected
    assert [record["candidate"] for record in promote.history(mlflow, model)] == ["2"]


def test_a_worse_candidate_does_not_replace_the_champion(mlflow: Any, model: str, tmp_path: Path) -> None:
    world.candidate(tmp_path / "a", 30, model)
    promote.reconcile(mlflow, model, Policy())
    world.candidate(tmp_path / "b", 29, model)
    assert promote.reconcile(mlflow, model, Policy()).action == "unchanged"
    assert promote.reconcile(mlflow, model, Policy(regression=0.05)).action == "promoted"
    assert alias(mlflow, model, "previous") == "1" and alias(mlflow, model, "champion") == "2"


def test_changed_weights_are_not_promoted(mlflow: Any, model: str, tmp_path: Path) -> None:
    _, ref = world.candidate(tmp_path / "a", 30, model)
    storage.write_bytes(storage.join(ref.uri, "model.safetensors"), b"weights a 3O")
    found = promote.reconcile(mlflow, model, Policy())
    assert found.action == "unchanged" and alias(mlflow, model, "champion") == ""
    with pytest.raises(RegistryError, match="weights_unchanged"):
        promote.promote(mlflow, model, "1", Policy(), "somebody")


def test_a_candidate_that_is_not_there_is_said_with_those_that_are(mlflow: Any, model: str, tmp_path: Path) -> None:
    with pytest.raises(
        RegistryError, match=f"{model}-candidates has no version 7: no recipe with registry.model '{model}'"
    ):
        promote.verdict(mlflow, model, "7", Policy())
    world.candidate(tmp_path / "a", 30, model)
    with pytest.raises(RegistryError, match=f"{model}-candidates has no version 7: it has 1$"):
        promote.promote(mlflow, model, "7", Policy(), "somebody")


def test_approval_is_waited_for(mlflow: Any, model: str, tmp_path: Path) -> None:
    world.candidate(tmp_path / "a", 30, model)
    asked = Policy(approval_tag="approved-by")
    assert promote.reconcile(mlflow, model, asked).action == "waiting"
    mlflow.set_model_version_tag(f"{model}-candidates", "1", "approved-by", "ana")
    assert promote.reconcile(mlflow, model, asked).action == "promoted"


def test_a_rollback_stays(mlflow: Any, model: str, tmp_path: Path) -> None:
    world.candidate(tmp_path / "a", 20, model)
    promote.reconcile(mlflow, model, Policy())
    with pytest.raises(RegistryError, match="previous is not set"):
        promote.rollback(mlflow, model, "too early", "ana")
    world.candidate(tmp_path / "b", 30, model)
    promote.reconcile(mlflow, model, Policy())
    back = promote.rollback(mlflow, model, "answers in the wrong language", "ana")
    assert back.version == "1" and alias(mlflow, model, "champion") == "1"
    assert promote.reconcile(mlflow, model, Policy()).action == "unchanged"
    assert alias(mlflow, model, "champion") == "1"
    with pytest.raises(RegistryError, match="wrong language"):
        promote.promote(mlflow, model, "2", Policy(), "ana")


@pytest.mark.parametrize("answered", [False, True])
def test_death_between_any_two_calls_leaves_one_promotion(
    mlflow: Any, model: str, tmp_path: Path, answered: bool
) -> None:
    world.candidate(tmp_path / "a", 20, model)
    promote.reconcile(mlflow, model, Policy())
    world.candidate(tmp_path / "b", 30, model)
    deaths = 0
    for number in range(1, 20):
        try:
            outcome = promote.reconcile(Mortal(mlflow, number, answered), model, Policy())
        except Died:
            deaths += 1
            assert alias(mlflow, model, "champion") in ("1", "2")
            continue
        if outcome.action == "unchanged":
            break
    assert deaths >= 3
    assert alias(mlflow, model, "champion") == "2" and alias(mlflow, model, "previous") == "1"
    versions = mlflow.search_model_versions(f"name = '{model}'")
    assert {str(v.version) for v in versions} == {"1", "2"}
    record = json.loads(mlflow.get_model_version(model, "2").tags[promote.RECORD])
    assert record["candidate"] == "2" and record["replaces"] == "1"
