"""The OpenAI-compatible client against a real server on loopback: bounded, patient, never silent, no secret told."""

import asyncio
import base64
import contextlib
import json
import socket
import time
from email.utils import formatdate

import pytest
from aiohttp import web
from curation_world import Server, chat, png, serving

from vlmflow.curation import openai_client
from vlmflow.curation.chat_format import ChatRequest, Endpoint
from vlmflow.curation.openai_client import Client
from vlmflow.errors import RecipeError, ServiceError

KEY = "sk-very-secret"


def ask(monkeypatch, url, prompts=("hello",), **settings):
    monkeypatch.setenv("TEST_URL", url)
    monkeypatch.setenv("TEST_KEY", KEY)
    settings = {"concurrency": 4, "attempts": 3, "backoff": 0.001, "timeout": 10.0} | settings
    endpoint = Endpoint("TEST_URL", "TEST_KEY", "captioner-1", **settings)
    requests = [p if isinstance(p, ChatRequest) else ChatRequest(p) for p in prompts]

    async def work():
        client = Client(endpoint)
        async with client:
            return await asyncio.gather(*(client.ask(request) for request in requests))

    return asyncio.run(work())


def user_text(body):
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def test_answers_keep_the_order_and_concurrency_is_bounded(monkeypatch):
    with serving(lambda body, n: chat("re: " + user_text(body))) as (server, url):
        answers = ask(monkeypatch, url, [f"p{i}" for i in range(40)])
    assert [a.text for a in answers] == [f"re: p{i}" for i in range(40)]
    assert 1 < server.most <= 4
    assert (answers[0].finish, answers[0].prompt_tokens, answers[0].completion_tokens) == ("stop", 11, 5)


def test_request_carries_model_greedy_decoding_key_and_image_as_data_url(monkeypatch):
    with serving(lambda body, n: chat("ok")) as (server, url):
        ask(monkeypatch, url, [ChatRequest("what?", (png(3),), max_tokens=7)])
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("captioner-1", 0, 7)
    image = body["messages"][0]["content"][0]["image_url"]["url"]
    assert image == "data:image/png;base64," + base64.b64encode(png(3)).decode()
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_passing_trouble_is_waited_out(monkeypatch, status):
    trouble = lambda body, n: web.Response(status=status, headers={"Retry-After": "0"}) if n <= 2 else chat("fine")  # noqa: E731
    with serving(trouble) as (server, url):
        answers = ask(monkeypatch, url, concurrency=1)
    assert answers[0].text == "fine" and len(server.bodies) == 3


def test_malformed_answers_are_retried_then_reported_for_their_sample_alone(monkeypatch):
    def reply(body, n):
        if user_text(body) == "bad":
            return web.Response(text="{ not json", content_type="application/json")
        return chat("good")

    with serving(reply) as (server, url):
        answers = ask(monkeypatch, url, ["a", "bad", "b"], concurrency=1)
    assert [a.error for a in answers] == [None, "malformed answer (not a chat completion in JSON)", None]
    assert sum(user_text(b) == "bad" for b in server.bodies) == 3


@pytest.mark.parametrize(
    "answer",
    [
        "<html>hi</html>",
        '{"choices": []}',
        '{"choices": [{"message": null}]}',
        "[1]",
        "null",
        '{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e999}}',
        "[" * 100_000,
    ],
)
def test_a_server_that_never_answers_in_the_format_is_named(monkeypatch, answer):
    with serving(lambda body, n: web.Response(text=answer)) as (_, url):
        with pytest.raises(ServiceError, match=r"has not answered one request: malformed answer.*TEST_URL"):
            ask(monkeypatch, url)


def test_dead_server(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        ServiceError,
        match=r"TEST_URL names does not answer: Connection refused, 3 attempts.*run the same command again",
    ) as e:
        ask(monkeypatch, f"http://127.0.0.1:{port}/v1")
    assert str(port) not in str(e.value)


def test_server_that_dies_half_way(monkeypatch):
    def reply(body, n):
        return chat("ok") if n <= 3 else web.Response(status=500)

    with serving(reply) as (_, url):
        answers = ask(monkeypatch, url, list("abcde"), concurrency=1)
    assert [a.error for a in answers] == [None, None, None, "HTTP 500", "HTTP 500"]


def test_endless_rate_limit_says_what_to_do(monkeypatch):
    with serving(lambda body, n: web.Response(status=429)) as (_, url):
        with pytest.raises(ServiceError, match=r"HTTP 429, 6 attempts at concurrency 4. Lower"):
            ask(monkeypatch, url)


def test_slow_server(monkeypatch):
    async def hang(self, request):
        import asyncio

        await asyncio.sleep(30)

    with serving(lambda body, n: chat("never")) as (server, _url):
        monkeypatch.setattr(type(server), "handle", hang)
        with serving(lambda body, n: chat("never")) as (_, slow):
            with pytest.raises(ServiceError, match=r"no answer within 0.05 s"):
                ask(monkeypatch, slow, timeout=0.05)


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_key_stops_at_once_and_is_not_told(monkeypatch, status):
    refuse = web.json_response({"error": {"message": f"bad key {KEY}"}}, status=status)
    with serving(lambda body, n: refuse) as (server, url):
        with pytest.raises(ServiceError, match=f"refuses the key \\(HTTP {status}\\). TEST_KEY is set") as error:
            ask(monkeypatch, url, concurrency=1)
    assert KEY not in str(error.value) and len(server.bodies) == 1


@pytest.mark.parametrize("status", [400, 404])
def test_wrong_model_name_stops_at_once(monkeypatch, status):
    def reply(body, n):
        return web.json_response(
            {"error": {"message": f"The model `captioner-1` does not exist for {KEY}"}}, status=status
        )

    with serving(reply) as (_, url):
        with pytest.raises(ServiceError, match=r"does not serve model 'captioner-1'.*model_name") as error:
            ask(monkeypatch, url)
    assert KEY not in str(error.value)


def test_a_request_that_only_this_sample_cannot_make_is_an_error_of_its_own(monkeypatch):
    def reply(body, n):
        if user_text(body) == "huge":
            return web.json_response({"error": {"message": "image too large"}}, status=413)
        return chat("fine")

    with serving(reply) as (_, url):
        answers = ask(monkeypatch, url, ["huge", "small"])
    assert [(a.text, a.error) for a in answers] == [("", "HTTP 413: image too large"), ("fine", None)]


def test_an_answer_that_is_cut_off_is_asked_for_again_and_then_this_samples_error(monkeypatch):
    async def handle(self, request):
        body = await request.json()
        self.bodies.append(body)
        text = json.dumps(chat("fine")).encode()
        sick = user_text(body) == "sick" or len(self.bodies) == 1
        response = web.StreamResponse(headers={"Content-Length": str(len(text))})
        await response.prepare(request)
        await response.write(text[: len(text) // 2] if sick else text)
        if sick:
            request.transport.close()
        return response

    monkeypatch.setattr(Server, "handle", handle)
    with serving(None) as (server, url):
        answers = ask(monkeypatch, url, ["first", "sick", "last"], concurrency=1)
    assert [a.error or a.text for a in answers] == ["fine", "the answer was cut off", "fine"]
    assert answers[1].passing and len(server.bodies) == 2 + 3 + 1


def test_an_endless_answer_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(openai_client, "ANSWER_LIMIT", 2**17)
    sent = []

    async def handle(self, request):
        body = await request.json()
        if user_text(body) != "endless":
            return web.json_response(chat("fine"))
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(10_000):
                await response.write(b" " * 2**16)
                sent.append(1)
        return response

    monkeypatch.setattr(Server, "handle", handle)
    with serving(None) as (_, url):
        answers = ask(monkeypatch, url, ["a", "endless"], concurrency=1)
    assert answers[0].text == "fine" and answers[1].error == "an answer over 131072 bytes" and len(sent) < 3 * 1000


@pytest.mark.parametrize("header", ["0.05", "date"])
def test_all_wait_as_long_as_the_server_asks(monkeypatch, header):
    """By the clock of a patched sleep: the pause is one for all, and no request is sent in it."""
    slept, sleep = [], asyncio.sleep

    async def note(seconds, *rest):
        slept.append(seconds)
        await sleep(min(seconds, 0.01), *rest)

    def reply(body, n):
        if n > 1:
            return chat("fine")
        value = formatdate(time.time() + 40, usegmt=True) if header == "date" else header
        return web.Response(status=429, headers={"Retry-After": value})

    with serving(reply) as (_, url):
        monkeypatch.setattr(openai_client.asyncio, "sleep", note)
        clock = asyncio.SelectorEventLoop.time
        monkeypatch.setattr(asyncio.SelectorEventLoop, "time", lambda self: clock(self) + sum(slept))
        answers = ask(monkeypatch, url, [str(i) for i in range(4)], concurrency=1, timeout=1000.0)
    assert [a.text for a in answers] == ["fine"] * 4
    assert (30 < max(slept) <= 40) if header == "date" else max(slept) <= 0.05


def test_a_spent_account_stops_at_once(monkeypatch):
    spent = web.json_response(
        {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}, status=429
    )
    with serving(lambda body, n: spent) as (server, url):
        with pytest.raises(ServiceError, match=r"account is spent.*run the same command again"):
            ask(monkeypatch, url, concurrency=1)
    assert len(server.bodies) == 1


def test_password_and_key_together_are_refused_without_telling_either(monkeypatch):
    with pytest.raises(RecipeError, match="TEST_URL holds a user name or password and TEST_KEY a key") as error:
        ask(monkeypatch, "http://me:hunter2@127.0.0.1:1/v1")
    assert "hunter2" not in str(error.value) and KEY not in str(error.value)


@pytest.mark.parametrize("end", ["", "/", "/chat/completions", "?api-version=1&key=opensesame", "/?key=opensesame"])
def test_the_address_may_be_written_with_or_without_its_end_and_with_a_query(monkeypatch, end):
    async def handle(self, request):
        return web.json_response(chat(f"{request.path_qs}"))

    monkeypatch.setattr(Server, "handle", handle)
    with serving(None) as (_, url):
        (answer,) = ask(monkeypatch, url + end)
    query = end.partition("?")[2].replace("opensesame", "***")
    assert answer.text == "/v1/chat/completions" + (f"?{query}" if query else "")


@pytest.mark.parametrize(("said", "text"), [
    ("<think>a square?</think>\n A square.", "A square."), ("<think>never en", ""), ("half \ud83d pair", "half ? pair"),
    ("A <think> tag.", "A <think> tag."),
])  # fmt: skip
def test_reasoning_is_no_answer_and_every_text_can_be_stored(monkeypatch, said, text):
    with serving(lambda body, n: chat(said)) as (_, url):
        assert ask(monkeypatch, url)[0].text == text


@pytest.mark.parametrize(("tokens", "count"), [(None, 0), ("12", 12), (-5, 0), (1e30, 2**40), (7.0, 7)])
def test_odd_token_counts(monkeypatch, tokens, count):
    with serving(lambda body, n: chat("x") | {"usage": {"prompt_tokens": tokens}}) as (_, url):
        answer = ask(monkeypatch, url)[0]
    assert (answer.prompt_tokens, answer.completion_tokens) == (count, 0)


def test_refusal_field(monkeypatch):
    with serving(lambda body, n: chat(None, refusal="I cannot do that")) as (_, url):
        answer = ask(monkeypatch, url)[0]
    assert (answer.text, answer.finish) == ("I cannot do that", "content_filter")


@pytest.mark.parametrize("value", ["", "localhost:8000", "ftp://x", "http://", "http://[", "http://x:port/v1"])
def test_address_is_checked_before_anything_is_sent(monkeypatch, value):
    with pytest.raises(RecipeError, match="TEST_URL"):
        ask(monkeypatch, value)
