"""Training logs: a resumed log has no double lines, MLflow gets every number, a dead MLflow costs nothing."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vlmflow.training import log


class Server(ThreadingHTTPServer):
    """Answers as MLflow's REST interface does and keeps what it was sent."""

    calls: list[tuple[str, dict[str, Any]]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply(404, {"error_code": "RESOURCE_DOES_NOT_EXIST"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append((self.path.rsplit("mlflow/", 1)[-1], body))
        self.reply(200, {"experiment_id": "7", "run": {"info": {"run_id": "made"}}})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Server(("127.0.0.1", 0), Handler)
    made.calls = []
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    yield made
    made.shutdown()
    made.server_close()


def test_credentials_in_the_address_are_used_and_never_shown(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:se%20cret@{place}")
    seen: list[str | None] = []
    monkeypatch.setattr(
        Handler, "do_GET", lambda self: (seen.append(self.headers["Authorization"]), self.send_error(500))
    )
    tracker, _ = log.tracker_from_environment("exp", "tiny-sft", "sft/", {}, {})
    assert tracker is not None
    tracker.close()
    assert seen == ["Basic " + base64.b64encode(b"me:se cret").decode()]
    assert place in tracker.problem and "cret" not in tracker.problem


def tracked(path: Path) -> log.TrainLog:
    tracker, problem = log.tracker_from_environment("exp", "tiny-sft", "sft/", {"digest": "abc"}, {"stage": "{}"})
    assert tracker is not None and not problem
    made = log.TrainLog(path, "", tracker)
    for step in range(400):
        made.step(step, {"loss": 1.0 / (step + 1), "lr": {"projector (no decay)": 0.1}})
    made.close()
    return made


def test_every_number_reaches_a_new_run(server: Server, tmp_path: Path) -> None:
    made = tracked(tmp_path / "log.jsonl")
    assert made.tracker and made.tracker.problem == "" and made.tracker.run_id == "made"
    names = [name for name, _ in server.calls]
    assert names[:3] == ["experiments/create", "runs/create", "runs/log-batch"]
    assert {"key": "digest", "value": "abc"} in server.calls[2][1]["tags"]
    sent = [m for name, body in server.calls for m in body.get("metrics", [])]
    assert sorted(m["step"] for m in sent if m["key"] == "sft/loss") == list(range(400))
    assert {m["key"] for m in sent} == {"sft/loss", "sft/lr/projector _no decay_"}
    assert server.calls[-1][0] == "runs/update" and server.calls[-1][1]["status"] == "FINISHED"
    assert max(len(body.get("metrics", [])) for _, body in server.calls) <= 1000


def test_given_run_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "mine")
    tracked(tmp_path / "log.jsonl")
    assert {body["run_id"] for _, body in server.calls} == {"mine"}
    assert {name for name, _ in server.calls} == {"runs/log-batch"}, "a run that others made is theirs to end"


def test_a_continued_run_is_opened_and_ended_again(server: Server, tmp_path: Path) -> None:
    tracker, _ = log.tracker_from_environment("exp", "n", "sft/", {}, {}, earlier="before")
    log.TrainLog(tmp_path / "log.jsonl", "", tracker).close("KILLED")
    updates = [body for name, body in server.calls if name == "runs/update"]
    assert [(u["run_id"], u["status"]) for u in updates] == [("before", "RUNNING"), ("before", "KILLED")]


def test_a_refused_batch_does_not_leave_the_run_open(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow answers 400 to a param that has changed."""
    plain = Handler.reply

    def reply(self: Handler, code: int, body: dict[str, Any]) -> None:
        changed = self.path.endswith("log-batch") and self.server.calls[-1][1].get("params")
        plain(self, 400 if changed else code, body)

    monkeypatch.setattr(Handler, "reply", reply)
    made = tracked(tmp_path / "log.jsonl")
    assert made.tracker and "400" in made.tracker.problem
    assert server.calls[-1][0] == "runs/update" and server.calls[-1][1]["status"] == "FINISHED"


def test_numbers_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    made = log.TrainLog(tmp_path / "log.jsonl")
    made.step(0, {"loss": float("nan"), "grad_norm": float("inf"), "lr": {"a": 0.1}})
    record = json.loads(made.text(), parse_constant=pytest.fail)
    assert record == {"step": 0, "loss": None, "grad_norm": None, "lr": {"a": 0.1}}


def test_dead_server_is_reported_and_the_file_is_whole(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    made = tracked(tmp_path / "log.jsonl")
    assert made.tracker and "127.0.0.1:1" in made.tracker.problem
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 400


def test_other_schemes_are_said_to_be_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    tracker, problem = log.tracker_from_environment("e", "n", "p/", {}, {})
    assert tracker is None and "sqlite" in problem
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert log.tracker_from_environment("e", "n", "p/", {}, {}) == (None, "")


def test_resumed_log_keeps_only_finished_steps() -> None:
    text = '{"step": 0, "loss": 2}\n{"step": 1, "loss": 1}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo'
    assert log.steps_before(text, 2) == '{"step": 0, "loss": 2}\n{"step": 1, "loss": 1}\n'
