"""A small dataset, a fake VLM and a real OpenAI-compatible server for the tests of caption, fuse, perplexity and keep."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from contextlib import contextmanager
from types import SimpleNamespace

from aiohttp import web
from PIL import Image

from vlmflow.dataset.layer import seal_columns
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.part import from_rows
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import ShardReader, describe_shard, write_shard
from vlmflow.models.store import ModelLineage, ModelRef
from vlmflow.recipe.curation import CurationSpec
from vlmflow.step import Context

MODEL = ModelRef(
    name="fake", uri="file:///nowhere", files=[], weights_sha256="f" * 64, lineage=ModelLineage(step="test")
)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key: str, text: str | None, image: bytes | None) -> Sample:
    images = () if image is None else (image,)
    about = [{"sha256": "", "width": 8, "height": 6, "format": "png"}] * len(images)
    return Sample(key, {"text": text, "images": about}, images)


def dataset(folder, samples: list[Sample], per_shard: int = 4, sources=("web",)) -> Manifest:
    shards = []
    for number, start in enumerate(range(0, len(samples), per_shard)):
        path = folder / f"shard-{number:04d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        count = write_shard(path, samples[start : start + per_shard])
        shards.append(describe_shard(path, str(path), count, sources[number % len(sources)]))
    return Manifest(name="web", shards=shards)


def context(folder, seed: int = 17, **curation) -> Context:
    recipe = SimpleNamespace(seed=seed, curation=CurationSpec.model_validate(curation))
    return Context(recipe, str(folder / "root"), folder / "scratch")


def seal_layer(
    ctx, manifest: Manifest, name: str, *, rows: dict[str, dict], schema: dict[str, str], **given
) -> Manifest:
    """Seal a layer whose rows a test dictates, by sample key; a sample that has none is refused as in a step."""

    def tables():
        for shard in manifest.shards:
            mine = [rows[key] for key in ShardReader(shard, ctx.scratch).keys() if key in rows]
            yield from_rows(mine, schema, shard.uri)

    return seal_columns(ctx, manifest, name, schema=schema, parts=tables(), **given)


class FakeVLM:
    """Describes a picture by its red value; scores a text by a hash of picture, prompt and words."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def generate(self, requests, max_new_tokens, batch):
        self.calls.append(("generate", len(requests), max_new_tokens, batch))
        texts = [f" a red {r.images[0].getpixel((0, 0))[0]}\n square" for r in requests]
        return [SimpleNamespace(text="" if "255" in text else text, finish="stop") for text in texts]

    def score(self, requests, batch_tokens):
        self.calls.append(("score", len(requests), batch_tokens))
        return [
            SimpleNamespace(nll=fake_nll(r.images[0], r.prompt, r.target), tokens=len(r.target.split()) + 1, error=None)
            for r in requests
        ]

    def prepare(self, request, name=""):
        return request


def fake_nll(image, prompt: str, target: str) -> float:
    red = image.getpixel((0, 0))[0]
    words = [hashlib.sha256(f"{red}{prompt}{w}".encode()).digest()[0] / 40 for w in [*target.split(), "<end>"]]
    return float("nan") if "nan" in target else sum(words)


class Server:
    """An OpenAI-compatible server whose answers a function decides: (body, number of the call) -> dict | Response."""

    def __init__(self, reply) -> None:
        self.reply, self.bodies, self.headers, self.open, self.most = reply, [], [], 0, 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            body = await request.json()
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            await asyncio.sleep(0)
            answer = self.reply(body, len(self.bodies))
            return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)
        finally:
            self.open -= 1


def chat(text: str | None, finish: str = "stop", **message) -> dict:
    return {
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": 5},
    }


@contextmanager
def serving(reply):
    """Run a Server on a free loopback port in a thread; yields (server, base URL)."""
    server, ready, box = Server(reply), threading.Event(), {}

    def work() -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)

        async def start() -> None:
            app = web.Application(client_max_size=2**24)
            app.router.add_post("/v1/chat/completions", server.handle)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            box.update(loop=loop, runner=runner, port=site._server.sockets[0].getsockname()[1])
            ready.set()

        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(box["runner"].cleanup())
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server, f"http://127.0.0.1:{box['port']}/v1"
    finally:
        box["loop"].call_soon_threadsafe(box["loop"].stop)
        thread.join(10)


def impatient(monkeypatch, **settings) -> None:
    """Endpoints of recipes give up soon and pause for a millisecond."""
    from vlmflow.curation import asked_layer
    from vlmflow.curation.chat_format import Endpoint

    monkeypatch.setattr(asked_layer, "Endpoint", lambda **given: Endpoint(**given | {"backoff": 0.001} | settings))
