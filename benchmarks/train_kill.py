"""Kill a training of two processes at random points and compare what it learns, bit by bit, with one left alone.

    python benchmarks/train_kill.py --kills 20 --seed 1 --store file

Trains one tiny stage twice through the training step: once undisturbed, once with SIGKILL to one rank, to all ranks, to
the launcher, to everything while it starts, and to everything while a checkpoint is being written (the driver watches
the store and the work folder, and strikes when a part of it lies there), and the same command again after each. After
every kill the store is looked at: which checkpoints are complete by their own hashes, which are partial. The next
attempt must say that it goes on from the newest complete one, and name the partial ones that it passed over. SIGTERM
(``--terms``) must leave a checkpoint of the step in progress and exit code 75. At the end weights and losses must be
equal. Prints one table and writes JSON; exits non-zero when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]  # the tests' tiny world

from vlmflow import local_stack, process_tree, storage  # noqa: E402
from vlmflow.digest import sha256_bytes  # noqa: E402
from vlmflow.training import checkpoint  # noqa: E402

KINDS = ("one rank", "all ranks", "launcher", "while starting", "during a write")
TERMS = ("SIGTERM to one rank", "SIGTERM to all", "SIGTERM to the launcher")
PREEMPTED = 75
WIDTH = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
}  # 24 MB a checkpoint: writes take a while
STEPS, EVERY = 120, 4


def recipe(processes: int, steps: int) -> Any:
    """The tests' recipe with a wider language model."""
    import training_world as world

    from vlmflow import recipe as recipes

    stage = {"epochs": 1000, "max_steps": steps, "packs": 4, "processes": processes}
    stage["checkpoint"] = {"every": EVERY, "keep": 2, "keep_every": 16}
    plain = world.recipe(**stage).model_dump(mode="json")
    plain["model"]["language"]["config"] |= WIDTH
    return recipes.parse(plain)


def build(state: Path, store: str, processes: int, steps: int) -> None:
    """Data and initial model of one run."""
    import training_world as world

    from vlmflow.step import Context

    ctx = Context(recipe(processes, steps), store, state / "scratch")
    init = world.initial(ctx)
    data = world.dataset(state, [world.sample(i, images=i % 3) for i in range(48)])
    (state / "init.json").write_text(init.model_dump_json())
    (state / "data.json").write_text(data.model_dump_json())


def train(state: Path, store: str, processes: int, steps: int) -> int:
    """The command that is killed: the training step, as a component runs it."""
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.errors import VlmflowError
    from vlmflow.models.store import ModelRef
    from vlmflow.step import Context
    from vlmflow.training import run

    ctx = Context(recipe(processes, steps), store, state / "scratch")
    init = ModelRef.model_validate_json((state / "init.json").read_text())
    data = Manifest.model_validate_json((state / "data.json").read_text())
    try:
        ref = run.run(ctx, "sft", init, {"seed": data})
    except VlmflowError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    (state / "trained.json").write_text(ref.model_dump_json())
    return 0


class Attempt:
    """One start of the command, followed through its progress events."""

    def __init__(self, state: Path, store: str, number: int, arguments: argparse.Namespace) -> None:
        self.state, self.events = state, state / f"events-{number:02d}.jsonl"
        options = ["--processes", str(arguments.processes), "--steps", str(arguments.steps)]
        command = [sys.executable, str(Path(__file__).resolve()), "--train", str(state), "--root", store, *options]
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        with open(state / "output.log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**env, "VLMFLOW_PROGRESS": str(self.events)},
            )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def told(self) -> list[dict[str, Any]]:
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def done(self) -> int:
        """Steps done, as the launcher last said; -1 before it said anything."""
        return max((e["done"] for e in self.told() if e.get("unit") == "steps"), default=-1)

    def notices(self) -> list[str]:
        return [e["note"] for e in self.told() if e.get("state") == "notice"]

    def ranks(self) -> list[int]:
        found = []
        for pid in process_tree.descendants(self.process.pid):
            try:
                text = Path(f"/proc/{pid}/cmdline").read_text()
            except OSError:
                continue
            if "vlmflow.training.worker" in text:
                found.append(pid)
        return found

    def strike(self, kind: str, chance: random.Random) -> list[int]:
        """Send the signal; returns all processes that there were, the command's own among them."""
        below = process_tree.descendants(self.process.pid)
        ranks, launcher = self.ranks(), [self.process.pid]
        one = ranks and [chance.choice(ranks)]
        victims = {"one rank": one, "all ranks": ranks, "launcher": launcher}
        victims |= {"SIGTERM to one rank": one, "SIGTERM to the launcher": launcher}
        for pid in victims.get(kind) or [*launcher, *below]:
            try:
                os.kill(pid, signal.SIGTERM if kind in TERMS else signal.SIGKILL)
            except ProcessLookupError:
                continue
        return [*launcher, *below]

    def gone(self, pids: list[int]) -> None:
        """Wait until none of the processes lives: what lies in the store then stays so."""
        self.process.wait()
        while any((fields := process_tree.stat(pid)) and fields[0] not in "ZX" for pid in pids):
            time.sleep(0.01)


def lying(store: str) -> tuple[list[int], list[int]]:
    """(complete, partial) checkpoints of a store, judged by the hashes in their markers."""
    found: dict[int, dict[str, str]] = {}
    for item in storage.list_uris(storage.join(store, "checkpoints")):
        step, name = item.uri.split("/")[-2:]
        found.setdefault(int(step.removeprefix("step-")), {})[name] = item.uri
    complete, partial = [], []
    for step, objects in sorted(found.items()):
        try:
            files = json.loads(storage.read_bytes(objects[checkpoint.MARKER]))["files"]
            whole = len(files) == 4
            whole &= all(sha256_bytes(storage.read_bytes(objects[n])) == about["sha256"] for n, about in files.items())
        except (ValueError, KeyError):
            whole = False
        (complete if whole else partial).append(step)
    return complete, partial


def writing(state: Path, folder: Path, objects: int) -> bool:
    """Whether a checkpoint is being written: its work file (``objects`` 0), or that many of its files in the store."""
    try:
        if objects == 0:
            return any(state.glob("scratch/training/*/saving/*.safetensors"))
        for place in folder.glob("checkpoints/*/step-*"):
            names = {path.name for path in place.iterdir()}
            if checkpoint.MARKER not in names and len(names) >= objects:
                return True
    except FileNotFoundError:  # the run removed a folder between its listing and its reading: the write is over
        pass
    return False


def hit(attempt: Attempt, kind: str, target: int, folder: Path, startup: float, chance: random.Random) -> list[int]:
    """Wait for the moment and strike; [] when the run ended before it came."""
    if kind == "while starting":
        limit = time.monotonic() + chance.uniform(0.0, startup)
        while not attempt.ended() and attempt.done() < 0 and time.monotonic() < limit:
            time.sleep(0.01)
    else:
        while not attempt.ended() and attempt.done() < target:
            time.sleep(0.02)
        if kind == "during a write":
            objects = chance.randrange(4)
            while not attempt.ended() and not writing(attempt.state, folder, objects):
                time.sleep(0.0002)
        else:
            time.sleep(chance.uniform(0.0, 0.6))  # steps are told twice a second: anywhere between two of them
    return [] if attempt.ended() else attempt.strike(kind, chance)


def killed(state: Path, store: str, folder: Path, startup: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """The run with kills; returns its kills and what was not as it must be."""
    chance = random.Random(arguments.seed)
    kinds = [arguments.kinds[i % len(arguments.kinds)] for i in range(arguments.kills)]
    kinds += [TERMS[i % len(TERMS)] for i in range(arguments.terms)]
    chance.shuffle(kinds)
    kills: list[dict[str, Any]] = []
    problems: list[str] = []
    number = 0
    while True:
        attempt = Attempt(state, store, number, arguments)
        number += 1
        pids: list[int] = []
        if len(kills) < len(kinds):
            kind = kinds[len(kills)]
            # a part of the run for each kill, so that all happen; within it anywhere
            target = int(arguments.steps * (len(kills) + chance.random()) / (len(kinds) + 1))
            pids = hit(attempt, kind, target, folder, startup, chance)
        attempt.gone(pids)
        if kills:
            problems += resumption(attempt, kills[-1])
        if not pids:
            if attempt.process.returncode:
                problems.append(f"attempt {number} failed by itself: see {state}/output.log")
            elif len(kills) < len(kinds):
                problems.append(f"the run ended after {len(kills)} kills")
            break
        complete, partial = lying(store)
        at = attempt.done() if attempt.done() >= 0 else kills[-1]["at_step"] if kills else 0
        kills.append({"kind": kind, "at_step": at, "complete": complete, "partial": partial})
        print(f"kill {len(kills)}: {kind} at step {at}, complete {complete}, partial {partial}", flush=True)
        code = attempt.process.returncode
        if kind in TERMS and (code != PREEMPTED or max(complete, default=0) < at):
            problems.append(f"{kind} at step {at}: exit code {code} instead of {PREEMPTED}, complete {complete}")
    return {"kills": kills, "attempts": number, "problems": problems}


def resumption(attempt: Attempt, kill: dict[str, Any]) -> list[str]:
    """What an attempt said of where it goes on, held against what lay in the store; fills in the kill's ``resumed``."""
    said = "\n".join(attempt.notices())
    expected = max(kill["complete"], default=0)
    ready = attempt.done() >= 0 or "resumed at" in said
    if not ready:  # killed again before it came so far: the next attempt is asked
        return []
    kill["resumed"], kill["redone"] = expected, max(0, kill["at_step"] - expected)
    problems = []
    if expected and f"resumed at step {expected} of" not in said:
        problems.append(f"step {expected} is the newest complete checkpoint, but the next attempt said: {said}")
    if not expected and "resumed at" in said:
        problems.append(f"there was no complete checkpoint, but the next attempt said: {said}")
    for step in kill["partial"]:
        if step > expected and f"step {step}: " not in said:
            problems.append(f"the partial checkpoint of step {step} was not named: {said}")
    return problems


def learned(state: Path) -> tuple[dict[str, str], list[Any]]:
    """(sha256 of every file of the model, (step, loss, gradient norm) of the log)."""
    from vlmflow.models.store import ModelRef

    ref = ModelRef.model_validate_json((state / "trained.json").read_text())
    assert ref.lineage.log_uri is not None
    log = [json.loads(line) for line in storage.read_bytes(ref.lineage.log_uri).splitlines()]
    return {f.path: f.sha256 for f in ref.files}, [(r["step"], r["loss"], r["grad_norm"]) for r in log]


def compare(arguments: argparse.Namespace, state: Path) -> dict[str, Any]:
    """Both runs over one store; what was found."""
    folders, stores = {}, {}
    for name in ("calm", "killed"):
        place = state / name
        place.mkdir(parents=True)
        if arguments.store == "s3":
            info = local_stack.up(place / "stack", services=["s3"])
            os.environ.update(local_stack.environment(info))
            stores[name], folders[name] = info.root, place / "stack" / "s3" / info.root.partition("://")[2]
        else:
            stores[name], folders[name] = (place / "store").as_uri(), place / "store"
        build(place, stores[name], arguments.processes, arguments.steps)
        began = time.monotonic()
        if name == "calm":
            attempt = Attempt(place, stores[name], 0, arguments)
            startup = 0.0
            while not attempt.ended():
                if not startup and attempt.done() >= 0:
                    startup = time.monotonic() - began
                time.sleep(0.02)
            if attempt.process.returncode:
                raise SystemExit((place / "output.log").read_text()[-3000:])
            calm = learned(place)
            print(
                f"undisturbed: {time.monotonic() - began:.0f} s, {startup:.0f} s of it until the first step", flush=True
            )
        else:
            result = killed(place, stores[name], folders[name], startup, arguments)
    if not result["problems"]:
        weights, log = learned(state / "killed")
        if different := sorted(n for n in calm[0].keys() | weights.keys() if calm[0].get(n) != weights.get(n)):
            result["problems"].append(f"files of the model differ: {different}")
        if log != calm[1]:
            result["problems"].append("losses or gradient norms of the log differ")
        if left := lying(stores["killed"]):
            result["problems"] += [f"checkpoints are left: {left}"] if any(left) else []
    return {"store": arguments.store, "processes": arguments.processes, "steps": arguments.steps, **result}


def table(result: dict[str, Any]) -> str:
    """One line a kind of kill."""
    lines = [f"{'killed':<26}{'kills':>6}{'steps redone':>14}{'partial left':>14}{'passed over':>13}"]
    for kind in (*KINDS, *TERMS):
        kills = [k for k in result["kills"] if k["kind"] == kind]
        newer = sum(step > max(k["complete"], default=0) for k in kills for step in k["partial"])
        redone, partial = sum(k.get("redone", 0) for k in kills), sum(bool(k["partial"]) for k in kills)
        lines.append(f"{kind:<26}{len(kills):>6}{redone:>14}{partial:>14}{newer:>13}")
    verdict = "bit-identical to the undisturbed run" if not result["problems"] else "NOT as it must be"
    return "\n".join([*lines, f"{result['store']}://, {result['attempts']} starts, weights and losses: {verdict}"])


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; 0 when nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=3, help="SIGTERMs among the kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", choices=["file", "s3"], default="file", help="s3 = a server of the local stack")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--state", type=Path, default=None, help="working folder (default: a temporary one)")
    parser.add_argument("--json", type=Path, default=None, help="where the result is written")
    parser.add_argument("--train", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--root", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.train is not None:
        return train(arguments.train, arguments.root, arguments.processes, arguments.steps)
    state = arguments.state or Path(tempfile.mkdtemp(prefix="vlmflow-train-kill-"))
    try:
        result = compare(arguments, state)
    finally:
        for name in ("calm", "killed"):
            local_stack.down(state / name / "stack")
    print(f"\n{table(result)}")
    for problem in result["problems"]:
        print(f"  {problem}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if not result["problems"] and arguments.state is None:
        shutil.rmtree(state, ignore_errors=True)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
