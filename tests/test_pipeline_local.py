"""The local runner: real subprocesses of a tiny pipeline; failures, kills and signals end as a person expects."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from rich.console import Console

from vlmflow import compiler, local, local_worker, process_tree
from vlmflow.errors import NoSpace, RecipeError, StepFailed, VlmflowError
from vlmflow.estimate import Estimate, Planned

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def package() -> str:
    sys.path.insert(0, str(HERE))
    try:
        from pipeline_tiny import tiny
    finally:
        sys.path.remove(str(HERE))
    return compiler.compile_function(tiny).text


def start(package: str, tmp_path: Path, text: str, out: io.StringIO) -> Estimate:
    follower = Estimate([Planned("first", 1.0), Planned("second", 1.0)])
    console = Console(file=out, force_terminal=False, width=200)
    local.execute(package, {"text": text}, tmp_path / "state" / "runs" / "r1", follower, console)
    return follower


def test_runs_both_steps_and_the_loop(package, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_RESULT", str(tmp_path / "result"))
    out = io.StringIO()
    follower = start(package, tmp_path, 'it\'s "quoted"', out)
    shown = out.getvalue()
    assert (tmp_path / "result").read_text() == 'it\'s "quoted" a=a|it\'s "quoted" b=b'
    assert (tmp_path / "result.end").read_text() == "SUCCEEDED"  # the exit handler runs last
    assert follower.ended == {"first": 0.5, "second": 0.25}
    assert "first done" in shown and "second done" in shown and "left" in shown
    assert "KFP Executor" not in shown  # kfp's chatter goes to the log
    assert "KFP Executor" in (tmp_path / "state/runs/r1/log.txt").read_text()
    metrics = list((tmp_path / "state/runs/r1/artifacts").rglob("executor_output.json"))
    assert any('"notes": 2' in path.read_text() for path in metrics)


def test_a_failing_step_says_its_own_words(package, tmp_path):
    out = io.StringIO()
    with pytest.raises(StepFailed) as caught:
        start(package, tmp_path, "boom", out)
    assert "step 'first' failed: table 'a.csv' has no column 'url'" in str(caught.value)
    assert str(tmp_path / "state/runs/r1/log.txt") in str(caught.value)
    assert caught.value.exit_code == 2
    assert "first FAILED" in out.getvalue()


def test_a_killed_step_is_named_and_the_log_shown(package, tmp_path):
    with pytest.raises(StepFailed, match="step 'first' ended without a word"):
        start(package, tmp_path, "killed", io.StringIO())


def test_a_step_that_died_on_a_full_disk_is_said_as_such(package, tmp_path, monkeypatch):
    """It could not write down its own error; the terminal shows the cause and no traceback of the log's end."""
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**20))
    with pytest.raises(
        NoSpace, match=r"step 'first' ended on a full disk: 1\.0 MiB are free at .*start the same command again"
    ) as caught:
        start(package, tmp_path, "killed", io.StringIO())
    assert caught.value.exit_code == 3 and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "whom"),
    [(signal.SIGINT, "command"), (signal.SIGTERM, "command"), (signal.SIGKILL, "command"), (signal.SIGKILL, "worker")],
)
def test_a_signal_ends_every_process_of_the_run(package, tmp_path, number, whom):
    """SIGKILL too: the worker notices the death of the command, and the command that of the worker."""
    mark = tmp_path / "pid"
    (tmp_path / "package.yaml").write_text(package)
    code = (
        "import sys, pathlib; from vlmflow import local, estimate\n"
        "p = pathlib.Path(sys.argv[1])\n"
        "local.execute((p/'package.yaml').read_text(), {'text': 'sleep'}, p/'state/runs/r1', estimate.Estimate([]))\n"
    )
    env = {**os.environ, "TEST_PID_FILE": str(mark), "PYTHONPATH": str(HERE.parent)}
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ready = Path(f"{mark}.ready")
    wait_for(ready.exists)
    task = int(ready.read_text())
    assert command.poll() is None and task in process_tree.descendants(command.pid)
    os.kill(command.pid if whom == "command" else process_tree.descendants(command.pid)[0], number)
    assert command.wait(60) != 0
    wait_for(lambda: not process_tree.with_variable("VLMFLOW_PROGRESS", str(tmp_path)))
    assert not Path(f"/proc/{task}/cmdline").exists() or not Path(f"/proc/{task}/cmdline").read_bytes()


def wait_for(condition, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.05)


def test_two_runs_in_one_state_folder_are_refused(tmp_path):
    with local._only_run(tmp_path), pytest.raises(VlmflowError, match=f"process {os.getpid()}.*state-dir"):
        with local._only_run(tmp_path):
            pass


def test_what_a_killed_run_left_behind_is_ended(tmp_path):
    env = {**os.environ, "VLMFLOW_PROGRESS": f"{tmp_path}/runs/old/events.jsonl"}
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=env)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        wait_for(lambda: process_tree.with_variable("VLMFLOW_PROGRESS", f"{tmp_path}/runs/"))
        with local._only_run(tmp_path):
            assert orphan.wait(10) != 0
        assert other.poll() is None
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()


def test_run_folder_names_do_not_collide(tmp_path):
    (tmp_path / "runs").mkdir()
    first = local._run_id(tmp_path, "ab" * 32)
    (tmp_path / "runs" / first).mkdir()
    assert local._run_id(tmp_path, "ab" * 32) != first


def test_the_users_store_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMFLOW_ROOT", "s3://mine")
    with local.stack(tmp_path, None) as root:
        assert root == "s3://mine"
    assert not list(tmp_path.iterdir())


def test_report_and_summary_come_back(tmp_path):
    root = (tmp_path / "store").as_uri()
    from vlmflow import storage

    storage.write_bytes(f"{root}/runs/r1/report.html", b"<p>hi")
    storage.write_json(f"{root}/runs/r1/summary.json", {"chosen": "greedy"})
    folder = tmp_path / "state/runs/r1"
    folder.mkdir(parents=True)
    result = local._result(root, "r1", folder, Estimate([]))
    assert result.report == folder / "report.html" and result.summary == {"chosen": "greedy"}
    assert (tmp_path / "state/report.html").read_bytes() == b"<p>hi"


def test_events_cut_in_the_middle_of_a_line_are_read_later(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"step": "a"}\n{"st')
    read = local._tail(path)
    assert [json.loads(line) for line in read()] == [{"step": "a"}]
    with path.open("a") as file:
        file.write('ep": "b"}\n')
    assert [json.loads(line) for line in read()] == [{"step": "b"}]
    assert read() == []


def test_loops_run_as_many_tasks_at_a_time_as_asked(monkeypatch):
    """kfp.local caps every loop at two tasks, whatever it is asked."""
    from kfp.local.orchestrator import enhanced_dag_orchestrator as kfp

    assert kfp.ParallelExecutor().max_workers == kfp.ParallelExecutor(8).max_workers == 2
    monkeypatch.setattr(kfp, "ParallelExecutor", kfp.ParallelExecutor)  # put back afterwards
    local_worker.widen_loops(5)
    assert kfp.ParallelExecutor().max_workers == kfp.ParallelExecutor().conservative_max == 5


class Given:
    """Takes the place of the runner; keeps what it was given."""

    def __call__(self, package, arguments, folder, follower, console=None, lanes=0):
        self.arguments, self.lanes, self.steps = arguments, lanes, [step.name for step in follower.plan]


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMFLOW_ROOT", (tmp_path / "store").as_uri())
    taken = Given()
    monkeypatch.setattr(local, "execute", taken)
    return taken


TINY = str(HERE.parent / "recipes/points-tiny.yaml")


def test_a_run_has_one_group_and_two_lanes_unless_asked(given, tmp_path):
    local.run(TINY, [], tmp_path / "state")
    assert (given.arguments["shard_groups"], given.arguments["evaluators"], given.lanes) == (1, 2, 2)
    local.run(TINY, [], tmp_path / "state", processes=3)
    assert (given.arguments["shard_groups"], given.arguments["evaluators"], given.lanes) == (3, 3, 3)
    assert {"pull-web-3", "ocr-3", "clean-3", "evaluate-3", "dedup"} <= set(given.steps)


def test_any_pipeline_runs_with_its_own_parameters(given, tmp_path):
    local.run(TINY, [], tmp_path / "state", None, "curate", processes=4)
    assert set(given.arguments) == {"recipe", "overrides", "shard_groups"} and given.arguments["shard_groups"] == 4
    assert given.steps[-2:] == ["keep", "finish"]
    asked = {"stage": "align", "model": "models:/points-tiny/1"}
    local.run(TINY, [], tmp_path / "state", None, "train", asked)
    assert asked.items() <= given.arguments.items() and "shard_groups" not in given.arguments


@pytest.mark.parametrize(
    ("pipeline", "asked", "said"),
    [
        ("train", {"stage": "align"}, r"needs --parameter model=\.\.\. \(Model to start from: URI"),
        ("curate", {"groups": 3}, "has no parameter groups to set here; it has model"),
        ("curate", {"shard_groups": 3}, "has no parameter shard_groups.*--processes"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(given, tmp_path, pipeline, asked, said):
    with pytest.raises(RecipeError, match=said):
        local.run(TINY, [], tmp_path / "state", None, pipeline, asked)
    assert not (tmp_path / "state").exists()


def test_a_scorer_that_is_given_takes_the_place_of_the_bootstrap(given, tmp_path):
    local.run(TINY, ["bootstrap=null"], tmp_path / "state", None, "curate", {"model": "models:/points-tiny/1"})
    written = Path(given.arguments["recipe"]).read_text()
    assert "scorer: models:/points-tiny/1" in written and given.arguments["model"] == "models:/points-tiny/1"
