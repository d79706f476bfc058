"""What the kill benchmark of the curation works on: pictures, tars, a benchmark table, two servers, and the steps."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]  # the tests' tiny world
sys.path[:0] = PATHS

from vlmflow.dataset.manifest import Manifest  # noqa: E402

PER_SHARD, CONCURRENCY = 6, 8
ASKED = {"engine": "openai", "model_name": "any", "concurrency": CONCURRENCY}
RECIPE: dict[str, Any] = {
    "caption": {**ASKED, "max_new_tokens": 16},
    "describe": {**ASKED, "min_tokens": 3, "repair": False},
    "docqa": {"model_name": "any", "concurrency": CONCURRENCY, "min_chars": 8},
    "judge": {"model_name": "any", "concurrency": CONCURRENCY, "text": "fused", "failure_limit": 1},
    "fuse": {"engine": "rules", "fallback": "alt", "failure_limit": 1},
    "clean": {},
    "dedup": {},
    "contamination": {},
    "perplexity": {"failure_limit": 1},
    "keep": {"fraction": 0.5},
}
PRELOADED = [
    "curation_world",
    "vlmflow.models.inference",
    "pyarrow.compute",
    "pyarrow.parquet",
    "aiohttp",
    "duckdb",
    "pandas",
]
PRELOADED += [f"PIL.{name}" for name in ("JpegImagePlugin", "PngImagePlugin", "BmpImagePlugin", "GifImagePlugin")]


@dataclass(frozen=True)
class Step:
    """A curation step.

    Attributes:
        module: of `vlmflow.curation`; its `run` is called.
        dataset: the step makes it, instead of adding to a manifest.
        takes_model: `run` wants the model too.
        shards: works on the first ones only; None = all.
        chained: the steps after it work on its result.
        layer: asks an endpoint, and its answers lie in the parts of this layer.
    """

    module: str
    dataset: str = ""
    takes_model: bool = False
    shards: int | None = None
    chained: bool = True
    layer: str = ""


STEPS = {
    "pull": Step("pull", dataset="web"),
    "adopt": Step("adopt", dataset="old", chained=False),
    "ocr": Step("ocr", shards=4, chained=False),
    "caption": Step("caption", takes_model=True, layer="synthetic"),
    "describe": Step("describe", takes_model=True, layer="described"),
    "docqa": Step("docqa", layer="docqa", chained=False),
    "fuse": Step("fuse"),
    "judge": Step("judge", layer="judge"),
    "phash": Step("phash"),
    "clean": Step("clean"),
    "dedup": Step("dedup"),
    "contamination": Step("contamination"),
    "perplexity": Step("perplexity", takes_model=True),
    "keep": Step("keep"),
}


def attempt(name: str, state: Path, models: str, given: str | None, began: Any) -> None:
    """One run of one step, in a process and session of its own; `began` hears when the step itself starts.

    The store is ``run/root`` of the state folder, the manifest that the step returns is left in ``made.json``; `models` is
    the address of the models' server.
    """
    os.setsid()
    os.environ.update({"VLMFLOW_CAPTION_URL": models, "VLMFLOW_FUSE_URL": models, "VLMFLOW_QUIET": "1"})
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(state / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    import curation_world as world

    from vlmflow.models import inference, store

    inference.load = lambda folder: world.FakeVLM()  # type: ignore[assignment,misc]
    store.fetch = lambda ref, scratch=None: Path("/nowhere")  # type: ignore[assignment]
    step, ctx = STEPS[name], _context(state)
    if step.dataset:
        call: Callable[..., Manifest] = importlib.import_module("vlmflow.curation.pull").run
        began.send(None)
        made = call(ctx, step.dataset)
    else:
        manifest = Manifest.model_validate_json(given or "")
        if name == "docqa":
            manifest = _read(ctx, manifest)
        call = importlib.import_module(f"vlmflow.curation.{step.module}").run
        began.send(None)
        made = call(ctx, manifest, *([world.MODEL] if step.takes_model else []))
    (state / "made.json").write_text(made.model_dump_json())


def _context(state: Path) -> Any:
    from vlmflow.recipe.curation import CurationSpec
    from vlmflow.recipe.data import DatasetSpec, PullSpec, SourceSpec
    from vlmflow.step import Context

    tars = [str(path) for path in sorted((state / "tars").glob("*.tar"))]
    recipe = SimpleNamespace(
        seed=17,
        data={
            "web": DatasetSpec(sources={"web": SourceSpec(table=str(state / "table.jsonl"))}),
            "old": DatasetSpec(sources={"old": SourceSpec(shards=tars)}),
        },
        pull=PullSpec(samples_per_shard=PER_SHARD, allow_hosts=["127.0.0.1"], concurrency=CONCURRENCY),
        curation=CurationSpec.model_validate(RECIPE),
        evaluation=SimpleNamespace(
            benchmarks={"marks": SimpleNamespace(table=str(state / "marks.tsv"), kind="reading")}
        ),
    )
    return Context(recipe, str(state / "run/root"), state / "run/scratch")  # type: ignore[arg-type]


def _read(ctx: Any, manifest: Manifest) -> Manifest:
    """A layer `ocr` of pages with text, which the small pictures have not."""
    from vlmflow.dataset.layer import add_layer

    def compute(reader: Any, upstream: Any) -> Iterator[dict[str, Any]]:
        return ({"key": key, "text": f"Page {key} of the ledger\nTotal: {key}", "score": 0.9} for key in reader.keys())

    schema = {"text": "str", "lines": "json", "score": "float"}
    return add_layer(ctx, manifest, "ocr", params={"of": "the benchmark"}, version=0, schema=schema, compute=compute)


def build(state: Path, address: Callable[[str], str], rows: int) -> None:
    """The table of pictures, the tars that are adopted, and the benchmark table.

    Args:
        address: path -> URL at the server of pictures.
    """
    from curation_server import picture
    from PIL import Image

    from vlmflow.evaluation.tsv import write_table

    lines = ({"url": address(f"/img/{i}"), "text": f"a small square, number {i} of many"} for i in range(rows))
    (state / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (state / "tars").mkdir(exist_ok=True)
    for first in range(0, rows, 4 * PER_SHARD):
        with tarfile.open(state / "tars" / f"{first:05d}.tar", "w") as tar:
            for number in range(first, min(rows, first + 4 * PER_SHARD)):
                for name, data in (("png", picture(number)), ("txt", f"square {number}".encode())):
                    entry = tarfile.TarInfo(f"{number:06d}.{name}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    write_table(
        state / "marks.tsv",
        [
            {
                "index": str(i),
                "question": f"Which mark is number {i} here?",
                "answer": "x",
                "image": Image.open(io.BytesIO(picture(i))),
            }
            for i in range(0, rows, 16)
        ],
    )


def name_of(data: bytes) -> str:
    """How the text server names a picture, or a text, in its counts."""
    return hashlib.sha256(data).hexdigest()


def answer(body: dict[str, Any], asked: Counter[str]) -> dict[str, Any]:
    """What the server of the text and vision models says, a function of the request alone; counts what it is asked."""
    import curation_world as world

    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        asked[name_of(content.encode())] += 1
        if not (page := re.search(r"Page (\S+) of the ledger", content)):
            return world.chat("no")
        return world.chat(json.dumps([{"question": "What is the total on the page?", "answer": page[1]}]))
    image = next(part for part in content if part["type"] == "image_url")["image_url"]["url"]
    asked[name := name_of(base64.b64decode(image.partition(",")[2]))] += 1
    return world.chat(f"A small coloured square with the mark {name[:8]} on it.")


@contextmanager
def servers(asked: Counter[str]) -> Iterator[tuple[Any, str]]:
    """The server of pictures, and the address of that of models."""
    import curation_server
    import curation_world as world

    with curation_server.serving() as site, world.serving(lambda body, number: answer(body, asked)) as (_, url):
        yield site, url
