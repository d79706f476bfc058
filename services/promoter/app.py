"""HTTP face of the promoter: webhook in, probes and metrics out. Nothing here decides anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from services.promoter.loop import Loop
from services.promoter.webhook import MOST_BYTES, Refusal, Verifier


def create(loop: Loop, verifier: Verifier | None, clock: Callable[[], float] = time.time) -> Any:
    """The FastAPI application.

    Args:
        verifier: None = no webhook is configured, and none is accepted.
    """
    from fastapi import FastAPI, Request, Response

    app = FastAPI(title="vlmflow promoter", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    def healthz() -> Response:
        return Response("ok\n" if loop.alive else "the reconcile thread died\n", 200 if loop.alive else 500)

    @app.get("/readyz")
    def readyz() -> Response:
        return Response(
            "ok\n" if loop.ready() else "no successful round for three periods\n", 200 if loop.ready() else 503
        )

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(loop), media_type="text/plain; version=0.0.4")

    async def webhook(request: Any) -> Response:
        if verifier is None:
            return Response("no webhook is configured\n", 404)
        try:
            event = verifier.accept(request.headers, await _body(request), clock())
        except Refusal as refusal:
            loop.state.refused[str(refusal.code)] += 1
            return Response(refusal.reason + "\n", refusal.code)
        name = str((event.get("data") or {}).get("name", "")) if isinstance(event.get("data"), dict) else ""
        if name.removesuffix("-candidates") in loop.models:
            loop.wake()
        return Response(status_code=204)

    webhook.__annotations__["request"] = Request
    app.post("/webhook")(webhook)
    return app


async def _body(request: Any) -> bytes:
    """The raw body, read no further than the limit."""
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > MOST_BYTES:
            raise Refusal(413, f"more than {MOST_BYTES} bytes")
    return bytes(found)


def exposition(loop: Loop) -> str:
    """Prometheus' text format."""
    state = loop.state
    lines = [
        "# HELP vlmflow_promoter_rounds_total Finished rounds.",
        "# TYPE vlmflow_promoter_rounds_total counter",
        f"vlmflow_promoter_rounds_total {state.rounds}",
        "# HELP vlmflow_promoter_failures_total Rounds of a model that failed.",
        "# TYPE vlmflow_promoter_failures_total counter",
        *[f'vlmflow_promoter_failures_total{{model="{m}"}} {state.failures[m]}' for m in loop.models],
        "# HELP vlmflow_promoter_actions_total Outcomes of looking at a model.",
        "# TYPE vlmflow_promoter_actions_total counter",
        *[
            f'vlmflow_promoter_actions_total{{model="{m}",action="{a}"}} {n}'
            for (m, a), n in sorted(state.actions.items())
        ],
        "# HELP vlmflow_promoter_webhooks_refused_total Webhooks that were not accepted, by status.",
        "# TYPE vlmflow_promoter_webhooks_refused_total counter",
        *[f'vlmflow_promoter_webhooks_refused_total{{code="{c}"}} {n}' for c, n in sorted(state.refused.items())],
        "# HELP vlmflow_promoter_last_success_timestamp_seconds Last round in which every model was looked at.",
        "# TYPE vlmflow_promoter_last_success_timestamp_seconds gauge",
        f"vlmflow_promoter_last_success_timestamp_seconds {state.last_success:.0f}",
        "# HELP vlmflow_promoter_champion_version Version that is champion.",
        "# TYPE vlmflow_promoter_champion_version gauge",
        *[
            f'vlmflow_promoter_champion_version{{model="{m}"}} {o.version}'
            for m, o in sorted(state.last.items())
            if o.version
        ],
    ]
    return "\n".join(lines) + "\n"
