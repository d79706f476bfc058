"""Kill every curation step at random instants and compare it, byte by byte, with one that was left alone.

    python benchmarks/curation_kill.py --kills 20
    python benchmarks/curation_kill.py --steps pull caption --kills 100 --seed 7

Each step of `STEPS` runs once undisturbed on a few hundred small pictures. Then, as often as asked: its processes get
SIGKILL at an instant drawn from the step's own duration, the store is looked at (what stands under a final name must be
whole, and what the undisturbed run wrote), and the same step runs again, on the same machine or, every second time,
on another one, without the scratch folder. At the end every object of the two stores must be equal; what had landed in
a finished shard or part must not have been fetched or asked for again. Servers of pictures and of captions run in the
driver and count. Prints one table and writes JSON; exits non-zero when anything differs.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]  # the tests' tiny world

from vlmflow.dataset.manifest import Manifest  # noqa: E402
from vlmflow.digest import sha256_file  # noqa: E402

ROWS, PER_SHARD, CONCURRENCY = 240, 6, 8
LATE = 20  # kills that may come after the step's end, for each that is asked for
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
RECIPE = {
    "caption": {"engine": "openai", "model_name": "any", "concurrency": CONCURRENCY, "max_new_tokens": 16},
    "fuse": {"engine": "rules", "fallback": "alt", "failure_limit": 1},
    "describe": {"engine": "openai", "model_name": "any", "min_tokens": 3, "repair": False, "concurrency": CONCURRENCY},
    "clean": {},
    "dedup": {},
    "perplexity": {"failure_limit": 1},
    "keep": {"fraction": 0.5},
}


@dataclass(frozen=True)
class Step:
    """A curation step: how its module is called, and on how many shards (None: all)."""

    module: str
    takes_model: bool = False
    shards: int | None = None
    layer: str = ""  # whose parts mean that a shard was asked for


STEPS = {
    "pull": Step("pull"),
    "ocr": Step("ocr", shards=4),
    "caption": Step("caption", takes_model=True, layer="synthetic"),
    "describe": Step("describe", takes_model=True, layer="described"),
    "fuse": Step("fuse"),
    "phash": Step("phash"),
    "clean": Step("clean"),
    "dedup": Step("dedup"),
    "perplexity": Step("perplexity", takes_model=True),
    "keep": Step("keep"),
}


def attempt(name: str, place: Path, table: str, given: str | None, out: Path, began: Any) -> None:
    """One run of one step, in a process and session of its own; `began` hears when the step itself starts."""
    os.setsid()
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(place / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    import curation_world as world

    from vlmflow.models import inference, store
    from vlmflow.recipe.curation import CurationSpec
    from vlmflow.recipe.data import DatasetSpec, PullSpec, SourceSpec
    from vlmflow.step import Context

    inference.load = lambda folder: world.FakeVLM()  # type: ignore[assignment]
    store.fetch = lambda ref, scratch=None: Path("/nowhere")  # type: ignore[assignment]
    recipe = SimpleNamespace(
        seed=17,
        data={"web": DatasetSpec(sources={"web": SourceSpec(table=table)})},
        pull=PullSpec(samples_per_shard=PER_SHARD, allow_hosts=["127.0.0.1"], concurrency=CONCURRENCY),
        curation=CurationSpec.model_validate(RECIPE),
    )
    ctx = Context(recipe, str(place / "root"), place / "scratch")  # type: ignore[arg-type]
    step = STEPS[name]
    call: Callable[..., Manifest] = importlib.import_module(f"vlmflow.curation.{step.module}").run
    manifest = given and Manifest.model_validate_json(given)
    began.send(None)
    made = call(ctx, "web") if name == "pull" else call(ctx, manifest, *([world.MODEL] if step.takes_model else []))
    out.write_text(made.model_dump_json())


class Driver:
    """The servers, the state folder and the undisturbed results."""

    def __init__(self, state: Path, site: Any, asked: Counter[str], seed: int, rows: int) -> None:
        self.place, self.before, self.out = state / "run", state / "before", state / "made.json"
        self.site, self.asked, self.chance = site, asked, random.Random(seed)
        table = state / "table.jsonl"
        lines = ({"url": site.url(f"/img/{i}"), "text": f"a small square, number {i} of many"} for i in range(rows))
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.table = str(table)
        self.context = multiprocessing.get_context("forkserver")
        modules = [f"vlmflow.curation.{step.module}" for step in STEPS.values()]
        self.context.set_forkserver_preload([*PRELOADED, *modules])
        self.manifest: Manifest | None = None

    def start(self, name: str, given: str | None) -> Any:
        """Start a step; returns its process when the step itself begins."""
        self.out.unlink(missing_ok=True)
        self.place.mkdir(exist_ok=True)
        mine, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=attempt, args=(name, self.place, self.table, given, self.out, theirs))
        process.start()
        theirs.close()
        try:
            mine.recv()
        except EOFError:
            self._failed(name)
        return process

    def _failed(self, name: str) -> None:
        raise SystemExit(f"step {name} fails by itself:\n{(self.place / 'output.log').read_text()[-3000:]}")

    def whole(self, name: str, given: str | None) -> float:
        """Run a step to its end; returns its seconds."""
        process, began = self.start(name, given), time.monotonic()
        process.join()
        if process.exitcode:
            self._failed(name)
        return time.monotonic() - began

    def keep_state(self) -> None:
        shutil.rmtree(self.before, ignore_errors=True)
        self.place.mkdir(exist_ok=True)
        shutil.copytree(self.place, self.before)

    def restore(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.before, self.place)
        self.forget()

    def forget(self) -> None:
        self.site.hits.clear()
        self.asked.clear()

    def step(self, name: str, kills: int) -> dict[str, Any]:
        """One step undisturbed, then killed again and again; the chain goes on from the undisturbed result."""
        step, manifest = STEPS[name], self.manifest
        if manifest and step.shards:
            manifest = manifest.model_copy(update={"shards": manifest.shards[: step.shards], "layers": {}})
        given = manifest and manifest.model_dump_json()
        self.keep_state()
        self.forget()
        seconds = self.whole(name, given)
        calm, made = inventory(self.place), self.out.read_text()
        once = self.site.images + sum(self.asked.values())
        done, late, again, problems = 0, 0, 0, []
        while done < kills and late < LATE * kills:
            self.restore()
            process = self.start(name, given)
            process.join(self.chance.uniform(0, seconds))
            if process.exitcode is not None:
                seconds, late = seconds * 0.8, late + 1  # a quieter moment than the undisturbed run had
                continue
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            done += 1
            where = f"kill {done} of {name}"
            problems += [f"{where}: {text}" for text in self._partial(calm)]
            landed = self._landed(name)
            if elsewhere := done % 2 == 0:
                shutil.rmtree(self.place / "scratch", ignore_errors=True)
            self.whole(name, given)
            problems += [f"{where}: {text}" for text in differences(calm, inventory(self.place))]
            if self.out.read_text() != made:
                problems.append(f"{where}: another manifest is returned")
            twice = sorted(key for key in landed if self.site.hits[key] + self.asked[key] > 1)
            if twice:
                problems.append(f"{where}: {len(twice)} were fetched again though they had landed, e.g. {twice[0]}")
            more = self.site.images + sum(self.asked.values()) - once
            again += max(0, more)
            if step.layer and more > CONCURRENCY and not elsewhere:  # the journal has what was answered
                problems.append(f"{where}: {more} more requests, though {CONCURRENCY} at most were open")
        if done < kills:
            problems.append(f"only {done} of {kills} kills came before the step's end")
        self.restore()
        self.whole(name, given)
        if not step.shards:
            self.manifest = Manifest.model_validate_json(made)
        return {
            "seconds": round(seconds, 2),
            "kills": done,
            "objects": len(calm),
            "asked_again": again,
            "problems": problems,
        }

    def _partial(self, calm: dict[str, str]) -> list[str]:
        """What stands under a final name after a kill, and is not what the undisturbed run wrote there."""
        found = {key: sha for key, sha in inventory(self.place).items() if not key.startswith("journal/")}
        return [
            f"{key} is {'partial' if key in calm else 'left over'}"
            for key, sha in found.items()
            if calm.get(key) != sha
        ]

    def _landed(self, name: str) -> list[str]:
        """Requests whose answers lie in a finished shard or part."""
        step, root = STEPS[name], self.place / "root"
        if name == "pull":
            finished = {int(path.stem.rsplit("-", 1)[1]) for path in (root / "shards").glob("*.tar")}
            return [f"/img/{row}" for shard in finished for row in range(shard * PER_SHARD, (shard + 1) * PER_SHARD)]
        if not step.layer or not self.manifest:
            return []
        parts = {path.stem for path in (root / "layers" / step.layer).glob("*/*.parquet")}
        places = [number for number, shard in enumerate(self.manifest.shards) if shard.sha256[:24] in parts]
        return [picture_name(row) for n in places for row in range(n * PER_SHARD, (n + 1) * PER_SHARD)]


def picture_name(row: int) -> str:
    """How the caption server names a picture in its counts."""
    from curation_server import picture

    return hashlib.sha256(picture(row)).hexdigest()


def inventory(place: Path) -> dict[str, str]:
    """sha256 of every object of the store, by key; files on their way have hidden names."""
    root = place / "root"
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in sorted(files)}


def differences(calm: dict[str, str], killed: dict[str, str]) -> list[str]:
    """What a store lacks, has too much, or has otherwise."""
    return (
        [f"{key} is lost" for key in sorted(calm.keys() - killed.keys())]
        + [f"{key} is left over" for key in sorted(killed.keys() - calm.keys())]
        + [f"{key} differs" for key in sorted(calm.keys() & killed.keys()) if calm[key] != killed[key]]
    )


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that the steps' processes inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def compare(
    steps: list[str], kills: int, seed: int, state: Path, rows: int = ROWS, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Kill each of the steps; the others of the chain before them run undisturbed. Returns figures and problems by step."""
    import curation_server
    import curation_world as world

    asked: Counter[str] = Counter()

    def reply(body: dict, number: int) -> dict:
        image = next(p for p in body["messages"][-1]["content"] if p["type"] == "image_url")["image_url"]["url"]
        name = hashlib.sha256(base64.b64decode(image.partition(",")[2])).hexdigest()
        asked[name] += 1
        return world.chat(f"A small coloured square with the mark {name[:8]} on it.")

    found = {}
    path = os.pathsep.join(
        [*str(HERE), str(HERE.parent), str(HERE.parent / "tests"), os.environ.get("PYTHONPATH", "")]
    )  # the fork server imports for all steps
    with (
        curation_server.serving() as site,
        world.serving(reply) as (_, url),
        _environment(VLMFLOW_CAPTION_URL=url, PYTHONPATH=path),
    ):
        driver = Driver(state, site, asked, seed, rows)
        last = max(list(STEPS).index(name) for name in steps)
        for name in list(STEPS)[: last + 1]:
            if importlib.util.find_spec(f"vlmflow.curation.{STEPS[name].module}") is None:
                continue
            if name not in steps and STEPS[name].shards:
                continue  # nothing is built on it
            result = driver.step(name, kills if name in steps else 0)
            if name in steps:
                found[name] = result
                say(
                    f"{name:<14}{result['seconds']:>8.2f}{result['kills']:>7}{result['objects']:>9}{result['asked_again']:>13}"
                    f"{'as undisturbed' if not result['problems'] else 'NOT as it must be':>20}"
                )
                for problem in result["problems"][:10]:
                    say(f"  {problem}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; 0 when nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each step")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=None, help="working folder (default: a temporary one)")
    parser.add_argument("--json", type=Path, default=None, help="where the result is written")
    arguments = parser.parse_args(argv)
    state = arguments.state or Path(tempfile.mkdtemp(prefix="vlmflow-curation-kill-"))
    state.mkdir(parents=True, exist_ok=True)
    os.environ |= {"VLMFLOW_QUIET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:resource_tracker"}
    print(f"{'step':<14}{'seconds':>8}{'kills':>7}{'objects':>9}{'asked again':>13}{'store':>20}")
    result = compare(arguments.steps, arguments.kills, arguments.seed, state, say=lambda line: print(line, flush=True))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": ROWS, "seed": arguments.seed, "steps": result}, indent=1) + "\n")
    failed = any(row["problems"] for row in result.values())
    if not failed and arguments.state is None:
        shutil.rmtree(state, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
