"""`vlmflow plan data`: what a user sees before training, from the datasets of the last run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import training_world as world

from vlmflow import cli
from vlmflow.models.store import dump_ref
from vlmflow.recipe import dump

STAGE = {
    "data": [{"dataset": "seed", "text": "conversations", "weight": 1.5}],
    "mixture": {"text_share": {"start": 1.0, "end": 0.5, "warmup": 0.5}, "group": "modality"},
    "failure_limit": 0.02,
}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with two runs: a new one that was stopped at once, and an older one with data and a model."""
    state = tmp_path_factory.mktemp("state")
    root = state / "store"
    ctx = world.context(root, world.recipe(**STAGE))
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a thing"}]
    samples = [
        world.sample(i, images=i % 2, conversations=[{"from": "human", "value": "<image>" * (i % 2) + "hi"}, turns[1]])
        for i in range(29)
    ]
    samples.append(world.sample(29, images=0, conversations=turns * 12))
    samples.append(world.sample(30, images=0, conversations=turns[:1]))
    made = world.dataset(root, samples)
    for name in ("20260101-000000-aa", "20260202-000000-bb"):
        (state / "runs" / name).mkdir(parents=True)
        (state / "runs" / name / "recipe.yaml").write_text(dump(ctx.recipe))
    artifacts = state / "runs" / "20260101-000000-aa" / "artifacts" / "points-1"
    for step in ("pull", "initial"):
        (artifacts / step).mkdir(parents=True)
    (artifacts / "pull" / "data").write_text(made.model_dump_json())
    dump_ref(world.initial(ctx), artifacts / "initial" / "model")
    (state / "recipe.yaml").write_text(dump(ctx.recipe))
    return state


@pytest.fixture(autouse=True)
def environment(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMFLOW_ROOT", str(state / "store"))
    monkeypatch.setenv("VLMFLOW_SCRATCH", str(state / "scratch"))


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "data", *arguments])
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


def test_numbers_for_programs(state: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = str(state / "recipe.yaml")
    arguments = [recipe, "--state-dir", str(state), "--processes", "2", "-o", "json"]
    code, out, err = call(capsys, *arguments)
    assert code == 0, err
    (numbers,) = json.loads(out)["stages"].values()
    assert numbers["samples"] == 30 and numbers["failed"] == 1 and numbers["shown"] >= 45
    assert numbers["split"] >= 2 and numbers["dropped"] == 0
    assert numbers["padding"] == 0 < numbers["padding_of"]["buckets"] <= numbers["padding_of"]["batches"] < 1
    assert numbers["processes"] == 2 and 1 <= numbers["imbalance"] <= 2
    shares = [row["text_share"] for row in numbers["over_time"]]
    assert shares[0] == 1.0 and shares[-1] < 0.8
    assert [row["shown"] for row in numbers["ingredients"]] == [numbers["shown"]]
    assert numbers["reasons"][0]["example"] == "k030" and numbers["above_failure_limit"] is True
    assert json.loads(call(capsys, *arguments)[1])["stages"]["sft"]["digest"] == numbers["digest"]
    changed = json.loads(call(capsys, recipe, "seed=6", *arguments[1:])[1])
    assert changed["stages"]["sft"]["digest"] != numbers["digest"]


def test_text_and_page_for_people(state: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    code, out, err = call(capsys, str(state / "recipe.yaml"), "--state-dir", str(state), "--page", str(page))
    assert code == 0, err
    for part in ("fill", "padding    0.0%", "imbalance", "text share", "passes: text", "1 x ", "WARNING", str(page)):
        assert part in out
    assert "always wait" not in out
    idle = call(capsys, str(state / "recipe.yaml"), "--state-dir", str(state), "--page", str(page), "--processes", "5")
    assert "a step has 2 packs, so 3 of 5 processes always wait" in idle[1]
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "packs by tokens" in text and "k030" in text
    assert "share of text-only samples over the steps" in text and "<script" not in text


def test_data_that_is_not_there_is_named_with_the_command_to_run(
    state: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    recipe = str(state / "recipe.yaml")
    code, out, err = call(capsys, recipe, "--state-dir", str(tmp_path))
    assert (code, out) == (2, "")
    assert "nothing is known of seed, initial model" in err and f"`vlmflow run {recipe}`" in err
    assert not list(tmp_path.iterdir()), "nothing was started for it"
    code, _, err = call(capsys, recipe, "--state-dir", str(state), "--data", "sead=x")
    assert code == 2 and "one of ['seed']" in err
    code, _, err = call(capsys, recipe, "align", "--state-dir", str(state))
    assert code == 2 and "stage 'align' is not in the recipe" in err


def test_data_and_model_may_be_given(state: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    old: Any = state / "runs" / "20260101-000000-aa" / "artifacts" / "points-1"
    given = ["--data", f"seed={old / 'pull' / 'data'}", "--model", str(old / "initial" / "model")]
    code, out, err = call(capsys, str(state / "recipe.yaml"), "--state-dir", str(tmp_path), *given, "-o", "json")
    assert code == 0, err
    assert json.loads(out)["page"] == str(tmp_path / "plans" / "tiny.html")
