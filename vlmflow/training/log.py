"""Where a training says what it does: a JSON line a step, MLflow beside it, never in its way.

The file is the record; it travels with checkpoints and ends beside the model. MLflow gets the same numbers in batches
from a thread of its own over its REST interface: importing the client costs a second, and a slow or dead server must
not cost a step. A server that is down is reported once and training goes on.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vlmflow.web import mlflow_login, without_credentials

BATCH = 900  # MLflow takes 1000 metrics a request
INTERVAL = 2.0  # seconds between requests
TIMEOUT = 5.0  # seconds one request may take
CLOSING = 15.0  # seconds the end of training waits for the last batch


class TrainLog:
    """Metrics of every step, as JSON lines.

    Args:
        path: local file; opened for appending after ``keep_steps`` lines of an earlier attempt.
    """

    def __init__(self, path: Path, earlier: str = "", tracker: Tracker | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(earlier, encoding="utf-8")
        self.path = path
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self.tracker = tracker

    def step(self, step: int, record: dict[str, Any]) -> None:
        """One step's numbers; nested dicts (rates by group) are flattened for MLflow with a slash."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        if self.tracker is not None:
            self.tracker.metrics(step, record)

    def text(self) -> str:
        """Everything written so far."""
        self.file.flush()
        return self.path.read_text(encoding="utf-8")

    def close(self, status: str = "FINISHED") -> None:
        """Flush the file and let the tracker send what is left, within a bound, and end its run as ``status``."""
        self.file.close()
        if self.tracker is not None:
            self.tracker.close(status)


def steps_before(text: str, step: int) -> str:
    """The lines of an earlier log that belong to steps before ``step``; a cut last line is left out."""
    kept = []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return "".join(kept)


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """``{"lr": {"a": 1}}`` -> ``{"lr/a": 1.0}``; what is not a number is left out, names are made legal for MLflow."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        clean = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in f"{prefix}{name}")
        if isinstance(value, dict):
            flat.update(flatten(value, f"{clean}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[clean] = float(value)
    return flat


class Tracker:
    """Sends metrics to an MLflow server in the background.

    Args:
        uri: ``http(s)://`` address of the server.
        run_id: run to write to; None makes one in ``experiment``.
        prefix: put before every metric, e.g. ``align/``, so that the stages of one run stay apart.

    Attributes:
        problem: what went wrong first, or "".
    """

    def __init__(
        self,
        uri: str,
        run_id: str | None,
        experiment: str,
        name: str,
        prefix: str,
        tags: dict[str, str],
        params: dict[str, str],
    ) -> None:
        self.uri, self.run_id, self.prefix = without_credentials(uri).rstrip("/"), run_id, prefix
        self._login = mlflow_login(uri)
        self.experiment, self.name, self.tags, self.params = experiment, name, tags, params
        self.problem = ""
        self._owns, self._status = not os.environ.get("MLFLOW_RUN_ID"), "FINISHED"
        self._queue: queue.Queue[tuple[int, int, dict[str, Any]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, step: int, record: dict[str, Any]) -> None:
        """Queue the numbers of a step; returns at once."""
        self._queue.put((step, int(time.time() * 1000), record))

    def close(self, status: str = "FINISHED") -> None:
        """Send the rest and, for a run made here, its status; gives up after ``CLOSING`` seconds."""
        self._status = status
        self._queue.put(None)
        self._thread.join(CLOSING)
        if self._thread.is_alive():
            self.problem = self.problem or f"MLflow at {self.uri} did not take the last metrics within {CLOSING:.0f} s"

    def _work(self) -> None:
        try:
            self._start()
        except Exception as error:
            self._failed(error)
        ended = False
        while not ended:
            points: list[dict[str, Any]] = []
            until = time.monotonic() + INTERVAL
            while len(points) < BATCH and not ended and (left := until - time.monotonic()) > 0:
                try:
                    item = self._queue.get(timeout=left)
                except queue.Empty:
                    break
                if item is None:
                    ended = True
                else:
                    step, stamp, record = item
                    flat = flatten(record, self.prefix)
                    points += [{"key": k, "value": v, "timestamp": stamp, "step": step} for k, v in flat.items()]
            if points and self.run_id:
                self._send(points)
        if self._owns and self.run_id:  # a run with a gap is still over
            body = {"run_id": self.run_id, "status": self._status, "end_time": int(time.time() * 1000)}
            try:
                self._call("POST", "runs/update", body)
            except Exception as error:
                self._failed(error)

    def _start(self) -> None:
        if self.run_id is None:
            found = self._experiment()
            tags = [{"key": "mlflow.runName", "value": self.name}]
            body = {"experiment_id": found, "start_time": int(time.time() * 1000), "tags": tags}
            self.run_id = self._call("POST", "runs/create", body)["run"]["info"]["run_id"]
        elif self._owns:
            self._call("POST", "runs/update", {"run_id": self.run_id, "status": "RUNNING"})
        tags = [{"key": k, "value": v} for k, v in self.tags.items()]
        params = [{"key": f"{self.prefix}{k}", "value": v[:5900]} for k, v in self.params.items()]
        self._call("POST", "runs/log-batch", {"run_id": self.run_id, "tags": tags, "params": params})

    def _experiment(self) -> str:
        try:
            got = self._call("GET", f"experiments/get-by-name?experiment_name={quote(self.experiment)}")
            return got["experiment"]["experiment_id"]
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
        return self._call("POST", "experiments/create", {"name": self.experiment})["experiment_id"]

    def _send(self, points: list[dict[str, Any]]) -> None:
        for start in range(0, len(points), BATCH):
            try:
                self._call("POST", "runs/log-batch", {"run_id": self.run_id, "metrics": points[start : start + BATCH]})
            except Exception as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        detail = error.read().decode(errors="replace")[:300] if isinstance(error, urllib.error.HTTPError) else ""
        if not self.problem:
            self.problem = f"MLflow at {self.uri}: {type(error).__name__}: {error} {detail}".strip()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.uri}/api/2.0/mlflow/{path}", data, method=method)
        request.add_header("Content-Type", "application/json")
        for name, value in self._login.items():
            request.add_header(name, value)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.loads(response.read() or b"{}")


def tracker_from_environment(
    experiment: str, name: str, prefix: str, tags: dict[str, str], params: dict[str, str], earlier: str | None = None
) -> tuple[Tracker | None, str]:
    """A tracker when ``MLFLOW_TRACKING_URI`` names a server; else None and, if set to something else, why.

    ``MLFLOW_RUN_ID`` names the run to write to; else ``earlier``, the run of an interrupted attempt; else a new one.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return None, ""
    if not uri.startswith(("http://", "https://")):
        return (
            None,
            f"MLFLOW_TRACKING_URI '{without_credentials(uri)}' is not http(s)://; training metrics stay in train_log.jsonl only",
        )
    run_id = os.environ.get("MLFLOW_RUN_ID") or earlier
    return Tracker(uri, run_id, os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment, name, prefix, tags, params), ""
