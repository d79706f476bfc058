"""Kill every curation step at random instants and compare it, byte by byte, with one that was left alone.

    python benchmarks/curation_kill.py --kills 20
    python benchmarks/curation_kill.py --steps pull caption --kills 100 --seed 7

Each step of `STEPS` runs once undisturbed on a few hundred small pictures. Then, as often as asked: all its processes, or
the first alone, get SIGKILL at an instant drawn from the step's own duration, the store is looked at (what stands under a final name must be
whole, and what the undisturbed run wrote), and the same step runs again, on the same machine or, every second time,
on another one, without the scratch folder. At the end every object of the two stores must be equal; what had landed in
a finished shard or part must not have been fetched or asked for again. Servers of pictures and of captions run in the
driver and count. Prints one table and writes JSON; exits non-zero when anything differs.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from curation_kill_world import CONCURRENCY, PATHS, PER_SHARD, PRELOADED, STEPS, attempt, build, name_of, servers

from vlmflow.dataset.manifest import Manifest
from vlmflow.digest import sha256_file

ROWS = 240
LATE = 20  # kills that may come after the step's end, for each that is asked for


class Driver:
    """The servers, the state folder and the undisturbed results."""

    def __init__(self, state: Path, site: Any, models: str, asked: Counter[str], seed: int, rows: int) -> None:
        self.state, self.place, self.out = state, state / "run", state / "made.json"
        self.site, self.models, self.asked, self.chance = site, models, asked, random.Random(seed)
        build(state, site.url, rows)
        self.context = multiprocessing.get_context("forkserver")
        os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])  # of the fork server
        self.context.set_forkserver_preload(
            [*PRELOADED, *(f"vlmflow.curation.{step.module}" for step in STEPS.values())]
        )
        self.manifest: Manifest | None = None

    def start(self, name: str, given: str | None) -> Any:
        """Start a step; returns its process when the step itself begins."""
        self.out.unlink(missing_ok=True)
        self.place.mkdir(exist_ok=True)
        mine, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=attempt, args=(name, self.state, self.models, given, theirs))
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

    def keep(self, name: str) -> None:
        """Copy what the store and the scratch folder hold, to be put back by `restore`."""
        self.place.mkdir(exist_ok=True)
        shutil.rmtree(self.state / name, ignore_errors=True)
        shutil.copytree(self.place, self.state / name)

    def restore(self, name: str) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.state / name, self.place)
        self.forget()

    def forget(self) -> None:
        self.site.hits.clear()
        self.asked.clear()

    def step(self, name: str, kills: int) -> dict[str, Any]:
        """One step undisturbed, then killed again and again; the chain goes on from the undisturbed result."""
        step, manifest = STEPS[name], self.manifest
        if manifest and step.shards:
            manifest = manifest.model_copy(update={"shards": manifest.shards[: step.shards], "layers": {}})
        given = manifest.model_dump_json() if manifest else None
        self.keep("before")
        self.forget()
        seconds = self.whole(name, given)
        self.keep("after")
        calm, made = inventory(self.place), self.out.read_text()
        once = self.site.images + sum(self.asked.values())
        done, late, again, problems = 0, 0, 0, []
        while done < kills and late < LATE * kills:
            self.restore("before")
            process = self.start(name, given)
            process.join(self.chance.uniform(0, seconds))
            alone = self.chance.random() < 0.5  # only the step's first process: the machine is short of memory
            if process.exitcode is None:
                with suppress(ProcessLookupError):  # it ended this moment
                    (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
                process.join()
            if process.exitcode == 0:
                seconds, late = seconds * 0.8, late + 1  # a quieter moment than the undisturbed run had
                continue
            if process.exitcode > 0:
                self._failed(name)
            done += 1
            where = f"kill {done} of {name}"
            problems += [f"{where}: {text}" for text in self._partial(calm)]
            landed = self._landed(name)
            if elsewhere := done % 2 == 0:
                shutil.rmtree(self.place / "scratch", ignore_errors=True)
            self.whole(name, given)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers that outlived it
            problems += [f"{where}: {text}" for text in differences(calm, inventory(self.place))]
            if self.out.read_text() != made:
                problems.append(f"{where}: another manifest is returned")
            twice = sorted(key for key in landed if self.site.hits[key] + self.asked[key] > 1)
            if twice:
                problems.append(f"{where}: {len(twice)} were fetched again though they had landed, e.g. {twice[0]}")
            more = self.site.images + sum(self.asked.values()) - once
            again += max(0, more)
            if more > CONCURRENCY and not elsewhere:  # spool and journal have what came
                problems.append(f"{where}: {more} more requests, though {CONCURRENCY} at most were open")
        if done < kills:
            problems.append(f"only {done} of {kills} kills came before the step's end")
        self.restore("after")
        if step.chained:
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
        from curation_server import picture

        step, root = STEPS[name], self.place / "root"
        if name == "pull":
            finished = {int(path.stem.rsplit("-", 1)[1]) for path in (root / "shards").glob("*.tar")}
            return [f"/img/{row}" for shard in finished for row in range(shard * PER_SHARD, (shard + 1) * PER_SHARD)]
        if step.layer not in ("synthetic", "described") or not self.manifest:
            return []  # nothing is asked, or not about one picture
        parts = {path.stem for path in (root / "layers" / step.layer).glob("*/*.parquet")}
        places = [number for number, shard in enumerate(self.manifest.shards) if shard.sha256[:24] in parts]
        return [name_of(picture(row)) for n in places for row in range(n * PER_SHARD, (n + 1) * PER_SHARD)]


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


def compare(
    steps: list[str], kills: int, seed: int, state: Path, rows: int = ROWS, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Kill each of the steps; the others of the chain before them run undisturbed. Returns figures and problems by step."""
    asked: Counter[str] = Counter()
    found = {}
    with servers(asked) as (site, models):
        driver = Driver(state, site, models, asked, seed, rows)
        last = max(list(STEPS).index(name) for name in steps)
        for name in list(STEPS)[: last + 1]:
            if importlib.util.find_spec(f"vlmflow.curation.{STEPS[name].module}") is None:
                continue
            if name not in steps and not STEPS[name].chained:
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
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:resource_tracker"}
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
