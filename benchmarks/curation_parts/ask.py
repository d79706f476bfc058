"""Requests per second and CPU of a text model's client: ours (with journal and deduplication), the whole fuse step around
it (shards, prompts, checks of the answers, layer, summary), plain aiohttp, openai's SDK.

The server is a process of its own on loopback that answers every request after a fixed latency, as a model server with
many slots does. Every client is a process of its own too, asks the same prompts and must return the same answers; then
its wall time, CPU and peak memory count. The SDK is no dependency: `--openai PYTHON` names an interpreter that has it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONCURRENCY = (64, 256)
ROUNDS = ("ours", "aiohttp", "fuse", "openai", "openai", "fuse", "aiohttp", "ours")  # A/B/../B/A against drift
REQUESTS = {"quick": 300, "full": 8000}
OPENAI_SHARE = 4  # the SDK asks this part of them: it is that much slower


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--latency", type=float, default=0.1, help="seconds the server takes for an answer")
    parser.add_argument(
        "--openai", type=Path, help="python that has the SDK: python -m venv V && V/bin/pip install openai aiohttp"
    )
    parser.add_argument("--image-kib", type=int, default=0, help="also send a picture of this size with every request")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask with every client; prints a table."""
    requests = REQUESTS["quick" if arguments.quick else "full"]
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", str(arguments.latency)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    url = server.stdout.readline().strip()
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    try:
        for concurrency in CONCURRENCY:
            for client in ROUNDS:
                if client == "openai" and not arguments.openai:
                    continue
                n = requests // OPENAI_SHARE if client == "openai" else requests
                result = _measure(client, url, n, concurrency, arguments)
                found.setdefault((client, concurrency), []).append(result)
    finally:
        server.kill()
        server.wait()
    rows = [_best(client, concurrency, results) for (client, concurrency), results in found.items()]
    _print(rows, arguments)
    return {
        "latency_s": arguments.latency, "requests": requests, "image_kib": arguments.image_kib, "clients": rows,
    }  # fmt: skip


def _measure(client: str, url: str, n: int, concurrency: int, arguments: argparse.Namespace) -> dict[str, Any]:
    python = str(arguments.openai) if client == "openai" else sys.executable
    command = [python, __file__, client, url, str(n), str(concurrency), str(arguments.image_kib)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "BENCH_URL": url,
        "BENCH_KEY": "sk-none",
        "VLMFLOW_QUIET": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{client} at {concurrency} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    expected = hashlib.sha256("\n".join(_answer(_prompt(i)) for i in range(n)).encode()).hexdigest()
    if result.pop("answers") != expected:
        raise SystemExit(f"{client} at {concurrency}: its answers are not those of the server")
    return result


def _best(client: str, concurrency: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    best = min(results, key=lambda result: result["wall"])
    return {
        "client": client, "concurrency": concurrency, "version": best["version"],
        "per_second": round(best["requests"] / best["wall"]),
        "cpu_ms": round(min(r["cpu"] / r["requests"] for r in results) * 1000, 3),
        "rss_mib": round(max(r["rss_mib"] for r in results)),
    }  # fmt: skip


def _print(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    print(f"{'client':<10}{'version':<10}{'open':>6}{'req/s':>8}{'CPU ms/req':>12}{'peak MiB':>10}")
    for row in rows:
        print(
            f"{row['client']:<10}{row['version']:<10}{row['concurrency']:>6}{row['per_second']:>8}{row['cpu_ms']:>12.3f}"
            f"{row['rss_mib']:>10}"
        )
    if not arguments.openai:
        print("openai: not measured; give --openai V/bin/python of a venv V with: pip install openai aiohttp")


# --- what is asked and answered -----------------------------------------------------------------------------------------


def _prompt(number: int) -> str:
    return f"Two descriptions of picture {number}: a red bicycle, 1954; a bicycle leaning against a wall. Merge them."


def _answer(prompt: str) -> str:
    number = re.search(r"picture (\d+)", prompt)
    return f"A red bicycle of 1954, number {number and number[1]}, leans against a wall."


def _image(number: int, kib: int) -> bytes:
    return b"\x89PNG" + hashlib.shake_128(str(number).encode()).digest(kib * 1024)


def serve(latency: float) -> None:
    """An OpenAI-compatible server that answers after `latency` seconds; prints its address."""
    import asyncio

    from aiohttp import web

    async def reply(request: web.Request) -> web.Response:
        raw = await request.read()
        await asyncio.sleep(latency)
        message = {"role": "assistant", "content": _answer(raw[-2000:].decode())}
        body = {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 40, "completion_tokens": 20, "total_tokens": 60},
        }  # fmt: skip
        return web.json_response(body)

    async def start() -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", reply)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        print(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1", flush=True)  # type: ignore[union-attr]
        await asyncio.Event().wait()

    asyncio.run(start())


# --- clients: each runs in its own process and prints one line of JSON ----------------------------------------------------


def ours(url: str, n: int, concurrency: int, kib: int) -> tuple[list[str], str]:
    """The machinery of caption, fuse, describe, docqa and judge: fingerprints, journal, deduplication, costs."""
    import tempfile
    from types import SimpleNamespace

    from vlmflow.curation.ask import Asker, Script
    from vlmflow.curation.chat_format import ChatRequest, Endpoint

    def script(number: int) -> Script:
        answer = yield ChatRequest(_prompt(number), (_image(number, kib),) if kib else (), max_tokens=80)
        return {"text": answer.text}

    with tempfile.TemporaryDirectory() as folder:
        ctx: Any = SimpleNamespace(root=f"{folder}/store", scratch=f"{folder}/scratch")
        asker = Asker(ctx, "bench/0", {"": Endpoint("BENCH_URL", "BENCH_KEY", "m", concurrency=concurrency)})
        rows = asker.rows("shard", (script(i) for i in range(n)))
        asker.close()
    return [row["text"] for row in rows], "this"


def fuse_step(url: str, n: int, concurrency: int, kib: int) -> tuple[list[str], str]:
    """Layer `fused` of a dataset of n alt texts and captions, in shards of 4000 samples."""
    import tempfile
    from types import SimpleNamespace

    from vlmflow.curation import fuse
    from vlmflow.dataset.layer import add_layer, read_layer
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.sample import Sample
    from vlmflow.dataset.shard import describe_shard, write_shard
    from vlmflow.recipe.curation import CurationSpec
    from vlmflow.step import Context

    asked = {
        "engine": "openai", "model_name": "m", "endpoint_env": "BENCH_URL", "key_env": "BENCH_KEY",
        "concurrency": concurrency, "failure_limit": 0.0,
    }  # fmt: skip
    recipe: Any = SimpleNamespace(seed=0, curation=CurationSpec.model_validate({"fuse": asked}))
    with tempfile.TemporaryDirectory() as folder:
        ctx, shards = Context(recipe, f"{folder}/store", Path(folder, "scratch")), []
        for start in range(0, n, 4000):
            path, keys = Path(folder, f"{start}.tar"), range(start, min(start + 4000, n))
            samples = (Sample(f"k{i:08d}", {"text": f"Red bicycle, 1954, picture {i}", "images": []}) for i in keys)
            shards.append(describe_shard(path, str(path), write_shard(path, samples), "web"))
        caption = "a bicycle leans against a wall"
        manifest = add_layer(
            ctx, Manifest(name="web", shards=shards), "synthetic", params={}, version=1, schema={"text": "str"},
            compute=lambda reader, _: [{"key": key, "text": caption} for key in reader.keys()],
        )  # fmt: skip
        _start()
        rows = read_layer(fuse.run(ctx, manifest), "fused")
        _stop()
    return [row["text"] for row in rows.values()], "this"


def plain(url: str, n: int, concurrency: int, kib: int) -> tuple[list[str], str]:
    """The least that aiohttp needs."""
    import asyncio
    import base64

    import aiohttp

    async def work() -> list[str]:
        numbers, answers = iter(range(n)), [""] * n

        async def worker(session: aiohttp.ClientSession) -> None:
            for number in numbers:
                content = _content(_prompt(number), base64.b64encode(_image(number, kib)).decode() if kib else "")
                body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 80}
                async with session.post(url + "/chat/completions", json=body) as response:
                    answers[number] = (await response.json())["choices"][0]["message"]["content"]

        connector = aiohttp.TCPConnector(limit=concurrency)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(worker(session) for _ in range(concurrency)))
        return answers

    return asyncio.run(work()), aiohttp.__version__


def sdk(url: str, n: int, concurrency: int, kib: int) -> tuple[list[str], str]:
    """openai.AsyncOpenAI, as its documentation shows, its connections not limited below the concurrency."""
    import asyncio
    import base64

    import openai

    async def work() -> list[str]:
        numbers, answers = iter(range(n)), [""] * n

        async def worker(client: Any) -> None:
            for number in numbers:
                content = _content(_prompt(number), base64.b64encode(_image(number, kib)).decode() if kib else "")
                reply = await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": content}], max_tokens=80
                )
                answers[number] = reply.choices[0].message.content

        async with openai.AsyncOpenAI(base_url=url, api_key="sk-none") as client:
            await asyncio.gather(*(worker(client) for _ in range(concurrency)))
        return answers

    return asyncio.run(work()), openai.__version__


def _content(prompt: str, image: str) -> Any:
    if not image:
        return prompt
    url = {"url": f"data:image/png;base64,{image}"}
    return [{"type": "image_url", "image_url": url}, {"type": "text", "text": prompt}]


CLIENTS = {"ours": ours, "fuse": fuse_step, "aiohttp": plain, "openai": sdk}


_marks: list[tuple[float, float]] = []  # (wall, CPU) where the measured part begins and ends


def _start() -> None:
    _marks[:] = [(time.perf_counter(), time.process_time())]


def _stop() -> None:
    _marks.append((time.perf_counter(), time.process_time()))


def main(client: str, url: str, n: int, concurrency: int, kib: int) -> None:
    """Warm up with one window, then measure; a client that prepares something marks itself where it begins and ends."""
    CLIENTS[client](url, concurrency, concurrency, kib)
    _start()
    answers, version = CLIENTS[client](url, n, concurrency, kib)
    _stop()
    (begun, spent), (ended, total) = _marks[:2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = hashlib.sha256("\n".join(answers).encode()).hexdigest()
    result = {"requests": n, "wall": ended - begun, "cpu": total - spent, "rss_mib": peak, "version": version}
    print(json.dumps({**result, "answers": told}))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(float(sys.argv[2]))
    else:
        main(sys.argv[1], sys.argv[2], *(int(number) for number in sys.argv[3:6]))
