"""HTTP to addresses that a recipe names, under the rules that guard the puller.

Whoever may submit a run chooses the recipe, and the run has the rights of the pod it runs in: without a guard a table at
`http://169.254.169.254/...` reads the cloud's metadata service. The address that is connected to is judged, after name
resolution and at every redirect; proxies and other schemes are not used.
"""

from __future__ import annotations

import base64
import http.client
import os
import socket
import urllib.request
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from vlmflow.curation.guards import ForbiddenAddress, is_public

SCHEMES = ("http://", "https://")


def opener(allow_hosts: Iterable[str] = ()) -> urllib.request.OpenerDirector:
    """An opener that connects to public addresses and to `allow_hosts` (names, as in `pull.allow_hosts`) only.

    Its `open` raises URLError whose `reason` is a ForbiddenAddress for any other.
    """
    allowed = frozenset(host.lower() for host in allow_hosts)

    def connect(address: tuple[str, int], timeout: Any = None, source: Any = None) -> socket.socket:
        host, port = address
        found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if host.lower() not in allowed:
            for number in found:
                if not is_public(str(number)):
                    raise ForbiddenAddress(host, str(number))
        failed: OSError | None = None
        for number in found:  # by number: a second look-up could give another answer
            try:
                return socket.create_connection((str(number), port), timeout, source)
            except OSError as error:
                failed = error
        raise failed or OSError(f"{host} has no address")

    class Plain(http.client.HTTPConnection):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._create_connection = connect

    class Tls(http.client.HTTPSConnection):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._create_connection = connect

    class Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
        def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, request)

        def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Tls, request)

    made = urllib.request.OpenerDirector()
    for handler in (
        Handler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        made.add_handler(handler)
    return made


def forbidden(error: BaseException) -> ForbiddenAddress | None:
    """The address that the guard refused, when that is what an error of `opener` means."""
    reason = getattr(error, "reason", error)
    return reason if isinstance(reason, ForbiddenAddress) else None


def without_credentials(url: str) -> str:
    """The address without user name, password, query and fragment: fit for messages, pages and artifacts."""
    parts = urlsplit(url)
    if not parts.netloc:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def mlflow_login(uri: str) -> dict[str, str]:
    """The header by which MLflow's client logs in at `uri`: a server with logins tells strangers not even its version.

    User and password of the environment, else those that the address carries, else the token of the environment.
    """
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{part}", "") for part in ("USERNAME", "PASSWORD"))
    parts = urlsplit(uri)
    if not user and parts.username:
        user, password = unquote(parts.username), unquote(parts.password or "")
    if user:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}
