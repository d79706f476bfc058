"""Chat completions in OpenAI's format: what is sent, and what is made of what comes back. No network here."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


class Malformed(ValueError):
    """What came back is no chat completion."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. Times in seconds."""

    url_env: str  # name of the variable with the base URL, up to and with /v1
    key_env: str  # name of the variable with the key; unset = no key is sent
    model: str
    concurrency: int = 64
    attempts: int = 6  # per request, over timeouts, 5xx, malformed answers; twice that for 429/503 in a row
    timeout: float = 120.0
    backoff: float = 0.5  # first pause, doubled each time
    max_backoff: float = 30.0
    seed: int = 0
    lost_limit: float = 1.0  # largest share of requests that may be lost to causes that pass (timeouts, 5xx)


@dataclass(frozen=True)
class ChatRequest:
    """One user turn: instruction and encoded pictures (JPEG, PNG, WebP, sent as they are)."""

    prompt: str
    images: tuple[bytes, ...] = ()
    max_tokens: int = 80
    seed: int | None = None  # default: the endpoint's
    to: str = ""  # which of a step's servers


@dataclass(frozen=True)
class ChatAnswer:
    """The model's text, or why there is none for this request alone."""

    text: str = ""
    finish: str = ""  # stop | length | content_filter | ... as the server says
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    passing: bool = False  # the error may be gone when the same request is sent later


@lru_cache(maxsize=256)
def _settings(model: str, max_tokens: int, seed: int) -> bytes:
    return json.dumps({"model": model, "max_tokens": max_tokens, "temperature": 0, "seed": seed}).encode()


def _settings_of(endpoint: Endpoint, request: ChatRequest) -> bytes:
    return _settings(endpoint.model, request.max_tokens, endpoint.seed if request.seed is None else request.seed)


def fingerprint(endpoint: Endpoint, request: ChatRequest) -> str:
    """What makes two requests the same: model, settings, words and pictures; not the address. 64 hex digits.

    Identical requests are asked once, answers are journalled under it, and it is sent as Idempotency-Key.
    """
    name = hashlib.sha256(_settings_of(endpoint, request) + json.dumps(request.prompt).encode())
    for image in request.images:
        name.update(hashlib.sha256(image).digest())
    return name.hexdigest()


def body_of(endpoint: Endpoint, request: ChatRequest) -> bytes:
    """The request as JSON. Pictures are put in as base64 without a second pass of escaping: it holds no such characters."""
    words = json.dumps(request.prompt).encode()
    if request.images:
        parts = [b'{"type": "image_url", "image_url": {"url": "%b"}}' % data_url(image) for image in request.images]
        words = b"[%b]" % b", ".join([*parts, b'{"type": "text", "text": %b}' % words])
    messages = b', "messages": [{"role": "user", "content": %b}]}' % words
    return _settings_of(endpoint, request)[:-1] + messages


def data_url(image: bytes) -> bytes:
    """The picture as a data: URL; its type is read from its first bytes."""
    kind = b"png" if image[:4] == b"\x89PNG" else b"webp" if image[8:12] == b"WEBP" else b"jpeg"
    return b"data:image/%b;base64,%b" % (kind, base64.b64encode(image))


def answer_in(raw: bytes, secrets: list[str]) -> ChatAnswer:
    """The answer in a response's body; `secrets` are masked. Raises Malformed."""
    try:
        data = json.loads(raw)
        choice = data["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("refusal") or ""
        usage = data.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError
        finish = "content_filter" if message.get("refusal") else str(choice.get("finish_reason") or "")
        return ChatAnswer(
            text=_said(_masked(text, secrets)),
            finish=_storable(finish)[:40],
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
        raise Malformed("malformed answer (not a chat completion in JSON)") from None


def _said(text: str) -> str:
    """The answer without the reasoning that some models put in front of it; one that never ends leaves nothing."""
    text = _storable(text).strip()
    if "</think>" in text:
        text = text.rpartition("</think>")[2].strip()
    return "" if text.startswith("<think>") else text


def _storable(text: str) -> str:
    """Half a surrogate pair, which JSON can spell, has no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _count(value: Any) -> int:
    return min(max(0, int(value or 0)), 2**40)


def message_in(raw: bytes, secrets: list[str]) -> str:
    """The server's own words, shortened, without key and password."""
    try:
        data = json.loads(raw)
        error = data.get("error", data) if isinstance(data, dict) else data
        text = error.get("message", "") if isinstance(error, dict) else str(error)
    except (ValueError, RecursionError):
        text = raw[:2000].decode("utf-8", "replace")
    return " ".join(_masked(_storable(str(text)), secrets).split())[:200]


def _masked(text: str, secrets: list[str]) -> str:
    """A server may say again what it was sent."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
