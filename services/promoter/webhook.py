"""Is this request really a fresh webhook of our MLflow?

Signed text is `delivery id . timestamp . raw body`, HMAC-SHA256 with the secret's UTF-8 bytes, sent in base64 after
`v1,` (platform.md 4.2, verified byte-exact). A delivery keeps its id and timestamp over its retries, so the id is the
key against replays, and the window need only be longer than the retries take.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WINDOW = 300.0  # seconds a delivery stays acceptable; MLflow's retries span about 10
MOST_BYTES = 1 << 20
REMEMBERED = 10_000
SIGNATURE, TIMESTAMP, DELIVERY = "x-mlflow-signature", "x-mlflow-timestamp", "x-mlflow-delivery-id"


@dataclass(frozen=True)
class Refusal(Exception):
    """Why a request is not accepted; `code` is its HTTP status."""

    code: int
    reason: str


class Verifier:
    """Accepts each delivery once.

    Args:
        secret: shared with MLflow; never empty.
        window: seconds before and after the clock in which a timestamp is accepted.
    """

    def __init__(self, secret: str, window: float = WINDOW) -> None:
        if not secret:
            raise ValueError("a webhook without a secret would accept anybody's requests")
        self.secret, self.window = secret.encode(), window
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def accept(self, headers: Mapping[str, str], body: bytes, now: float) -> dict[str, Any]:
        """The event of a genuine, fresh, new delivery.

        Raises:
            Refusal: 413 too large, 401 forged or unsigned, 408 outside the window, 409 seen before, 400 not JSON.
        """
        if len(body) > MOST_BYTES:
            raise Refusal(413, f"{len(body)} bytes, at most {MOST_BYTES}")
        delivery, stamp, given = (headers.get(name, "") for name in (DELIVERY, TIMESTAMP, SIGNATURE))
        if not (delivery and stamp and given):
            raise Refusal(401, "not signed")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.sign(delivery, stamp, body).encode()):
            raise Refusal(401, "the signature does not fit")
        try:
            age = now - float(stamp)
        except ValueError:
            raise Refusal(401, "the timestamp is not a number") from None
        if not abs(age) <= self.window:
            raise Refusal(408, f"{age:.0f} s old, at most {self.window:.0f}")
        with self._lock:
            if delivery in self._seen:
                raise Refusal(409, "delivered before")
            self._seen[delivery] = None
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        try:
            event = json.loads(body)
        except ValueError:
            raise Refusal(400, "not JSON") from None
        if not isinstance(event, dict):
            raise Refusal(400, "not an event")
        return event

    def sign(self, delivery: str, stamp: str, body: bytes) -> str:
        """Signature header of a delivery."""
        text = f"{delivery}.{stamp}.".encode() + body
        return "v1," + base64.b64encode(hmac.new(self.secret, text, hashlib.sha256).digest()).decode()
