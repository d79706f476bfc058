"""Many chat completions from any OpenAI-compatible server: plain aiohttp, bounded, patient, never silent.

Plain aiohttp serves 2,100 requests/s where the vendor's SDK serves 300-385 at concurrency 256 (spec
data-eval-soup.md 4.4). Address and key come from the environment only; the recipe holds the variables' names, and
neither value appears in a message, parameter or layer.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vlmflow.errors import RecipeError, ServiceError


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. Times in seconds."""

    url_env: str  # name of the variable with the base URL, up to and with /v1
    key_env: str  # name of the variable with the key; unset = no key is sent
    model: str
    concurrency: int = 64
    attempts: int = (
        6  # per request, over connection errors, timeouts, 5xx and malformed answers; twice that for 429/503
    )
    timeout: float = 120.0
    backoff: float = 0.5  # first pause, doubled each time
    max_backoff: float = 30.0
    seed: int = 0
    passing_limit: float = 1.0  # largest share of requests that may be lost to causes that pass (timeouts, 5xx)


@dataclass(frozen=True)
class ChatRequest:
    """One user turn: instruction and encoded pictures (JPEG, PNG, WebP)."""

    prompt: str
    images: tuple[bytes, ...] = ()
    max_tokens: int = 80
    seed: int | None = None  # default: the endpoint's


@dataclass(frozen=True)
class ChatAnswer:
    """The model's text, or why there is none for this request alone."""

    text: str = ""
    finish: str = ""  # stop | length | content_filter | ... as the server says
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    passing: bool = False  # the error may be gone when the same request is sent later


class _Again(Exception):
    """This attempt failed; another may succeed."""

    def __init__(self, reason: str, kind: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.wait = reason, kind, wait


@dataclass
class _State:
    succeeded: int = 0
    resume_at: float = 0.0  # loop time before which nobody asks: one 429 slows all
    answers: dict[int, ChatAnswer] = field(default_factory=dict)


def complete(endpoint: Endpoint, requests: Iterable[ChatRequest]) -> list[ChatAnswer]:
    """Answers in the order of `requests`, which is consumed lazily, `concurrency` at a time.

    Raises:
        RecipeError: the address variable is unset or holds no http(s) URL.
        ServiceError: the server is dead, refuses the key, does not know the model, keeps limiting the rate, or gives
            nothing but errors, or loses more than `passing_limit` of the requests to trouble that passes (written down, these
            failures would stay when the server is well again). What concerns one request only comes back in its `error`.
    """
    base, key = _address(endpoint), os.environ.get(endpoint.key_env) or None
    answers = asyncio.run(_complete_all(endpoint, base, key, iter(requests)))
    lost = Counter(str(answer.error) for answer in answers if answer.passing)
    if lost.total() > endpoint.passing_limit * len(answers):
        raise ServiceError(
            f"the server that {endpoint.url_env} names left {lost.total()} of {len(answers)} requests without an answer after "
            f"{endpoint.attempts} attempts each ({'; '.join(f'{n} x {reason}' for reason, n in lost.most_common(3))}); the recipe allows "
            f"{endpoint.passing_limit:.1%} (failure_limit). Shards that are finished stay, this one is not kept: mend the server "
            "and run the same command again."
        )
    return answers


def _address(endpoint: Endpoint) -> str:
    base = os.environ.get(endpoint.url_env, "").strip().rstrip("/")
    if not base:
        raise RecipeError(
            f"environment variable {endpoint.url_env} is not set: it must hold the base URL of an OpenAI-compatible server, "
            "e.g. http://127.0.0.1:8000/v1. The recipe names the variable; the address never stands in the recipe."
        )
    if not base.startswith(("http://", "https://")):
        raise RecipeError(f"environment variable {endpoint.url_env} does not hold an http:// or https:// URL")
    return base if base.endswith("/chat/completions") else base + "/chat/completions"


async def _complete_all(
    endpoint: Endpoint, url: str, key: str | None, source: Iterator[ChatRequest]
) -> list[ChatAnswer]:
    import aiohttp

    state, numbered = _State(), enumerate(source)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=endpoint.concurrency)
    timeout = aiohttp.ClientTimeout(total=endpoint.timeout)

    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:

        async def worker() -> None:
            for number, request in numbered:  # one iterator for all workers: each takes the next
                state.answers[number] = await _ask(session, endpoint, url, key, request, state)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(endpoint.concurrency):
                    group.create_task(worker())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
    return [state.answers[i] for i in range(len(state.answers))]


def _body(endpoint: Endpoint, request: ChatRequest) -> bytes:
    content: Any = request.prompt
    if request.images:
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in request.images]
        content.append({"type": "text", "text": request.prompt})
    return json.dumps(
        {
            "model": endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "seed": endpoint.seed if request.seed is None else request.seed,
        }
    ).encode()


def data_url(image: bytes) -> str:
    """The picture as a data: URL; its type is read from its first bytes."""
    kind = "png" if image[:4] == b"\x89PNG" else "webp" if image[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


async def _ask(
    session: Any, endpoint: Endpoint, url: str, key: str | None, request: ChatRequest, state: _State
) -> ChatAnswer:
    """One request with its retries; raises ServiceError for what no other request would survive either."""
    body = _body(endpoint, request)
    headers = {"Content-Type": "application/json", "Idempotency-Key": hashlib.sha256(body).hexdigest()}
    loop, tries = asyncio.get_running_loop(), {"limited": 0, "other": 0}
    while True:
        while (pause := state.resume_at - loop.time()) > 0:
            await asyncio.sleep(pause)
        try:
            answer = await _attempt(session, endpoint, url, key, headers, body)
            state.succeeded += 1
            return answer
        except _Again as failed:
            group = "limited" if failed.kind == "limited" else "other"
            tries[group] += 1
            if tries[group] >= endpoint.attempts * (2 if group == "limited" else 1):
                return _given_up(endpoint, failed, tries[group], state)
            wait = min(endpoint.backoff * 2 ** (tries[group] - 1), endpoint.max_backoff)
            if failed.wait is not None:
                wait = min(max(failed.wait, wait), endpoint.max_backoff)
            if group == "limited":
                state.resume_at = max(state.resume_at, loop.time() + wait)
            else:
                await asyncio.sleep(wait)


def _given_up(endpoint: Endpoint, failed: _Again, tries: int, state: _State) -> ChatAnswer:
    where = f"the server that {endpoint.url_env} names"
    rest = "Shards that are finished stay; mend it and run the same command again."
    if failed.kind == "connection":
        raise ServiceError(
            f"{where} does not answer: {failed.reason}, {tries} attempts, {state.succeeded} requests answered before. "
            f"Check that it runs and that {endpoint.url_env} is right. {rest}"
        ) from None
    if failed.kind == "limited":
        raise ServiceError(
            f"{where} keeps refusing for load: {failed.reason}, {tries} attempts at concurrency {endpoint.concurrency}. "
            f"Lower the step's concurrency in the recipe or ask later. {rest}"
        ) from None
    if not state.succeeded:
        raise ServiceError(
            f"{where} has not answered one request: {failed.reason}, {tries} attempts. Check that {endpoint.url_env} ends "
            f"in /v1 and that the server speaks the OpenAI chat-completions format. {rest}"
        ) from None
    return ChatAnswer(error=failed.reason, passing=True)


async def _attempt(
    session: Any, endpoint: Endpoint, url: str, key: str | None, headers: dict, body: bytes
) -> ChatAnswer:
    import aiohttp

    try:
        async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            status, raw, after = response.status, await response.read(), response.headers.get("Retry-After")
    except TimeoutError:
        raise _Again(f"no answer within {endpoint.timeout:g} s", "timeout") from None
    except aiohttp.ClientConnectionError as error:
        number = getattr(error, "errno", None) or 0  # the error's own text would tell the address
        raise _Again(os.strerror(number) if number > 0 else type(error).__name__, "connection") from None
    except aiohttp.ClientError as error:
        raise _Again(type(error).__name__, "connection") from None
    if status == 200:
        return _parse(raw)
    said = _message(raw, key)
    if status in (429, 503):
        raise _Again(f"HTTP {status}", "limited", _seconds(after))
    if status >= 500 or status == 408:
        raise _Again(f"HTTP {status}", "server")
    if status in (401, 403):
        raise ServiceError(
            f"the server that {endpoint.url_env} names refuses the key (HTTP {status}). {endpoint.key_env} "
            f"{'is set' if key else 'is not set'}; put a key with access to model '{endpoint.model}' there."
        )
    if status == 404 or (status in (400, 422) and "model" in said.lower() and endpoint.model.lower() in said.lower()):
        raise ServiceError(
            f"the server that {endpoint.url_env} names does not serve model '{endpoint.model}' at its chat-completions "
            f"address (HTTP {status}: {said or 'no message'}). Check model_name in the recipe and that the URL ends in /v1."
        )
    if status < 400:
        raise ServiceError(f"the server that {endpoint.url_env} names redirects (HTTP {status}); set its final address")
    return ChatAnswer(error=f"HTTP {status}: {said}" if said else f"HTTP {status}")


def _parse(raw: bytes) -> ChatAnswer:
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
            text=text.strip(),
            finish=finish,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Again("malformed answer (not a chat completion in JSON)", "malformed") from None


def _message(raw: bytes, key: str | None) -> str:
    """The server's own words, shortened, without the key."""
    try:
        data = json.loads(raw)
        error = data.get("error", data) if isinstance(data, dict) else data
        text = error.get("message", "") if isinstance(error, dict) else str(error)
    except ValueError:
        text = raw[:200].decode("utf-8", "replace")
    text = " ".join(str(text).split())[:200]
    return text.replace(key, "***") if key else text


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:
        return None
