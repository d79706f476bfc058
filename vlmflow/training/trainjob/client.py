"""The Kubernetes API as the launcher needs it: few calls, each of them patient.

A training takes days, an API server is upgraded in between. Server errors, throttling, broken connections and
time-outs are tried again with growing pauses until `patience` seconds have passed without an answer; a refusal (403, 404,
409, 422) is an answer and comes back at once as `Refused`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from vlmflow.errors import ServiceError
from vlmflow.training.trainjob.clock import Clock

TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
SAY_AFTER = 20.0  # seconds of silence before a person is told
UNKNOWN_LIMIT = 5  # 401 in a row before the credentials are called wrong


class Refused(ServiceError):
    """The API answered, and the answer is no.

    Attributes:
        status: HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """The launcher was told to stop while it waited for an answer."""


def connect() -> Any:
    """A kubernetes ApiClient from the pod's service account, else from the kubeconfig.

    Raises:
        ServiceError: the package is missing, or there is neither.
    """
    try:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException
    except ImportError as error:
        raise ServiceError("the package kubernetes is not installed; install vlmflow[cluster]") from error
    made = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=made)
    except ConfigException:
        try:
            # named here, because the package reads the variable once, when it is imported
            config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=made)
        except (ConfigException, OSError) as error:
            raise ServiceError(
                f"no Kubernetes API: this process runs in no pod and has no kubeconfig ({error}). Set KUBECONFIG, or train "
                "with VLMFLOW_TRAIN_LAUNCHER=local."
            ) from error
    made.retries = False  # we retry, and say so
    return client.ApiClient(made)


class Api:
    """Calls with patience.

    Args:
        say: told when the API stays silent and when it answers again.
        connect: makes the client; called again after a 401, because tokens are rotated.
    """

    def __init__(
        self, clock: Clock, patience: float, say: Callable[[str], None], connect: Callable[[], Any] = connect
    ) -> None:
        self.clock, self.patience, self.say, self._connect = clock, patience, say, connect
        self._client = connect()

    def json(self, method: str, path: str, query: dict[str, str] | None = None, body: Any = None) -> dict[str, Any]:
        """One call; returns the parsed object. Raises Refused, ServiceError (out of patience) or Stopped."""
        return self._patiently(lambda: self._once(method, path, query, body), f"{method} {path}", self.patience)

    def text(self, path: str, query: dict[str, str]) -> str:
        """The text of a GET, tried once: logs are asked for again anyway. Raises Refused or ServiceError."""
        return self._patiently(lambda: self._raw("GET", path, query, None).decode("utf-8", "replace"), path, 0.0)

    def quickly(self, method: str, path: str, body: Any, seconds: float) -> dict[str, Any]:
        """One call for which little time is left; it is made even though the launcher was told to stop."""
        return self._patiently(lambda: self._once(method, path, None, body), f"{method} {path}", seconds, heed=False)

    def _patiently(self, call: Callable[[], Any], what: str, patience: float, heed: bool = True) -> Any:
        began, attempt, unknown, told = self.clock.now(), 0, 0, False
        while True:
            try:
                answer = call()
            except _Again as again:
                problem, wait = str(again), again.wait
                unknown = unknown + 1 if again.unknown else 0
            else:
                if told:
                    self.say(f"the Kubernetes API answers again, after {self.clock.now() - began:.0f} s")
                return answer
            if heed and self.clock.stop.is_set():
                raise Stopped
            silent = self.clock.now() - began
            if unknown >= UNKNOWN_LIMIT:
                raise ServiceError(
                    f"the Kubernetes API does not know us ({what}: 401, {unknown} times, each time with the credentials read "
                    "anew). Renew the kubeconfig, or look at the service account of this pod."
                )
            if silent >= patience:
                raise ServiceError(
                    f"the Kubernetes API gave no usable answer for {silent:.0f} s, {patience:.0f} s were waited for ({what}: "
                    f"{problem}). A training that was started goes on; running the same command again finds it."
                )
            if silent >= SAY_AFTER and not told:
                told = True
                self.say(f"the Kubernetes API has not answered for {silent:.0f} s ({problem}); trying on")
            attempt += 1
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempt - 1, 10))
            # at least half the pause, so that a storm of refusals is not answered by a storm of calls
            self.clock.sleep(max(wait, pause * (0.5 + 0.5 * self.clock.chance())))

    def _once(self, method: str, path: str, query: dict[str, str] | None, body: Any) -> dict[str, Any]:
        data = self._raw(method, path, query, body)
        try:
            return json.loads(data)
        except ValueError as error:
            raise _Again(f"an answer of {len(data)} bytes that is not JSON") from error

    def _raw(self, method: str, path: str, query: dict[str, str] | None, body: Any) -> bytes:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json, */*", "Content-Type": "application/json"}
        try:
            answer = self._client.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=TIMEOUT,
            )
            data = answer.read()
            status, words, wait = answer.status, data, answer.headers.get("Retry-After")
        except ApiException as error:
            status, words = error.status or 0, error.body or str(error.reason).encode()
            wait = (error.headers or {}).get("Retry-After")
        except (HTTPError, OSError) as error:
            raise _Again(f"{type(error).__name__}: {error}"[:300]) from error
        if 200 <= status < 300:
            return data
        message = _message(words)
        if status == 401:
            self._client = self._connect()
            raise _Again("401 Unauthorized", unknown=True)
        if status == 0 or status == 429 or status >= 500:
            raise _Again(f"{status} {message}"[:300], _seconds(wait))
        raise Refused(status, f"the Kubernetes API refuses {method} {path}: {status} {message}")


class _Again(Exception):
    """An answer that may be another one the next time."""

    def __init__(self, message: str, wait: float = 0.0, unknown: bool = False) -> None:
        super().__init__(message)
        self.wait, self.unknown = wait, unknown


def _message(body: bytes | str) -> str:
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    try:
        return str(json.loads(text).get("message") or text)
    except (ValueError, AttributeError):
        return text.strip()[:500]


def _seconds(header: str | None) -> float:
    """Retry-After in seconds, at most a minute."""
    return min(60.0, float(header)) if header and header.strip().isdigit() else 0.0
