"""The SDK against the KFP stand-in: what is sent, how a run is followed, what is said when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp_server import Kfp

from vlmflow import compiler, kfp_api, settings
from vlmflow.client import Client, Run
from vlmflow.errors import NotFound, RecipeError, ServiceError, StepFailed

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "points-tiny.yaml"


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kfp]:
    for name in settings.VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLMFLOW_CONFIG", str(tmp_path / "config.yaml"))
    with Kfp(token="planted-token") as server:
        monkeypatch.setenv("VLMFLOW_KFP_ENDPOINT", server.endpoint)
        monkeypatch.setenv("VLMFLOW_KFP_TOKEN", "planted-token")
        yield server


@pytest.fixture
def registered(kfp: Kfp, tmp_path: Path) -> Kfp:
    package = compiler.compile_pipeline("points").text
    kfp_api.register(kfp_api.connect(kfp.endpoint, "planted-token"), "points", package, tmp_path)
    return kfp


@pytest.fixture
def client(registered: Kfp, monkeypatch: pytest.MonkeyPatch) -> Client:
    written: dict[str, bytes] = {}
    monkeypatch.setattr("vlmflow.storage.write_bytes", lambda uri, data: written.__setitem__(uri, data))
    made = Client(root="s3://bucket/root", service_account="v-vlmflow-pipelines")
    made.written = written  # type: ignore[attr-defined]
    return made


def test_a_recipe_becomes_a_run(client: Client, registered: Kfp) -> None:
    sent = client.submit(RECIPE, ["seed=7"], parameters={"evaluators": 2})
    assert sent.run is not None and sent.run.state == "PENDING"
    (run,) = registered.runs.values()
    assert run.service_account == "v-vlmflow-pipelines"
    given = run.runtime_config.parameters
    assert given["overrides"] == ["seed=7"] and given["evaluators"] == 2
    assert client.written == {given["recipe"]: RECIPE.read_bytes()}  # type: ignore[attr-defined]
    assert given["recipe"].startswith("s3://bucket/root/recipes/")
    assert sent.run.url.startswith(registered.endpoint)
    again = client.submit(RECIPE, ["seed=7"])
    assert again.recipe_uri == sent.recipe_uri


def test_a_dry_run_changes_nothing(client: Client, registered: Kfp) -> None:
    before = len(registered.calls)
    sent = client.submit(RECIPE, dry_run=True)
    assert sent.run is None and sent.recipe_uri.startswith("s3://bucket/root/recipes/")
    assert registered.runs == {} and client.written == {} and len(registered.calls) == before  # type: ignore[attr-defined]


def test_bad_input_is_refused_before_anything_is_sent(client: Client, registered: Kfp, monkeypatch: Any) -> None:
    with pytest.raises(RecipeError, match=r"stages\.sft\.epochs"):
        client.submit(RECIPE, ["stages.sft.epochs=-1"])
    with pytest.raises(RecipeError, match="no parameters \\['evaluator'\\]"):
        client.submit(RECIPE, parameters={"evaluator": 2})
    with pytest.raises(NotFound, match="pipeline 'pints' is not registered"):
        client.submit(RECIPE, pipeline="pints")
    with pytest.raises(RecipeError, match="cannot read"):
        Client().submit(RECIPE)
    assert registered.runs == {} and client.written == {}  # type: ignore[attr-defined]


def test_waiting_follows_a_run_through_an_hour_in_a_queue_and_an_outage(client: Client, registered: Kfp) -> None:
    run_id = client.submit(RECIPE).run.run_id  # type: ignore[union-attr]
    clock, seen = [0.0], []

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        registered.broken = 503 if 600 < clock[0] < 900 else 0
        if clock[0] > 3600 and registered.runs[run_id].state == "PENDING":
            registered.move(run_id, "RUNNING", pull_seed="RUNNING")
        elif clock[0] > 3700:
            registered.move(run_id, "SUCCEEDED", pull_seed="SUCCEEDED")

    done = client.wait(run_id, on_change=lambda run: seen.append(run.state), sleep=sleep, clock=lambda: clock[0])
    assert done.state == "SUCCEEDED" and clock[0] > 3600
    assert seen == ["PENDING", "RUNNING", "SUCCEEDED"]
    assert len(registered.calls) < 400, "polls grow further apart"


def test_a_failed_run_names_its_tasks(client: Client, registered: Kfp) -> None:
    run_id = client.submit(RECIPE).run.run_id  # type: ignore[union-attr]
    registered.move(run_id, "FAILED", pull_seed="SUCCEEDED", train_ocr="FAILED")
    with pytest.raises(StepFailed, match="train ocr"):
        client.wait(run_id)


def test_a_timeout_says_that_the_run_goes_on(client: Client) -> None:
    run_id = client.submit(RECIPE).run.run_id  # type: ignore[union-attr]
    clock = iter(range(0, 10_000, 40))
    with pytest.raises(ServiceError, match="is PENDING after 100 s; it goes on"):
        client.wait(run_id, timeout=100, sleep=lambda _: None, clock=lambda: float(next(clock)))


def test_cancelling_is_asked_for_once(client: Client, registered: Kfp) -> None:
    run_id = client.submit(RECIPE).run.run_id  # type: ignore[union-attr]
    assert client.cancel(run_id).state == "CANCELING"
    registered.move(run_id, "CANCELED")
    assert client.cancel(run_id).state == "CANCELED"
    assert sum(path.endswith(":terminate") for _, path in registered.calls) == 1
    with pytest.raises(NotFound):
        client.get("nowhere")


def test_a_run_is_started_once_by_name(client: Client, registered: Kfp) -> None:
    first = client.start_once("points", "export-m-3", {"recipe": "s3://b/r.yaml"})
    assert client.start_once("points", "export-m-3", {"recipe": "s3://b/r.yaml"}).run_id == first.run_id
    assert len(registered.runs) == 1
    assert [run.name for run in client.runs()] == ["export-m-3"]


def test_errors_say_what_to_do(kfp: Kfp) -> None:
    with pytest.raises(ServiceError, match="token is missing or has expired"):
        Client(token="old").runs()
    with pytest.raises(ServiceError, match="VLMFLOW_KFP_ENDPOINT"):
        Client(endpoint="localhost:8080").runs()
    with pytest.raises(ServiceError, match="nobody answers"):
        Client(endpoint="http://127.0.0.1:9").runs()


def test_no_secret_is_sent_or_shown(client: Client, registered: Kfp) -> None:
    client.submit(RECIPE)
    assert not any(b"planted-token" in body for body in registered.bodies)
    assert "planted-token" not in repr(client.settings)


def test_flag_over_environment_over_file(kfp: Kfp, monkeypatch: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("namespace: from-file\nexperiment: from-file\nroot: s3://from-file\n")
    monkeypatch.setenv("VLMFLOW_NAMESPACE", "from-environment")
    found = settings.load(root="s3://from-flag")
    assert (found.root, found.namespace, found.experiment) == ("s3://from-flag", "from-environment", "from-file")
    assert dict(found.sources)["namespace"] == "environment"
    path.write_text("tokens: x\n")
    with pytest.raises(RecipeError, match="unknown settings \\['tokens'\\]"):
        settings.load()
    path.write_text("token: x\n")
    path.chmod(0o644)
    with pytest.raises(RecipeError, match="chmod 600"):
        settings.load()


def test_a_run_is_plain_data() -> None:
    run = Run("1", "name", "RUNNING")
    assert json.loads(json.dumps(run.as_json()))["state"] == "RUNNING" and not run.done
