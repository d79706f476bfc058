"""A stand-in for Kubeflow Pipelines' API server, held to the schema of kfp-server-api.

Every request body and every answer goes through the generated models: an unknown field, a missing one or a wrong type
is an error of the test, as it would be one of the server. State lies in memory; a test may move runs along by hand.
"""

from __future__ import annotations

import json
import threading
import uuid
from datetime import UTC, datetime
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
import yaml

TERMINAL = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}


def wire(model: Any) -> Any:
    """A generated model as the JSON that goes over the wire."""
    return api.ApiClient().sanitize_for_serialization(model)


def parsed(kind: type, content: dict[str, Any]) -> Any:
    """JSON as a generated model. Raises ValueError for a field that the schema lacks."""
    names = {external: internal for internal, external in kind.attribute_map.items()}
    if unknown := sorted(set(content) - set(names)):
        raise ValueError(f"{kind.__name__} has no fields {unknown}")

    class Body:
        data = json.dumps(content)

    return api.ApiClient().deserialize(Body, kind)


class Kfp:
    """State and HTTP server.

    Attributes:
        token: bearer token that is demanded, "" = none.
        broken: answer every request with this status, 0 = healthy.
        calls: (method, path) of every request.
    """

    def __init__(self, token: str = "", multi_user: bool = False) -> None:
        self.token, self.multi_user, self.broken = token, multi_user, 0
        self.pipelines: dict[str, api.V2beta1Pipeline] = {}
        self.versions: dict[str, api.V2beta1PipelineVersion] = {}
        self.experiments: dict[str, api.V2beta1Experiment] = {}
        self.runs: dict[str, api.V2beta1Run] = {}
        self.calls: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Kfp:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def move(self, run_id: str, state: str, **tasks: str) -> None:
        """Put a run into a state, and its tasks into theirs."""
        run = self.runs[run_id]
        run.state = state
        run.finished_at = datetime.now(UTC) if state in TERMINAL else None
        details = [
            api.V2beta1PipelineTaskDetail(run_id=run_id, task_id=name, display_name=name.replace("_", " "), state=value, pod_name=f"pod-{name}")
            for name, value in tasks.items()
        ]  # fmt: skip
        run.run_details = api.V2beta1RunDetails(task_details=details)

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, kind: str) -> Any:
        """The answer to one request. Raises KeyError for 404, ValueError for 400."""
        parts = path.removeprefix("/apis/v2beta1/").split("/")
        content = json.loads(body) if body and "json" in kind else {}
        match method, parts:
            case "GET", ["healthz"]:
                return api.V2beta1GetHealthzResponse(multi_user=self.multi_user)
            case "GET", ["pipelines"]:
                return api.V2beta1ListPipelinesResponse(pipelines=_filtered(self.pipelines.values(), query))
            case "POST", ["pipelines"]:
                return self._pipeline(parsed(api.V2beta1Pipeline, content))
            case "POST", ["pipelines", "upload"]:
                made = self._pipeline(
                    api.V2beta1Pipeline(display_name=query["name"], description=query.get("description"))
                )
                self._version(made.pipeline_id, query["name"], body, kind)
                return made
            case "POST", ["pipelines", "upload_version"]:
                return self._version(self.pipelines[query["pipelineid"]].pipeline_id, query["name"], body, kind)
            case "GET", ["pipelines", pipeline_id]:
                return self.pipelines[pipeline_id]
            case "GET", ["pipelines", pipeline_id, "versions"]:
                found = [v for v in self.versions.values() if v.pipeline_id == pipeline_id]
                return api.V2beta1ListPipelineVersionsResponse(pipeline_versions=found, total_size=len(found))
            case "GET", ["experiments"]:
                return api.V2beta1ListExperimentsResponse(experiments=_filtered(self.experiments.values(), query))
            case "POST", ["experiments"]:
                experiment = parsed(api.V2beta1Experiment, content)
                experiment.experiment_id = str(uuid.uuid4())
                self.experiments[experiment.experiment_id] = experiment
                return experiment
            case "GET", ["experiments", experiment_id]:
                return self.experiments[experiment_id]
            case "GET", ["runs"]:
                found = _filtered(self.runs.values(), query)
                return api.V2beta1ListRunsResponse(runs=found, total_size=len(found))
            case "POST", ["runs"]:
                run = parsed(api.V2beta1Run, content)
                run.run_id, run.state = str(uuid.uuid4()), "PENDING"
                run.created_at = datetime.now(UTC)
                self.runs[run.run_id] = run
                return run
            case "GET", ["runs", run_id]:
                return self.runs[run_id]
            case "POST", ["runs", action] if action.endswith(":terminate"):
                self.runs[action.removesuffix(":terminate")].state = "CANCELING"
                return None
        raise KeyError(path)

    def _pipeline(self, made: Any) -> Any:
        if any(made.display_name == known.display_name for known in self.pipelines.values()):
            raise ValueError(f"pipeline {made.display_name} exists")
        made.pipeline_id = str(uuid.uuid4())
        made.created_at = datetime.now(UTC)
        self.pipelines[made.pipeline_id] = made
        return made

    def _version(self, pipeline_id: str, name: str, body: bytes, kind: str) -> Any:
        message = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
        package = next(iter(message.iter_parts())).get_payload(decode=True)
        spec = next(iter(yaml.safe_load_all(package)))
        if "pipelineInfo" not in spec:
            raise ValueError("not a pipeline package")
        made = api.V2beta1PipelineVersion(
            pipeline_id=pipeline_id, pipeline_version_id=str(uuid.uuid4()), display_name=name, pipeline_spec=spec,
            created_at=datetime.now(UTC),
        )  # fmt: skip
        self.versions[made.pipeline_version_id] = made
        return made

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        kfp = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _serve(self) -> None:
                split = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(split.query).items()}
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                kfp.calls.append((self.command, split.path))
                kfp.bodies.append(body)
                if kfp.broken:
                    return self._send(kfp.broken, {"message": "broken on purpose"})
                if kfp.token and self.headers.get("authorization") != f"Bearer {kfp.token}":
                    return self._send(401, {"message": "unauthenticated"})
                try:
                    with kfp.lock:
                        answer = kfp.answer(self.command, split.path, query, body, self.headers.get("content-type", ""))
                    self._send(200, wire(answer) if answer is not None else {})
                except KeyError as error:
                    self._send(404, {"message": f"not found: {error}"})
                except (ValueError, TypeError) as error:
                    self._send(400, {"message": str(error)})

            def _send(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _serve

        return Handler


def _filtered(items: Any, query: dict[str, str]) -> list[Any]:
    """KFP's filter, as far as its clients use it: equality of a field."""
    found = list(items)
    if query.get("experiment_id"):
        found = [item for item in found if item.experiment_id == query["experiment_id"]]
    for predicate in json.loads(query["filter"])["predicates"] if query.get("filter") else []:
        key, value = predicate["key"], predicate.get("stringValue", predicate.get("string_value"))
        key = {"name": "display_name"}.get(key, key)
        found = [item for item in found if getattr(item, key) == value]
    return found
