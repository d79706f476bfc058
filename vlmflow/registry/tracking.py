"""The door to MLflow: opened late, checked first, with errors a user can act on.

`import mlflow` takes seconds, so nothing here imports it before `client()`. The tracking server comes from the
environment only (`MLFLOW_TRACKING_URI`), never from a recipe or a pipeline parameter. Where Kubeflow's MLflow plugin
has already opened a run for the task (`MLFLOW_RUN_ID`, platform.md 1.6), that run is used.
"""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vlmflow.errors import RegistryError
from vlmflow.web import mlflow_login, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY_TAG = "vlmflow.key"  # what a run, logged model or version was made from; found again by it
HEALTH_SECONDS = 5.0


def tracking_uri() -> str:
    """Address of the tracking server. Raises RegistryError when the environment does not name one."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        raise RegistryError(
            "MLFLOW_TRACKING_URI is not set: runs and models are recorded in MLflow. On a laptop "
            '`eval "$(vlmflow up --export)"` starts a server and sets it, as `vlmflow run` does for itself; '
            "on a cluster it comes from mounted configuration."
        )
    return uri.rstrip("/")


def shown_uri() -> str:
    """The server's address as it may stand in messages and artifacts: without user name and password."""
    return without_credentials(tracking_uri())


def client() -> MlflowClient:
    """A client of the server that MLFLOW_TRACKING_URI names, after one quick look whether anybody answers.

    Raises RegistryError when the variable is unset, the server does not answer, or mlflow is not installed.
    """
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        check_answers(uri)
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"),  # the default of 7 waits minutes for a dead server
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("GIT_PYTHON_REFRESH", "quiet"),
    ):
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise RegistryError(
            f"mlflow cannot be imported ({error}); install it with: pip install 'vlmflow[local]'"
        ) from error
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check_answers(uri: str) -> None:
    """One GET of `/health` (unauthenticated, platform.md 4.1) before the import of mlflow and its long retries."""
    uri = without_credentials(uri).rstrip("/")
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=HEALTH_SECONDS):
            return
    except urllib.error.HTTPError as error:
        if error.code < 500:
            hint = " (its list of allowed host names lacks this one)" if error.code == 403 else ""
            raise RegistryError(
                f"the server at MLFLOW_TRACKING_URI={uri} answers {error.code} for /health{hint}: "
                "it is not an MLflow server that this client may use"
            ) from error
        raise RegistryError(
            f"the MLflow server at {uri} is unwell: {error.code} for /health; look at its log"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RegistryError(
            f"no MLflow server answers at MLFLOW_TRACKING_URI={uri} ({reason}). On a laptop start it with "
            "`vlmflow up`; finished work is kept, run the same command again afterwards."
        ) from error


def server_version(uri: str) -> str:
    """Version of the tracking server, such as "3.17.2". Raises RegistryError when it does not say."""
    login, uri = mlflow_login(uri), without_credentials(uri).rstrip("/")
    try:
        asked = urllib.request.Request(f"{uri}/version", headers=login)
        with urllib.request.urlopen(asked, timeout=HEALTH_SECONDS) as answer:
            return answer.read(100).decode().strip()
    except (OSError, ValueError) as error:
        raise RegistryError(f"the server at {uri} does not say which version of MLflow it is ({error})") from error


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn MLflow's and the HTTP client's errors into a RegistryError that says what was being done."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        text = str(error).strip().splitlines()[0][:500] if str(error).strip() else type(error).__name__
        raise RegistryError(f"MLflow at {shown_uri()} failed while {doing}: {text}") from error


def experiment(mlflow: MlflowClient, name: str) -> str:
    """Id of the experiment of that name; created when absent, also when another process creates it meanwhile."""
    from mlflow.exceptions import MlflowException

    with translated(f"looking for experiment '{name}'"):
        found = mlflow.get_experiment_by_name(name)
        if found is None:
            with contextlib.suppress(MlflowException):
                return str(mlflow.create_experiment(name))
            found = mlflow.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise RegistryError(
                f"experiment '{name}' cannot be used: it is deleted. Restore it (mlflow experiments restore) or set "
                "another registry.model in the recipe."
            )
        return str(found.experiment_id)


def find_or_create_run(mlflow: MlflowClient, experiment_id: str, key: str, name: str, tags: dict[str, str]) -> str:
    """Id of the one run that belongs to `key` (a digest of its inputs); MLFLOW_RUN_ID, when set, takes precedence.

    The tags are (re)written, so a run that was cut off in the middle is completed by the next call.
    """
    with translated(f"opening run '{name}'"):
        given = os.environ.get("MLFLOW_RUN_ID")
        if given:
            run_id = str(mlflow.get_run(given).info.run_id)
        else:
            found: list[Any] = list(
                mlflow.search_runs(
                    [experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1, order_by=["start_time ASC"]
                )
            )
            if found:
                run_id = str(found[0].info.run_id)
            else:
                run_id = str(mlflow.create_run(experiment_id, tags={KEY_TAG: key}, run_name=name).info.run_id)
        for tag, value in {KEY_TAG: key, **tags}.items():
            mlflow.set_tag(run_id, tag, value)
        return run_id
