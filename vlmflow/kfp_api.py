"""The door to Kubeflow Pipelines' API: opened late, with errors a user can act on.

kfp's own client does the speaking; here it is given an endpoint that never comes from a pipeline parameter, and its
errors get a sentence. Importing kfp takes seconds, so nothing here does before it must.
"""

from __future__ import annotations

import contextlib
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmflow.digest import sha256_bytes
from vlmflow.errors import NotFound, ServiceError

PROBE_SECONDS = 10.0
HINTS = {
    401: "the token is missing or has expired; get a new one",
    403: "this identity may not do that; look at its roles in the namespace",
    404: "this is not the API of Kubeflow Pipelines 2; the UI's address works too, with its path",
}


def connect(endpoint: str, token: str = "", namespace: str = "") -> Any:
    """A kfp client of that endpoint.

    Args:
        endpoint: URL of the API server or of the UI in front of it.
        token: bearer token, or "" where the API asks for none.

    Raises:
        ServiceError: no endpoint is named, or kfp is not installed.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ServiceError(
            f"the Kubeflow Pipelines endpoint is {endpoint or 'not set'!r}: give a URL, such as http://localhost:8080, by "
            "--endpoint, VLMFLOW_KFP_ENDPOINT or `endpoint` in the configuration file"
        )
    _probe(endpoint.rstrip("/"), token)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kfp import client

        with translated(f"reaching {endpoint}"):
            return client.Client(host=endpoint, existing_token=token or None, namespace=namespace or "kubeflow")


def _probe(endpoint: str, token: str) -> None:
    """One look at `healthz`, because kfp's own client tries five times, five seconds apart, and then says little."""
    request = urllib.request.Request(f"{endpoint}/apis/v2beta1/healthz")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        raise ServiceError(
            f"Kubeflow Pipelines at {endpoint} answers {error.code} for healthz: {HINTS.get(error.code, 'look at its log')}"
        ) from error
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"nobody answers at the Kubeflow Pipelines endpoint {endpoint} ({getattr(error, 'reason', error)}); look at the "
            "endpoint, or at the port-forward"
        ) from error


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn kfp's and urllib3's errors into a ServiceError (NotFound for a 404) that says what was being done."""
    from kfp_server_api.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        if error.status == 404:
            raise NotFound(f"{doing}: Kubeflow Pipelines knows no such thing") from error
        hint = HINTS.get(error.status, str(error.body or error.reason or "").strip()[:300])
        raise ServiceError(f"{doing}: Kubeflow Pipelines answers {error.status}: {hint}") from error
    except (HTTPError, OSError, ValueError) as error:
        raise ServiceError(
            f"{doing}: Kubeflow Pipelines does not answer ({str(error).splitlines()[0][:300]}); look at the endpoint"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """kfp prints links and markup to standard output, where programs expect ours."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def register(kfp: Any, name: str, package: str, folder: Path, description: str = "") -> tuple[str, str, bool]:
    """Make sure that a pipeline of that name has this package as a version.

    The version's name holds the package's hash, so a second call finds it and an unchanged pipeline gets no new
    version.

    Args:
        package: compiled YAML.
        folder: for the file that kfp wants to upload.

    Returns:
        (pipeline id, version id, whether something was made).
    """
    version_name = f"{name}-{sha256_bytes(package.encode())[:12]}"
    path = folder / f"{version_name}.yaml"
    path.write_text(package)
    with translated(f"registering pipeline '{name}'"):
        pipeline_id = kfp.get_pipeline_id(name)
        if pipeline_id is None:
            from kfp_server_api import V2beta1Pipeline

            # Uploading would also make a version, named like the pipeline, that no later call could recognise.
            empty = V2beta1Pipeline(display_name=name, name=name, description=description)
            pipeline_id = kfp._pipelines_api.pipeline_service_create_pipeline(empty).pipeline_id
        found = _version(kfp, pipeline_id, version_name)
        if found is not None:
            return pipeline_id, found.pipeline_version_id, False
        with quiet():
            version = kfp.upload_pipeline_version(str(path), version_name, pipeline_id=pipeline_id)
        return pipeline_id, version.pipeline_version_id, True


def _version(kfp: Any, pipeline_id: str, name: str) -> Any | None:
    token = ""
    while True:
        page = kfp.list_pipeline_versions(pipeline_id, page_token=token, page_size=100)
        for version in page.pipeline_versions or []:
            if name in (version.display_name, getattr(version, "name", None)):
                return version
        token = page.next_page_token
        if not token:
            return None
