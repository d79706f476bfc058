"""A forged, replayed, late or oversized webhook changes nothing; a genuine one wakes the loop."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from services.promoter.loop import SOONER, Loop
from services.promoter.webhook import MOST_BYTES, Refusal, Verifier
from vlmflow.errors import RegistryError
from vlmflow.registry.promote import Outcome

NOW = 1_800_000_000.0
BODY = json.dumps(
    {"entity": "model_version", "action": "created", "data": {"name": "m-candidates", "version": "3"}}
).encode()


def headers(
    body: bytes = BODY, secret: str = "s3cret", delivery: str = "d-1", stamp: str | None = None
) -> dict[str, str]:
    """As MLflow signs (platform.md 4.2)."""
    stamp = stamp if stamp is not None else str(int(NOW))
    text = delivery.encode() + b"." + stamp.encode() + b"." + body
    mac = base64.b64encode(hmac.new(secret.encode(), text, hashlib.sha256).digest()).decode()
    return {"x-mlflow-signature": f"v1,{mac}", "x-mlflow-timestamp": stamp, "x-mlflow-delivery-id": delivery}


def refused(verifier: Verifier, given: dict[str, str], body: bytes = BODY, now: float = NOW) -> int:
    with pytest.raises(Refusal) as refusal:
        verifier.accept(given, body, now)
    return refusal.value.code


def test_a_genuine_delivery_is_accepted_once() -> None:
    verifier = Verifier("s3cret")
    assert verifier.accept(headers(), BODY, NOW)["data"]["version"] == "3"
    assert refused(verifier, headers()) == 409


def test_what_is_not_genuine_is_refused() -> None:
    verifier = Verifier("s3cret")
    assert refused(verifier, headers(secret="other")) == 401
    assert refused(verifier, headers(), BODY.replace(b"3", b"4")) == 401
    assert refused(verifier, {**headers(), "x-mlflow-delivery-id": "d-2"}) == 401
    assert refused(verifier, {**headers(), "x-mlflow-timestamp": str(int(NOW) + 1)}) == 401
    assert refused(verifier, {**headers(), "x-mlflow-signature": "v1,ü"}) == 401
    assert refused(verifier, {}) == 401
    assert refused(verifier, headers(stamp="nan")) == 408
    assert refused(verifier, headers(stamp="soon")) == 401
    assert refused(verifier, headers(), now=NOW + 301) == 408
    assert refused(verifier, headers(), now=NOW - 301) == 408
    large = b" " * (MOST_BYTES + 1)
    assert refused(verifier, headers(large), large) == 413
    assert refused(verifier, headers(b"[]", delivery="d-3"), b"[]") == 400
    assert refused(verifier, headers(b"{", delivery="d-4"), b"{") == 400
    assert verifier.accept(headers(), BODY, NOW), "none of these used up the genuine delivery"


def test_there_is_no_verifier_without_a_secret() -> None:
    with pytest.raises(ValueError, match="anybody"):
        Verifier("")


class Server:
    """The real application behind uvicorn, with a loop whose looks are counted."""

    def __init__(self, period: float = 3600.0) -> None:
        import uvicorn

        from services.promoter.app import create

        self.looked = threading.Semaphore(0)
        self.looks = 0
        self.fail = False
        self.followed: list[str] = []

        def look(model: str) -> Outcome:
            self.looks += 1
            self.looked.release()
            if self.fail:
                raise RegistryError("no MLflow server answers")
            return Outcome(model, "unchanged", "1", "1", "")

        self.loop = Loop(["m"], look, lambda outcome: self.followed.append(outcome.version), period, lambda: NOW)
        app = create(self.loop, Verifier("s3cret"), lambda: NOW)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Server:
        self.thread.start()
        self.loop.start()
        assert self.looked.acquire(timeout=20)
        while not self.server.started:
            self.thread.join(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        self.loop.stop()

    def call(self, path: str, body: bytes | None = None, given: dict[str, str] | None = None) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, data=body, headers=given or {})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        yield made


def test_only_a_genuine_webhook_wakes_the_loop(server: Server) -> None:
    assert server.call("/webhook", BODY, headers(secret="other"))[0] == 401
    large = b"x" * (MOST_BYTES + 10)
    assert server.call("/webhook", large, headers(large))[0] == 413
    other = BODY.replace(b"m-candidates", b"another")
    assert server.call("/webhook", other, headers(other, delivery="d-9"))[0] == 204
    assert server.looks == 1
    assert server.call("/webhook", BODY, headers())[0] == 204
    assert server.looked.acquire(timeout=20)
    assert server.call("/webhook", BODY, headers())[0] == 409
    assert server.looks == 2
    text = server.call("/metrics")[1]
    assert 'refused_total{code="401"} 1' in text and 'refused_total{code="413"} 1' in text
    assert 'champion_version{model="m"} 1' in text


def test_probes_tell_life_from_success(server: Server) -> None:
    assert server.call("/healthz")[0] == 200
    assert server.call("/readyz")[0] == 200
    server.fail = True
    server.loop.clock = lambda: NOW + 4 * 3600
    server.loop.wake()
    assert server.looked.acquire(timeout=20)
    assert server.call("/healthz")[0] == 200
    assert server.call("/readyz")[0] == 503
    assert server.call("/docs")[0] == 404


def test_a_promoter_that_starts_before_its_registry_is_ready_and_tries_soon() -> None:
    """Helm's --wait runs the bootstrap, which makes the promoter's identity, when all pods are ready."""
    now, there = [NOW], [False]

    def look(model: str) -> Outcome:
        if not there[0]:
            raise RegistryError("401: no such user yet")
        return Outcome(model, "unchanged", "", "", "")

    loop = Loop(["m"], look, lambda outcome: None, 300.0, lambda: now[0])
    assert loop.ready() and not loop.round() and loop.ready()
    pauses = []
    for _ in range(8):
        pauses.append(loop.pause())
        loop.round()
    assert pauses[0] == SOONER and pauses == sorted(pauses) and pauses[-1] == 300.0
    now[0] += 901
    assert not loop.ready(), "three periods without a success"
    there[0] = True
    assert loop.round() and loop.ready() and loop.pause() == 300.0


def test_a_failure_of_one_model_does_not_keep_the_others_from_being_looked_at() -> None:
    def look(model: str) -> Outcome:
        if model == "a":
            raise RegistryError("gone")
        if model == "b":
            raise RuntimeError("a bug")
        return Outcome(model, "promoted", "7", "9", "")

    follows: list[str] = []

    def after(outcome: Outcome) -> None:
        follows.append(outcome.version)
        if len(follows) == 1:
            raise RegistryError("the cluster is away")

    loop = Loop(["a", "b", "c"], look, after, 1.0)
    for _ in range(3):
        assert loop.round() is False
    assert follows == ["7", "7"], "repeated until it succeeds, then left alone"
    assert loop.state.failures == {"a": 3, "b": 3, "c": 1}
