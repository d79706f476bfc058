"""One OpenAI-compatible server, asked many things at a time: plain aiohttp, bounded, patient, never silent.

Plain aiohttp serves 2,100 requests/s where the vendor's SDK serves 300-385 at concurrency 256 (spec
data-eval-soup.md 4.4). Address and key come from the environment only; the recipe holds the variables' names, and
neither value appears in a message, parameter or layer.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from vlmflow.curation.chat_format import (
    ChatAnswer,
    ChatRequest,
    Endpoint,
    Malformed,
    answer_in,
    body_of,
    fingerprint,
    message_in,
)
from vlmflow.errors import RecipeError, ServiceError

ANSWER_LIMIT = 2**24  # bytes of one answer
RETRY_AFTER_LIMIT = 300.0  # seconds: a server that asks for a longer pause is asked again after this


class _Again(Exception):
    """This attempt failed; another may succeed."""

    def __init__(self, reason: str, kind: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.wait = reason, kind, wait


class _Pace:
    """How many requests may be open now: all that the recipe allows, half of it after each refusal for load, one more a
    round of answers (as TCP does), so that a limited server is kept busy and not stormed."""

    def __init__(self, most: int) -> None:
        self.most, self.width, self.open = most, float(most), 0
        self.resume_at = 0.0  # loop time before which nobody asks: one 429 slows all
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self.open >= int(self.width):
                turn = loop.create_future()
                self._waiting.append(turn)
                await turn
            elif (pause := self.resume_at - loop.time()) > 0:
                await asyncio.sleep(pause)
            else:
                self.open += 1
                return

    def leave(self, answered: bool) -> None:
        self.open -= 1
        if answered and self.width < self.most:
            self.width = min(self.most, self.width + 1 / self.width)
        for _ in range(min(len(self._waiting), int(self.width) - self.open)):
            if not (turn := self._waiting.popleft()).done():
                turn.set_result(None)

    def slow_down(self, wait: float) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self.resume_at:  # the first refusal of a burst
            self.width = max(1.0, self.width / 2)
        self.resume_at = max(self.resume_at, now + wait)


class Client:
    """A server for as long as a step lasts: one session, one pace. Use it within one event loop, and close it.

    Raises:
        RecipeError: the address variable is unset or holds no http(s) URL.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.answered = 0
        self._url = _address(endpoint)
        self._key = os.environ.get(endpoint.key_env) or None
        parts = urlsplit(self._url)
        in_url = [parts.password, *(value for _, value in parse_qsl(parts.query) if len(value) > 7)]
        self._secrets = [secret for secret in (self._key, *in_url) if secret]
        self._pace = _Pace(endpoint.concurrency)
        self._session: Any = None

    async def __aenter__(self) -> Client:
        import aiohttp
        import yarl

        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._target = yarl.URL(self._url)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the pace bounds it
            timeout=aiohttp.ClientTimeout(total=self.endpoint.timeout),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, request: ChatRequest, name: str | None = None) -> ChatAnswer:
        """The answer to one request, after retries. `name`: its fingerprint, when it is known.

        Raises:
            ServiceError: what no other request would survive either: the server is dead, refuses the key, does not know
                the model, keeps limiting the rate, or gives nothing but errors. What concerns this request alone comes
                back in the answer's `error`.
        """
        body, endpoint, pace = body_of(self.endpoint, request), self.endpoint, self._pace
        headers = {"Idempotency-Key": name or fingerprint(endpoint, request)}
        tries, answered = {"limited": 0, "other": 0}, self.answered
        while True:
            await pace.enter()
            done = False
            try:
                answer = await self._attempt(headers, body)
                done = True
                self.answered += 1
                return answer
            except _Again as failed:
                group = "limited" if failed.kind == "limited" else "other"
                if group == "limited" and self.answered > answered:
                    tries[group], answered = 0, self.answered  # others get through: the turn of this one will come
                tries[group] += 1
                if tries[group] >= endpoint.attempts * (2 if group == "limited" else 1):
                    return self._given_up(failed, tries[group])
                wait = min(endpoint.backoff * 2 ** (tries[group] - 1), endpoint.max_backoff)
                if failed.wait is not None:
                    wait = max(wait, min(failed.wait, RETRY_AFTER_LIMIT))
                if group == "limited":
                    pace.slow_down(wait)
                    wait = 0.0
            finally:
                pace.leave(done)
            if wait:
                await asyncio.sleep(wait)

    async def _attempt(self, headers: dict[str, str], body: bytes) -> ChatAnswer:
        import aiohttp

        try:
            async with self._session.post(self._target, data=body, headers=headers, allow_redirects=False) as response:
                status, raw, after = response.status, await _read(response), response.headers.get("Retry-After")
        except TimeoutError:
            raise _Again(f"no answer within {self.endpoint.timeout:g} s", "timeout") from None
        except aiohttp.ClientConnectionError as error:
            number = getattr(error, "errno", None) or 0  # the error's own text would tell the address
            raise _Again(os.strerror(number) if number > 0 else type(error).__name__, "connection") from None
        except aiohttp.ClientPayloadError:
            raise _Again("the answer was cut off", "malformed") from None
        except aiohttp.ClientError as error:
            raise _Again(type(error).__name__, "connection") from None
        if status == 200:
            try:
                return answer_in(raw, self._secrets)
            except Malformed as error:
                raise _Again(str(error), "malformed") from None
        return self._refused(status, message_in(raw, self._secrets), after)

    def _refused(self, status: int, said: str, after: str | None) -> ChatAnswer:
        """The error of this request alone; raises _Again for what passes and ServiceError for what concerns all."""
        endpoint, model = self.endpoint, self.endpoint.model
        where = f"the server that {endpoint.url_env} names"
        if status == 429 and "quota" in said.lower():
            raise ServiceError(
                f"{where} says that the account is spent (HTTP 429: {said}). Answers that were paid for are kept: raise the "
                "limit there and run the same command again."
            )
        if status in (429, 503):
            raise _Again(f"HTTP {status}", "limited", _seconds(after))
        if status >= 500 or status == 408:
            raise _Again(f"HTTP {status}", "server", _seconds(after))
        if status in (401, 403):
            raise ServiceError(
                f"{where} refuses the key (HTTP {status}). {endpoint.key_env} {'is set' if self._key else 'is not set'}; put a "
                f"key with access to model '{model}' there."
            )
        if status == 404 or (status in (400, 422) and "model" in said.lower() and model.lower() in said.lower()):
            raise ServiceError(
                f"{where} does not serve model '{model}' at its chat-completions address (HTTP {status}: "
                f"{said or 'no message'}). Check model_name in the recipe and that the URL ends in /v1."
            )
        if status < 400:
            raise ServiceError(f"{where} redirects (HTTP {status}); set its final address")
        return ChatAnswer(error=f"HTTP {status}: {said}" if said else f"HTTP {status}")

    def _given_up(self, failed: _Again, tries: int) -> ChatAnswer:
        where = f"the server that {self.endpoint.url_env} names"
        rest = "Shards that are finished and answers that were given stay; mend it and run the same command again."
        if failed.kind == "connection":
            raise ServiceError(
                f"{where} does not answer: {failed.reason}, {tries} attempts, {self.answered} requests answered before. "
                f"Check that it runs and that {self.endpoint.url_env} is right. {rest}"
            ) from None
        if failed.kind == "limited":
            raise ServiceError(
                f"{where} keeps refusing for load: {failed.reason}, {tries} attempts at concurrency "
                f"{self.endpoint.concurrency}. Lower the step's concurrency in the recipe or ask later. {rest}"
            ) from None
        if not self.answered:
            raise ServiceError(
                f"{where} has not answered one request: {failed.reason}, {tries} attempts. Check that "
                f"{self.endpoint.url_env} ends in /v1 and that the server speaks the OpenAI chat-completions format. {rest}"
            ) from None
        return ChatAnswer(error=failed.reason, passing=True)


def _address(endpoint: Endpoint) -> str:
    base = os.environ.get(endpoint.url_env, "").strip()
    if not base:
        raise RecipeError(
            f"environment variable {endpoint.url_env} is not set: it must hold the base URL of an OpenAI-compatible server, "
            "e.g. http://127.0.0.1:8000/v1. The recipe names the variable; the address never stands in the recipe."
        )
    try:
        parts = urlsplit(base)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not base.startswith(("http://", "https://")) or not host:
        raise RecipeError(f"environment variable {endpoint.url_env} does not hold an http:// or https:// URL")
    if (parts.username or parts.password) and os.environ.get(endpoint.key_env):
        raise RecipeError(
            f"{endpoint.url_env} holds a user name or password and {endpoint.key_env} a key: a request can carry one of them "
            "only; clear the other"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


async def _read(response: Any) -> bytes:
    """The whole body, which may be no larger than ANSWER_LIMIT."""
    size = response.content_length
    if size is not None and size <= ANSWER_LIMIT and "Content-Encoding" not in response.headers:
        return await response.read()
    raw = bytearray()
    async for chunk in response.content.iter_chunked(2**16):
        raw += chunk
        if len(raw) > ANSWER_LIMIT:
            raise _Again(f"an answer over {ANSWER_LIMIT} bytes", "malformed")
    return bytes(raw)


def _seconds(header: str | None) -> float | None:
    """Retry-After: seconds, or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
