"""The SDK: submit a recipe to Kubeflow Pipelines, follow it, compare runs, promote what came out.

    from vlmflow.client import Client

    run = Client().submit("recipes/points-9b.yaml", ["seed=7"])
    Client().wait(run.run_id)

Thin over kfp's client and MLflow: whatever it does can also be done in their own UIs. Credentials come from the
environment or the configuration file, as kfp's client takes them; nothing secret becomes a parameter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow import kfp_api, settings
from vlmflow.digest import sha256_bytes
from vlmflow.errors import NotFound, RecipeError, ServiceError, StepFailed

if TYPE_CHECKING:
    from vlmflow.registry.desk import Promotion
    from vlmflow.registry.promote import Outcome

TERMINAL = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
FIRST_POLL, LONGEST_POLL = 2.0, 30.0


@dataclass(frozen=True)
class Task:
    """One task of a run."""

    name: str
    state: str
    pod: str = ""
    error: str = ""


@dataclass(frozen=True)
class Run:
    """A run as Kubeflow Pipelines describes it."""

    run_id: str
    name: str
    state: str
    experiment_id: str = ""
    created: str = ""
    finished: str = ""
    url: str = ""
    error: str = ""
    tasks: tuple[Task, ...] = ()

    @property
    def done(self) -> bool:
        """The run will not change any more."""
        return self.state in TERMINAL

    def as_json(self) -> dict[str, Any]:
        """The run as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Submission:
    """What would be sent, or was: pipeline, parameters, where the recipe lies."""

    pipeline: str
    name: str
    recipe_uri: str
    parameters: dict[str, Any] = field(default_factory=dict)
    run: Run | None = None


class Client:
    """One installation of vlmflow on a cluster.

    Args:
        flags: endpoint, token, namespace, experiment, service_account, root, mlflow; see `vlmflow.settings`.
    """

    def __init__(self, **flags: str | None) -> None:
        self.settings = settings.load(**flags)
        self._kfp: Any = None

    @property
    def kfp(self) -> Any:
        """kfp's client, connected on first use. Raises ServiceError."""
        if self._kfp is None:
            self._kfp = kfp_api.connect(self.settings.endpoint, self.settings.token, self.settings.namespace)
        return self._kfp

    def submit(
        self,
        recipe: str | Path,
        overrides: Sequence[str] = (),
        pipeline: str = "points",
        name: str | None = None,
        parameters: dict[str, Any] | None = None,
        dry_run: bool = False,
    ) -> Submission:
        """Check a recipe, put it into the store and start a run of a registered pipeline.

        Args:
            overrides: changes to the recipe, `section.key=value`; they become a parameter, visible in the UI.
            parameters: further parameters of the pipeline.
            dry_run: check everything that can be checked without changing anything.

        Raises:
            RecipeError: the recipe or a parameter is wrong.
            NotFound: the pipeline is not registered.
            ServiceError, StorageError: a server does not answer or refuses.
        """
        from vlmflow import pipeline_needs, preflight, storage

        like = pipeline if pipeline in pipeline_needs.PIPELINES else "points"  # a copy of it under another name
        loaded = preflight.resolve(str(recipe), list(overrides), pipeline=like)
        text = Path(recipe).read_bytes() if "://" not in str(recipe) else b""
        if text and not self.settings.root.startswith("s3://"):
            raise RecipeError(
                f"the store's root is {self.settings.root or 'not set'!r}: a cluster cannot read {recipe} from this machine. Set "
                "VLMFLOW_ROOT (and the store's credentials) to put it there, or give a URI that the cluster can read"
            )
        uri = storage.join(self.settings.root, "recipes", f"{sha256_bytes(text)[:24]}.yaml") if text else str(recipe)
        values = {"recipe": uri, "overrides": list(overrides), **(parameters or {})}
        run_name = name or f"{loaded.name} {pipeline}"
        if dry_run:
            return Submission(pipeline, run_name, uri, values)
        pipeline_id, version_id, known = self._pipeline(pipeline)
        if unknown := sorted(set(parameters or {}) - known):
            raise RecipeError(f"pipeline '{pipeline}' has no parameters {unknown}; it has {sorted(known)}")
        if text:
            storage.write_bytes(uri, text)
        run = self._start(pipeline_id, version_id, run_name, {k: v for k, v in values.items() if k in known})
        return Submission(pipeline, run_name, uri, values, run)

    def start_once(self, pipeline: str, name: str, parameters: dict[str, Any]) -> Run:
        """Start a run unless one of that name exists already (running or done); returns it either way."""
        with kfp_api.translated(f"looking for run '{name}'"):
            page = self.kfp.list_runs(experiment_id=self._experiment(), filter=_equals("display_name", name))
        if page.runs:
            return _run(page.runs[0], self.settings.endpoint)
        pipeline_id, version_id, _ = self._pipeline(pipeline)
        return self._start(pipeline_id, version_id, name, parameters)

    def get(self, run_id: str) -> Run:
        """A run by its id. Raises NotFound."""
        with kfp_api.translated(f"reading run {run_id}"):
            return _run(self.kfp.get_run(run_id), self.settings.endpoint)

    def runs(self, limit: int = 20) -> list[Run]:
        """The newest runs of the experiment."""
        with kfp_api.translated("listing runs"):
            page = self.kfp.list_runs(
                experiment_id=self._experiment(), page_size=limit, sort_by="created_at desc", namespace=None
            )
        return [_run(found, self.settings.endpoint) for found in page.runs or []]

    def wait(
        self,
        run_id: str,
        timeout: float | None = None,
        on_change: Callable[[Run], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> Run:
        """Follow a run to its end; servers that are away for a while are waited for.

        Args:
            timeout: seconds, None = as long as it takes. A run that waits in a queue is not failed for it.
            on_change: called with the run whenever its state or a task's changes.

        Raises:
            StepFailed: the run did not succeed; names the tasks that failed.
            ServiceError: not done within `timeout`.
        """
        started, pause, seen = clock(), FIRST_POLL, None
        trouble = ""
        while True:
            try:
                run = self.get(run_id)
                trouble = ""
            except NotFound:
                raise
            except ServiceError as error:
                run, trouble = None, str(error)
            if run is not None:
                now = (run.state, tuple((task.name, task.state) for task in run.tasks))
                if now != seen and on_change is not None:
                    on_change(run)
                pause = FIRST_POLL if now != seen else min(LONGEST_POLL, pause * 1.5)
                seen = now
                if run.done:
                    if run.state != "SUCCEEDED":
                        failed = [
                            f"{task.name} ({task.error or task.state})" for task in run.tasks if task.state == "FAILED"
                        ]
                        raise StepFailed(
                            f"run {run.name} ended as {run.state}: {', '.join(failed) or run.error or 'no task says why'}; {run.url}"
                        )
                    return run
            if timeout is not None and clock() - started > timeout:
                state = f"is {run.state}" if run is not None else f"cannot be read ({trouble})"
                raise ServiceError(
                    f"run {run_id} {state} after {timeout:.0f} s; it goes on, `vlmflow watch {run_id}` follows it"
                )
            sleep(pause)

    def cancel(self, run_id: str) -> Run:
        """Ask a run to stop; a run that is done stays as it is."""
        run = self.get(run_id)
        if not run.done:
            with kfp_api.translated(f"cancelling run {run_id}"):
                self.kfp.terminate_run(run_id)
        return self.get(run_id)

    def logs(self, run_id: str, task: str | None = None, api: Any = None) -> Iterator[tuple[str, str]]:
        """(task, line) of the pods of a run that still exist.

        Args:
            task: only this task.
            api: `kubernetes.client.CoreV1Api`; None = from the kubeconfig or the pod's account.

        Raises:
            NotFound: no such task, or its pod is gone.
        """
        run = self.get(run_id)
        chosen = [each for each in run.tasks if each.pod and task in (None, each.name)]
        if not chosen:
            raise NotFound(
                f"run {run_id} has no pod of {f'task {task!r}' if task else 'any task'}; tasks are {[t.name for t in run.tasks]}"
            )
        if api is None:
            api = _core_api()
        for each in chosen:
            for line in _pod_log(api, each, self.settings.namespace):
                yield each.name, line

    def compare(self, versions: Sequence[str], model: str) -> list[dict[str, Any]]:
        """Scores of versions of `MODEL-candidates`, one dictionary a version: benchmark -> accuracy, and its gates."""
        from vlmflow.registry import promote, tracking

        mlflow = tracking.client()
        rows = []
        with tracking.translated(f"comparing versions of {model}"):
            for number in versions:
                version = mlflow.get_model_version(promote.candidates_of(model), number)
                metrics = mlflow.get_run(version.run_id).data.metrics
                scores = {n.removesuffix("/final"): v for n, v in sorted(metrics.items()) if n.endswith("/final")}
                chance = {n.removesuffix("/chance"): v for n, v in sorted(metrics.items()) if n.endswith("/chance")}
                gates = {n.removeprefix("gate."): v for n, v in sorted(version.tags.items()) if n.startswith("gate.")}
                rows.append({"version": str(version.version), "scores": scores, "chance": chance, "gates": gates})
        return rows

    def promote(self, model: str, candidate: str, approval_tag: str = "", by: str = "") -> Promotion:
        """Promote a candidate through the gates of its recipe and of the installation.

        Args:
            approval_tag: tag that must be set on the candidate besides what the installation asks.

        Raises:
            RegistryError: listing the gates that fail.
        """
        from vlmflow.registry import desk

        return desk.promote(model, candidate, approval_tag, by or _user())

    def rollback(self, model: str, why: str, by: str = "") -> Outcome:
        """`champion` back to `previous`. Raises RegistryError when there is none."""
        from vlmflow.registry import promote, tracking

        return promote.rollback(tracking.client(), model, why, by or _user())

    def _pipeline(self, name: str) -> tuple[str, str, set[str]]:
        """(pipeline id, newest version id, its parameters)."""
        with kfp_api.translated(f"looking for pipeline '{name}'"):
            pipeline_id = self.kfp.get_pipeline_id(name)
            if pipeline_id is None:
                raise NotFound(
                    f"pipeline '{name}' is not registered at {self.settings.endpoint}; the chart's bootstrap job does that, or: vlmflow "
                    f"register {name}"
                )
            page = self.kfp.list_pipeline_versions(pipeline_id, sort_by="created_at desc", page_size=1)
        if not page.pipeline_versions:
            raise NotFound(f"pipeline '{name}' has no version; register it again: vlmflow register {name}")
        version = page.pipeline_versions[0]
        spec = version.pipeline_spec or {}
        spec = spec.get("pipeline_spec", spec)
        return (
            pipeline_id,
            version.pipeline_version_id,
            set(spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})),
        )

    def _start(self, pipeline_id: str, version_id: str, name: str, parameters: dict[str, Any]) -> Run:
        with kfp_api.translated(f"starting run '{name}'"), kfp_api.quiet():
            found = self.kfp.run_pipeline(
                experiment_id=self._experiment(),
                job_name=name,
                pipeline_id=pipeline_id,
                version_id=version_id,
                params=parameters,
                service_account=self.settings.service_account or None,
            )
        return _run(found, self.settings.endpoint)

    def _experiment(self) -> str:
        with kfp_api.translated(f"opening experiment '{self.settings.experiment}'"), kfp_api.quiet():
            return self.kfp.create_experiment(self.settings.experiment).experiment_id


def _run(found: Any, endpoint: str) -> Run:
    details = (found.run_details.task_details if found.run_details else None) or []
    tasks = tuple(
        Task(
            str(detail.display_name or detail.task_id),
            str(detail.state or "PENDING"),
            str(detail.pod_name or ""),
            str(detail.error.message if detail.error else ""),
        )
        for detail in details
    )
    return Run(
        run_id=found.run_id,
        name=str(found.display_name),
        state=str(found.state or "PENDING"),
        experiment_id=str(found.experiment_id or ""),
        created=found.created_at.isoformat() if found.created_at else "",
        finished=found.finished_at.isoformat() if found.finished_at else "",
        url=f"{endpoint.rstrip('/')}/#/runs/details/{found.run_id}",
        error=str(found.error.message if found.error else ""),
        tasks=tasks,
    )


def _equals(key: str, value: str) -> str:
    import json

    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "stringValue": value}]})


def _core_api() -> Any:
    try:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException
    except ImportError as error:
        raise ServiceError(f"logs are read from Kubernetes: pip install 'vlmflow[services]' ({error})") from error
    try:
        config.load_config()
    except ConfigException as error:
        raise ServiceError(f"no kubeconfig and no pod's account: {error}") from error
    return client.CoreV1Api()


def _pod_log(api: Any, task: Task, namespace: str) -> list[str]:
    from kubernetes.client.exceptions import ApiException

    try:
        text = api.read_namespaced_pod_log(task.pod, namespace, container="main")
    except ApiException as error:
        if error.status == 404:
            raise NotFound(
                f"the pod {task.pod} of task {task.name} is gone; its log may be among the run's artifacts"
            ) from error
        raise ServiceError(f"the log of {task.pod} cannot be read: {error.status} {error.reason}") from error
    return text.splitlines()


def _user() -> str:
    import getpass

    return getpass.getuser()
