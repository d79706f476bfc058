"""Run a pipeline on this machine: the same package that a cluster gets, by kfp.local in subprocesses.

`run` checks the recipe, brings up the local stack unless VLMFLOW_ROOT names a store, starts one worker process
(`vlmflow.local_worker`), follows the progress events of the steps, and ends with the report and a summary. Every step
is idempotent, so a run that was killed continues when it is started again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vlmflow import estimate, process_tree, storage
from vlmflow.display import Display
from vlmflow.errors import NoSpace, NotFound, RecipeError, StepFailed, VlmflowError

if TYPE_CHECKING:
    from rich.console import Console

POLL_SECONDS = 0.1
STOP_SECONDS = 30.0  # after Ctrl-C: the worker gives trainers 20 s to write a checkpoint
TAIL_LINES = 25
SPARE_BYTES = 16 * 2**20  # a disk with less than this left cannot be told from a full one after a failed write
_TASK_FAILED = re.compile(r"Task .*finished with status .*FAILURE")


@dataclass
class RunResult:
    """A finished run: where its folder and report are, and what its summary says (scores, version, export)."""

    run_id: str
    folder: Path
    report: Path | None
    summary: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)  # step -> wall time
    datasets: dict[str, str] = field(default_factory=dict)  # name -> URI of the manifest with most layers


def run(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    state_dir: str | Path = ".vlmflow",
    console: Console | None = None,
    pipeline: str = "points",
    parameters: Mapping[str, Any] | None = None,
    processes: int = 0,
) -> RunResult:
    """Run a pipeline for a recipe.

    Args:
        parameters: further parameters of the pipeline, such as `stage` and `model` of `train`.
        processes: tasks of a loop that run at a time, and groups that the shards are dealt to; 0 = two tasks, one group (whose
            steps use both cores themselves). What comes out is the same whatever their number.

    Raises:
        RecipeError: before anything is started; also for a parameter that the pipeline does not have.
        ServiceError: the local stack does not start.
        StepFailed: a step failed; the message is the step's own, and names the log.
    """
    from vlmflow import compiler, preflight
    from vlmflow.digest import digest
    from vlmflow.recipe import dump

    given = dict(parameters or {})
    package = compiler.compile_pipeline(pipeline)
    forms = package.spec["root"]["inputDefinitions"]["parameters"]
    _check_parameters(pipeline, given, forms)
    changes = list(overrides)
    if pipeline == "curate" and given.get("model"):  # found and put in this place by the first task
        changes += [f"curation.scorer={given['model']}", "bootstrap=null"]
    recipe = preflight.resolve(str(recipe_path), changes, pipeline=pipeline)
    state = Path(state_dir).absolute()
    with stack(state, console) as root, _only_run(state):
        run_id = _run_id(state, digest(recipe))
        folder = state / "runs" / run_id
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        timings, lanes = state / "timings.json", processes or estimate.LANES
        kind = recipe.name if pipeline == "points" else f"{recipe.name} {pipeline}"
        memory = estimate.recall(timings, kind)
        groups = max(1, processes)
        plan = estimate.expected_steps(recipe, lanes, memory, pipeline, groups)
        own = {"recipe": str(folder / "recipe.yaml"), "overrides": [], "evaluators": lanes, "shard_groups": groups}
        arguments = {name: value for name, value in own.items() if name in forms} | given
        follower = estimate.Estimate(plan)
        try:
            execute(package.text, arguments, folder, follower, console=console, lanes=lanes)
        finally:
            estimate.remember(timings, kind, follower.ended)
        return _result(root, run_id, folder, follower)


def _check_parameters(pipeline: str, given: Mapping[str, Any], forms: Mapping[str, Any]) -> None:
    own = ("recipe", "overrides", "evaluators", "shard_groups")
    free = sorted(set(forms) - set(own))
    if strangers := sorted(set(given) - set(free)):
        raise RecipeError(
            f"the pipeline '{pipeline}' has no parameter {', '.join(strangers)} to set here; it has {', '.join(free) or 'none'} "
            "(groups and evaluators follow from --processes)"
        )
    if missing := [name for name in free if "defaultValue" not in forms[name] and name not in given]:
        raise RecipeError(
            f"the pipeline '{pipeline}' needs "
            + ", ".join(
                f"--parameter {name}=... ({forms[name].get('description', '').rstrip('.')})" for name in missing
            )
        )


def execute(
    package: str,
    arguments: dict[str, Any],
    folder: Path,
    follower: estimate.Estimate,
    console: Console | None = None,
    lanes: int = estimate.LANES,
) -> None:
    """Run a compiled package in the run folder `folder` and show its progress; of a loop, `lanes` tasks at a time.

    Leaves `log.txt` (all output of kfp and of the steps), `events.jsonl`, `job.json` and kfp's artifacts there.

    Raises:
        StepFailed: a task failed or was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    (folder / "package.yaml").write_text(package, encoding="utf-8")
    job = {
        "package": str(folder / "package.yaml"),
        "arguments": arguments,
        "pipeline_root": str(folder / "artifacts"),
        "lanes": lanes,
    }
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    log, events = folder / "log.txt", folder / "events.jsonl"
    events.touch()
    with log.open("ab") as sink, _terminable():
        worker = subprocess.Popen(
            [sys.executable, "-m", "vlmflow.local_worker", str(folder / "job.json")],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
            env=_task_environment(folder, events, lanes), start_new_session=True,
        )  # fmt: skip
        failure: dict[str, Any] | None = None
        try:
            with Display(follower, console) as display:
                failure = _follow(worker, events, log, display)
        except (KeyboardInterrupt, SystemExit):
            if console:
                console.print("stopping: what trains writes a checkpoint first", highlight=False)
            raise
        finally:
            _stop(worker, events)
            shutil.rmtree(folder / "tmp", ignore_errors=True)
    if failure is not None or worker.returncode != 0:
        raise _explain(failure, log, worker.returncode)


def _follow(worker: subprocess.Popen[bytes], events: Path, log: Path, display: Display) -> dict[str, Any] | None:
    """Show events until the worker ends or a step fails; returns the event of the failure, {} when it left none."""
    read_events, read_log = _tail(events), _tail(log)
    failed_without_word = 0
    while True:
        ended = worker.poll() is not None  # asked before reading, so that the last events are not missed
        for line in read_events():
            event = json.loads(line)
            display.event(event)
            if event.get("state") == "failed":
                return event
        # A task that was killed says nothing; kfp would go on with branches that do not need it. One more round lets
        # the event of a task that did say something arrive.
        failed_without_word += bool(failed_without_word) or any(_TASK_FAILED.search(line) for line in read_log())
        if failed_without_word > 2 or (ended and failed_without_word):
            return {"step": ", ".join(display.latest)}
        if ended:
            return None
        display.tick()
        time.sleep(POLL_SECONDS)


def _tail(path: Path) -> Callable[[], list[str]]:
    """A function that returns the whole lines that were added since its last call."""
    position = 0

    def lines() -> list[str]:
        nonlocal position
        with path.open("rb") as file:
            file.seek(position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        position += len(whole)
        return whole.decode("utf-8", "replace").splitlines()

    return lines


def _stop(worker: subprocess.Popen[bytes], events: Path) -> None:
    """End the worker and every task of the run, also when the worker itself was killed; nothing outlives the command."""
    if worker.poll() is None:
        worker.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(STOP_SECONDS)
    process_tree.stop(process_tree.with_variable("VLMFLOW_PROGRESS", str(events)), grace=5.0)
    worker.wait()


def _explain(failure: dict[str, Any] | None, log: Path, code: int) -> VlmflowError:
    """The error a person sees: the step's own words if it had any, else the end of the log."""
    if failure and failure.get("note"):
        kind, _, text = str(failure["note"]).partition(": ")
        if int(failure.get("code", 1)) == 1:  # not one of our errors: its type is part of what it says
            text = f"unexpected {kind}: {text}"
        error = StepFailed(f"step '{failure['step']}' failed: {text}\nThe full log is {log}")
        error.exit_code = int(failure.get("code", 1))
        return error
    free = shutil.disk_usage(log.parent).free
    if free < SPARE_BYTES:  # a step on a full disk cannot even write down what happened to it
        step = f"step '{failure['step']}'" if failure and failure.get("step") else "the run"
        return NoSpace(
            f"{step} ended on a full disk: {free / 2**20:.1f} MiB are free at {log.parent}, where logs and work files lie. Free some "
            f"space and start the same command again; finished work is kept.\nThe log, as far as it could be written, is {log}"
        )
    end = "\n".join(f"    {line}" for line in log.read_text(errors="replace").strip().splitlines()[-TAIL_LINES:])
    what = f"step '{failure['step']}' ended without a word" if failure and failure.get("step") else "the run failed"
    return StepFailed(
        f"{what} (killed, out of memory, or broken before it began; worker's exit status {code}). Start the same command "
        f"again to continue. The end of {log}:\n{end}"
    )


# --- around a run ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stack(state: Path, console: Console | None, services: Sequence[str] | None = None) -> Iterator[str]:
    """Yield the store prefix: the user's, or that of the local stack, whose variables are set for the time of the run.

    `services`: those that are needed; None starts all of the stack.
    """
    if root := os.environ.get("VLMFLOW_ROOT"):
        yield root
        return
    from vlmflow import local_stack

    say = (lambda text: console.print(text, markup=False)) if console else None
    info = local_stack.up(state, say, services or local_stack.SERVICES)
    variables = local_stack.environment(info)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield variables["VLMFLOW_ROOT"]
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _only_run(state: Path) -> Iterator[None]:
    """One run at a time for a state folder; tasks that a killed run left behind are ended first."""
    (state / "runs").mkdir(parents=True, exist_ok=True)
    with (state / "run.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise VlmflowError(
                f"another run (process {lock.read().strip() or 'unknown'}) uses the state folder {state}; two runs would "
                "overwrite each other's files. Wait for it, stop it, or choose another --state-dir."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        process_tree.stop(process_tree.with_variable("VLMFLOW_PROGRESS", f"{state / 'runs'}/"), grace=5.0)
        yield


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends this process the way Ctrl-C does, so that the worker is stopped. Main thread only."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: the program around us handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _task_environment(folder: Path, events: Path, lanes: int) -> dict[str, str]:
    """The environment of worker and tasks; credentials travel here and nowhere else."""
    package = str(Path(__file__).resolve().parents[1])
    path = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    defaults = {
        "VLMFLOW_SCRATCH": str(folder.parents[1] / "scratch"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        # Loops run `lanes` tasks at a time; more threads than cores make each wait for the other's.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // lanes)),
    }
    return {
        **defaults,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(folder / "tmp"),
        "VLMFLOW_PROGRESS": str(events),
        "VLMFLOW_RUN_ID": folder.name,
    }


def _run_id(state: Path, recipe_digest: str) -> str:
    base = f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe_digest[:8]}"
    taken = {path.name for path in (state / "runs").iterdir()}
    return next(name for name in (base, *(f"{base}-{i}" for i in range(2, 1000))) if name not in taken)


def _result(root: str, run_id: str, folder: Path, follower: estimate.Estimate) -> RunResult:
    """Copy report and summary of the run beside its log, and the report to the state folder."""
    stored = storage.join(root, "runs", run_id)
    report: Path | None = folder / "report.html"
    try:
        data = storage.read_bytes(storage.join(stored, "report.html"))
        for path in (folder / "report.html", folder.parents[1] / "report.html"):
            storage.write_bytes(path.as_uri(), data)
        summary = storage.read_json(storage.join(stored, "summary.json"))
    except NotFound:
        report, summary = None, {}
    return RunResult(run_id, folder, report, summary, dict(follower.ended), _datasets(root, folder))


def _datasets(root: str, folder: Path) -> dict[str, str]:
    """Manifests that the run sealed: of each dataset the one with most layers."""
    from vlmflow.dataset import manifest

    found: dict[str, Any] = {}
    for path in sorted((folder / "artifacts").rglob("data")):
        made = manifest.load(str(path)) if path.is_file() else None
        if made is None or not made.shards:
            continue
        if made.name not in found or len(made.layers) > len(found[made.name].layers):
            found[made.name] = made
    uris = {name: storage.join(root, "manifests", f"{made.digest}.json") for name, made in sorted(found.items())}
    return {name: uri for name, uri in uris.items() if storage.exists(uri)}
