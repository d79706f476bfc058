"""The estimate of the time left: arithmetic on a plan, memory between runs, and the words a person reads."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from vlmflow import estimate
from vlmflow.display import Display
from vlmflow.estimate import Estimate, Planned, human, recall, remember
from vlmflow.recipe import load

TINY = Path(__file__).resolve().parents[1] / "recipes/points-tiny.yaml"


def two_steps() -> Estimate:
    return Estimate([Planned("a", 60.0), Planned("b", 40.0)])


def test_before_the_start_everything_is_left():
    assert two_steps().left(now=123.0) == 100.0


def test_a_run_at_the_remembered_speed():
    follow = two_steps()
    follow.event({"step": "a", "state": "start"}, 0.0)
    assert follow.left(30.0) == pytest.approx(70.0)  # half of a by time
    follow.event({"step": "a", "state": "end", "seconds": 60.0}, 60.0)
    assert follow.left(60.0) == pytest.approx(40.0)
    assert follow.share(60.0) == pytest.approx(0.6)


def test_a_run_twice_as_slow_takes_longer():
    follow = two_steps()
    follow.event({"step": "a", "state": "start"}, 0.0)
    follow.event({"step": "a", "state": "end", "seconds": 120.0}, 120.0)
    # 120 s for 60 s of work, with a prior of 10 s at the remembered speed: (120 + 10) / (60 + 10) times 40 s
    assert follow.left(120.0) == pytest.approx(40.0 * 130.0 / 70.0)


def test_a_step_that_found_finished_work_does_not_make_the_rest_look_quick():
    follow = two_steps()
    follow.event({"step": "a", "state": "start"}, 0.0)
    follow.event({"step": "a", "state": "end", "seconds": 1.0}, 1.0)
    assert follow.left(1.0) == pytest.approx(40.0)


def test_a_counter_overrules_the_clock_and_never_goes_back():
    follow = two_steps()
    follow.event({"step": "a", "state": "start"}, 0.0)
    counter = {"step": "a", "state": "progress", "label": "read", "total": 10}
    follow.event({**counter, "done": 5}, 20.0)
    assert follow.done(20.0) == pytest.approx(60.0 * 0.45)
    assert follow.done(59.0) == pytest.approx(60.0 * 0.55)  # the clock runs ahead of a counter a little, not further
    follow.event({**counter, "done": 10}, 30.0)
    read = follow.done(30.0)
    assert read == pytest.approx(60.0 * 0.75)  # the first of several counters may end early
    follow.event({**counter, "label": "write", "done": 0}, 31.0)
    assert read <= follow.done(31.0)
    follow.event({**counter, "label": "write", "done": 9}, 50.0)
    assert read <= follow.done(50.0) < 60.0


def test_steps_side_by_side_count_for_less():
    follow = Estimate([Planned("a", 60.0, lanes=2), Planned("b", 60.0, lanes=2)])
    assert follow.work() == 60.0


def test_steps_nobody_planned_are_added():
    follow = two_steps()
    follow.event({"step": "evaluate-x", "state": "start"}, 0.0)
    assert follow.work() == 100.0 + estimate.FIRST_RUN_SECONDS["evaluate"]


def test_the_plan_follows_the_recipe():
    plan = estimate.expected_steps(load(TINY), 2, {"train-sft-pairs": 7.0})
    steps = {step.name: step for step in plan}
    assert {"train-sft-charts", "train-sft-pairs", "train-sft-describe", "evaluate-1", "evaluate-2", "report"} <= set(
        steps
    )
    assert steps["train-sft-pairs"].seconds == 7.0 and steps["train-sft-pairs"].lanes == 2
    assert steps["train-sft-charts"].seconds == estimate.FIRST_RUN_SECONDS["train-sft"]
    assert steps["pull-web"].seconds == estimate.FIRST_RUN_SECONDS["pull"]


def test_groups_and_other_pipelines_are_planned_too():
    curate = [step.name for step in estimate.expected_steps(load(TINY), 3, {}, "curate", 3)]
    assert [name for name in curate if name.startswith("clean")] == ["clean-1", "clean-2", "clean-3", "clean"]
    assert curate[:3] == ["preflight", "pull-seed", "deal-web"] and curate[-3:] == ["dedup", "keep", "finish"]
    assert len(set(curate)) == len(curate)
    train = estimate.expected_steps(load(TINY), 2, {"preflight": 1.0, "train-align": 9.0}, "train")
    assert [(step.name, step.seconds) for step in train] == [("preflight", 1.0), ("train-align", 9.0)]


def test_memory_survives_and_a_resumed_run_does_not_erase_it(tmp_path):
    path = tmp_path / "timings.json"
    remember(path, "tiny", {"ocr": 40.0})
    remember(path, "tiny", {"ocr": 0.2, "keep": 1.0})  # found finished work again
    remember(path, "other", {"ocr": 5.0})
    assert recall(path, "tiny") == {"ocr": 20.0, "keep": 1.0}
    remember(path, "tiny", {"ocr": 44.0})
    assert recall(path, "tiny")["ocr"] == 44.0


@pytest.mark.parametrize("content", ["", "[]", '{"tiny": 3}', "{"])
def test_damaged_memory_is_no_memory(tmp_path, content):
    path = tmp_path / "timings.json"
    path.write_text(content)
    assert recall(path, "tiny") == {}
    remember(path, "tiny", {"ocr": 1.0})
    assert json.loads(path.read_text())["tiny"] == {"ocr": 1.0}


def test_words():
    assert [human(s) for s in (0.4, 59.4, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]


def test_a_terminal_gets_live_bars_and_one_line_a_finished_step():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Display(two_steps(), console) as display:
        display.event({"step": "a", "state": "start"})
        display.event({"step": "a", "state": "progress", "label": "reading", "done": 3, "total": 9, "unit": "pages"})
        display.tick()
        with console.capture() as frame:
            console.print(display._frame())
        display.event({"step": "a", "state": "end", "seconds": 61})
    assert "reading" in frame.get() and "3/9 pages" in frame.get() and "whole run" in frame.get()
    assert "a done in 1 min 1 s" in out.getvalue()
    assert display.latest == {}
