"""The machinery of endpoint steps: each request once, kills cost nothing that was answered, costs counted, memory bounded."""

import asyncio
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections import Counter

import pytest
from aiohttp import web
from curation_world import Server, chat, context, dataset, impatient, png, sample, serving

from vlmflow import storage
from vlmflow.curation import ask, asked_layer, caption
from vlmflow.curation.ask import Asker
from vlmflow.curation.chat_format import ChatRequest, Endpoint
from vlmflow.errors import DataError, ServiceError

CAPTION = {"engine": "openai", "model_name": "m", "endpoint_env": "ASK_URL", "key_env": "ASK_KEY", "concurrency": 2}
KEY = "sk-very-secret"


def words(body):
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def one(prompt, **more):
    def script():
        answer = yield ChatRequest(prompt, **more)
        return {"text": answer.text, "error": answer.error}

    return script()


def asker(tmp_path, monkeypatch, url, name="step/0", **settings):
    monkeypatch.setenv("ASK_URL", url)
    settings = {"concurrency": 4, "backoff": 0.001, "attempts": 3} | settings
    return Asker(context(tmp_path), name, {"": Endpoint("ASK_URL", "ASK_KEY", "m", **settings)})


def test_identical_requests_are_asked_once_and_counted_at_the_first(tmp_path, monkeypatch):
    prompts = ["a", "b", "a", "c", "b", "a"]
    with serving(lambda body, n: chat(words(body).upper())) as (server, url):
        step = asker(tmp_path, monkeypatch, url)
        rows = step.rows("s0", (one(p) for p in prompts))
        other = step.rows("s1", (one(p) for p in ["c", "d"]))
        step.close()
    assert [r["text"] for r in rows] == [p.upper() for p in prompts]
    assert [r["requests"] for r in rows] == [1, 1, 0, 1, 0, 0]
    assert [r["prompt_tokens"] for r in rows] == [11, 11, 0, 11, 0, 0]
    assert Counter(words(b) for b in server.bodies) == {"a": 1, "b": 1, "c": 1, "d": 1}  # also over shards
    assert [r["requests"] for r in other] == [1, 1]  # a row's cost does not depend on what other shards asked


def test_other_words_pictures_models_or_seeds_are_other_requests(tmp_path, monkeypatch):
    different = [
        {"prompt": "a"},
        {"prompt": "b"},
        {"prompt": "a", "images": (png(1),)},
        {"prompt": "a", "images": (png(2),)},
        {"prompt": "a", "images": (png(1), png(2))},
        {"prompt": "a", "images": (png(2), png(1))},
        {"prompt": "a", "seed": 5},
        {"prompt": "a", "max_tokens": 5},
    ]
    with serving(lambda body, n: chat("x")) as (server, url):
        step = asker(tmp_path, monkeypatch, url)
        step.rows("s0", (one(**d) for d in different))
        step.close()
    assert len(server.bodies) == len({h["Idempotency-Key"] for h in server.headers}) == len(different)


def test_one_script_asks_on_with_what_it_was_told_and_may_ask_another_server(tmp_path, monkeypatch):
    def script():
        first = yield ChatRequest("begin")
        second = yield ChatRequest(f"more than {first.text}", to="repair")
        return {"text": f"{first.text} {second.text}"}

    with serving(lambda body, n: chat("one")) as (_, url), serving(lambda body, n: chat(words(body))) as (_, other):
        monkeypatch.setenv("ASK_URL", url)
        monkeypatch.setenv("OTHER_URL", other)
        servers = {"": Endpoint("ASK_URL", "K", "m"), "repair": Endpoint("OTHER_URL", "K", "m", concurrency=1)}
        step = Asker(context(tmp_path), "step/0", servers)
        (row,) = step.rows("s0", iter([script()]))
        step.close()
    assert row == {
        "text": "one more than one", "requests": 1, "prompt_tokens": 11, "completion_tokens": 5,
        "repair_requests": 1, "repair_prompt_tokens": 11, "repair_completion_tokens": 5,
    }  # fmt: skip


def test_what_passes_is_asked_again_next_time_and_what_stays_is_not(tmp_path, monkeypatch):
    def reply(body, n):
        if words(body) == "huge":
            return web.json_response({"error": {"message": "too large"}}, status=413)
        return web.Response(status=500) if words(body) == "sick" and well["not"] else chat("fine")

    well = {"not": True}
    with serving(reply) as (server, url):
        for expected in (["fine", "HTTP 500", "HTTP 413: too large"], ["fine", "fine", "HTTP 413: too large"]):
            step = asker(tmp_path, monkeypatch, url, concurrency=1)
            rows = step.rows("s0", (one(p) for p in ["ok", "sick", "huge"]))
            step.close()
            assert [r["error"] or r["text"] for r in rows] == expected
            well["not"] = False
    assert Counter(words(b) for b in server.bodies) == {"ok": 1, "sick": 3 + 1, "huge": 1}


def test_too_many_lost_requests_stop_the_step_and_keep_the_answers(tmp_path, monkeypatch):
    sick = lambda body, n: web.Response(status=502) if words(body) > "p1" else chat("fine")  # noqa: E731
    with serving(sick) as (_, url):
        step = asker(tmp_path, monkeypatch, url, lost_limit=0.5, concurrency=1)
        with pytest.raises(ServiceError, match=r"left 3 of 5 requests.*3 x HTTP 502.*allows 50.0%"):
            step.rows("s0", (one(f"p{i}") for i in range(5)))
        step.close()
    with serving(lambda body, n: chat("fine")) as (server, url):
        step = asker(tmp_path, monkeypatch, url, lost_limit=0.5, concurrency=1)
        assert all(row["text"] == "fine" for row in step.rows("s0", (one(f"p{i}") for i in range(5))))
        step.close()
    assert [words(b) for b in server.bodies] == ["p2", "p3", "p4"]


def test_a_sample_that_cannot_be_read_stops_the_step_with_its_own_error(tmp_path, monkeypatch):
    def scripts():
        yield one("a")
        raise DataError("sample x: its bytes changed")

    with serving(lambda body, n: chat("fine")) as (_, url):
        for pictures in (False, True):
            step = asker(tmp_path, monkeypatch, url)
            with pytest.raises(DataError, match="its bytes changed"):
                step.rows("s0", scripts(), pictures)
            step.close()


def test_no_more_pictures_are_in_memory_than_requests_are_open(tmp_path, monkeypatch):
    alive, most, lock = weakref.WeakSet(), [0], threading.Lock()

    class Holder:
        pass

    def script(number):
        holder = Holder()
        with lock:
            alive.add(holder)
            most[0] = max(most[0], len(alive))

        def work():
            answer = yield ChatRequest(f"p{number}", (png(number),))
            return {"text": answer.text, "of": id(holder)}

        return work()

    with serving(lambda body, n: chat("fine")) as (_, url):
        step = asker(tmp_path, monkeypatch, url, concurrency=3)
        assert len(step.rows("s0", (script(i) for i in range(60)), pictures=True)) == 60
        step.close()
    gc.collect()
    assert 1 <= most[0] <= 5  # three asked, one being made, one just done; of 60


def test_a_limited_server_is_slowed_down_for_and_everything_is_answered(tmp_path, monkeypatch):
    """A server with three slots and 32 workers: with pauses of a millisecond, a storm would use up every request's tries."""
    refused = []

    async def handle(self, request):
        if self.open >= 3:
            refused.append(1)
            return web.Response(status=429, headers={"Retry-After": "0"})
        self.open += 1
        try:
            await asyncio.sleep(0.002)
            return web.json_response(chat("fine"))
        finally:
            self.open -= 1

    monkeypatch.setattr(Server, "handle", handle)
    with serving(None) as (_, url):
        step = asker(tmp_path, monkeypatch, url, concurrency=32)
        rows = step.rows("s0", (one(f"p{i}") for i in range(300)))
        step.close()
    assert all(r["text"] == "fine" for r in rows)
    assert 0 < len(refused) < 600  # without a pace 32 open requests at three slots made 1287 and more


# --- whole steps --------------------------------------------------------------------------------------------------------


def captioned(n=24):
    return [sample(f"k{i:02d}", f"alt {i}", png(10 + i)) for i in range(n)]


def test_summary_has_tokens_and_cost(tmp_path, monkeypatch):
    with serving(lambda body, n: chat("a red square")) as (_, url):
        monkeypatch.setenv("ASK_URL", url)
        spec = CAPTION | {"price_in": 1000.0, "price_out": 2000.0}
        sealed = caption.run(context(tmp_path, caption=spec), dataset(tmp_path / "d", captioned()))
    summary = sealed.layers["synthetic"].summary
    assert (summary["requests"], summary["prompt_tokens"], summary["completion_tokens"]) == (24, 264, 120)
    assert summary["cost"] == round((264 * 1000 + 120 * 2000) / 1e6, 6)
    assert not storage.list_uris(str(tmp_path / "root" / "journal")) and not list(
        (tmp_path / "scratch").rglob("*.jsonl")
    )


def test_groups_of_shards_give_the_layer_of_the_whole(tmp_path, monkeypatch):
    data = dataset(
        tmp_path / "d", [sample(f"k{i:02d}", None, png(i % 5)) for i in range(24)]
    )  # five pictures, many times
    with serving(lambda body, n: chat("a red square")) as (server, url):
        monkeypatch.setenv("ASK_URL", url)
        whole = caption.run(context(tmp_path, caption=CAPTION), data)
        assert len(server.bodies) == 5
        shutil.rmtree(tmp_path / "root")
        for number, group in enumerate((data.shards[3:], data.shards[:1], data.shards[1:3])):
            pod = context(tmp_path, caption=CAPTION)
            pod.scratch, pod.parts_only = tmp_path / f"pod-{number}", True
            caption.run(pod, data.model_copy(update={"shards": group}))
        assert 5 < len(server.bodies) <= 5 + 15
        monkeypatch.delenv("ASK_URL")
        assert caption.run(context(tmp_path, caption=CAPTION), data).digest == whole.digest
    assert whole.layers["synthetic"].summary["requests"] == 24  # counted by shard, whatever others asked


def test_a_journal_left_between_part_and_deletion_is_removed_by_the_next_run(tmp_path, monkeypatch):
    data = dataset(tmp_path / "d", captioned(4))
    with serving(lambda body, n: chat("a red square")) as (server, url):
        monkeypatch.setenv("ASK_URL", url)
        monkeypatch.setattr(asked_layer, "sweep", lambda *a: 0)
        monkeypatch.setattr(ask.Journal, "close", lambda self, done=True: None)
        first = caption.run(context(tmp_path, caption=CAPTION), data)
        assert list((tmp_path / "scratch").rglob("*.jsonl"))
        monkeypatch.undo()
        monkeypatch.delenv("ASK_URL", raising=False)
        assert caption.run(context(tmp_path, caption=CAPTION), data).digest == first.digest
    assert len(server.bodies) == 4 and not list((tmp_path / "scratch").rglob("*.jsonl"))


def test_neither_key_nor_password_nor_address_is_written_anywhere(tmp_path, monkeypatch, capfd):
    def telltale(body, n):
        secret = "hunter2" if len(seen) else KEY
        if n == 1:
            return web.json_response({"error": {"message": f"who is {secret}?"}}, status=413)
        return chat(f"a red square by {secret}") if n < 6 else web.Response(status=500, text=secret)

    impatient(monkeypatch)
    seen = []
    for secret in ({"ASK_KEY": KEY}, {}):
        with serving(telltale) as (server, url):
            port = url.split(":")[-1]
            monkeypatch.delenv("ASK_KEY", raising=False)
            for name, value in secret.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("ASK_URL", url if secret else url.replace("http://", "http://me:hunter2@"))
            ctx = context(tmp_path / str(len(seen)), caption=CAPTION | {"failure_limit": 0.5})
            with pytest.raises(ServiceError) as error:
                caption.run(ctx, dataset(tmp_path / "d", captioned(8), per_shard=8))
            seen.append(server.headers[0]["Authorization"].split()[0])
            written = [p for p in (tmp_path / str(len(seen) - 1)).rglob("*") if p.is_file()]
            assert written  # the journal
            for text in [str(error.value).encode(), *(p.read_bytes() for p in written)]:
                assert (KEY if secret else "hunter2").encode() not in text and port.encode() + b"/v1" not in text
    assert seen == ["Bearer", "Basic"]
    told = capfd.readouterr()
    assert KEY not in told.out + told.err and "hunter2" not in told.out + told.err


WORK = """
    import sys
    from pathlib import Path
    from curation_world import context
    from vlmflow.curation import caption, fuse
    from vlmflow.dataset.manifest import load
    folder, data = Path(sys.argv[1]), load(sys.argv[2])
    spec = {"engine": "openai", "model_name": "m", "endpoint_env": "ASK_URL", "key_env": "ASK_KEY", "concurrency": 2}
    ctx = context(folder, caption=spec, fuse=spec | {"failure_limit": 1.0})
    print(fuse.run(ctx, caption.run(ctx, data)).digest, flush=True)
"""


def test_sigkill_at_any_instant_pays_for_nothing_twice_but_what_was_in_flight(tmp_path, monkeypatch):
    from vlmflow.dataset.manifest import save

    data = dataset(tmp_path / "d", captioned(), per_shard=8)
    stored = save(data, str(tmp_path / "manifests"))
    rng = random.Random(5)
    stops = [rng.randint(3, 11) for _ in range(4)]
    arrived = threading.Event()
    left = [10**9]

    def reply(body, n):
        left[0] -= 1
        if left[0] <= 0:  # whatever comes until the kill stays open
            arrived.set()
            return web.Response(status=503, headers={"Retry-After": "60"})
        if "alt " in words(body):  # fuse: wrong the first time, so that every sample is asked twice
            number = words(body).split("alt ")[1].split("\n")[0]
            return chat("no" if "rejected" not in words(body) else f"A red square, alt {number}.")
        return chat("a red square")

    def start(folder, url):
        environment = os.environ | {"ASK_URL": url, "ASK_KEY": KEY, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", textwrap.dedent(WORK), str(folder), stored]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with serving(reply) as (server, url):
        process = start(tmp_path / "run", url)
        digest, told = process.communicate()
        assert process.returncode == 0, told
        asked = Counter(h["Idempotency-Key"] for h in server.headers)
        assert set(asked.values()) == {1}
        server.headers.clear()
        shutil.rmtree(tmp_path / "run")
        for stop in stops:
            left[0] = stop
            arrived.clear()
            process = start(tmp_path / "run", url)
            assert arrived.wait(60)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        left[0] = 10**9
        process = start(tmp_path / "run", url)
        again, told = process.communicate()
        assert process.returncode == 0, told
    assert again == digest
    twice = Counter(h["Idempotency-Key"] for h in server.headers) - asked
    assert twice.total() <= 2 * len(stops)  # two requests were open at each kill
    assert not list((tmp_path / "run").rglob("*.jsonl"))
