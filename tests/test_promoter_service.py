"""The promoter as a process, against a real MLflow server: every webhook lost, candidates still become champion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import registry_world as world

from vlmflow import local_stack
from vlmflow.registry import promote, tracking


def start(stack: dict, log: Path, *arguments: str) -> subprocess.Popen:
    env = {**os.environ, **local_stack.environment(stack), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    env.pop("MLFLOW_RUN_ID", None)
    command = [sys.executable, "-m", "services.promoter", "--port", "0", *arguments]
    return subprocess.Popen(command, env=env, stdout=log.open("ab"), stderr=subprocess.STDOUT)


def champion(model: str) -> str:
    found = promote._alias(tracking.client(), model, "champion")
    return "" if found is None else str(found.version)


def wait(model: str, version: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while champion(model) != version:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)


def test_reconciliation_needs_no_webhook_and_survives_kills(stack, tmp_path, monkeypatch) -> None:
    for name, value in local_stack.environment(stack).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    log = tmp_path / "promoter.log"
    world.candidate(tmp_path / "a", 20, "service")
    process = start(stack, log, "--model", "service", "--period", "1")
    try:
        wait("service", "1", process, log)
        process.kill()
        process.wait()
        world.candidate(tmp_path / "b", 30, "service")
        process = start(stack, log, "--model", "service", "--period", "1")
        wait("service", "2", process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
    assert [record["candidate"] for record in promote.history(tracking.client(), "service")] == ["1", "2"]


def test_bad_arguments_are_refused_before_anything_starts(stack, tmp_path) -> None:
    policies = tmp_path / "policies.json"
    policies.write_text('{"other": {"floors": {"digits": 2}}}')
    log = tmp_path / "log"
    process = start(stack, log, "--model", "service", "--policies", str(policies))
    assert process.wait(timeout=60) == 2
    assert "policies for ['other']" in log.read_text()
