"""The kill benchmark in small: one SIGKILL in every step that needs no model files, then the same bytes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import curation_kill

from vlmflow import storage


def test_every_step_ends_as_if_it_had_not_been_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # put back afterwards
    steps = [
        name for name in curation_kill.STEPS if name != "ocr"
    ]  # its models take longer to load than all the others
    found = curation_kill.compare(steps, kills=1, seed=5, state=tmp_path, rows=48, say=lambda line: None)
    assert {name: result["problems"] for name, result in found.items()} == {name: [] for name in found}
    assert {"pull", "caption", "fuse", "perplexity", "keep"} <= found.keys()
    assert all(result["kills"] == 1 and result["objects"] > 8 for result in found.values())


def test_differences_are_found():
    calm = {"a": "1", "b": "2", "c": "3"}
    assert curation_kill.differences(calm, calm) == []
    assert curation_kill.differences(calm, {"a": "1", "b": "9", "d": "4"}) == [
        "c is lost",
        "d is left over",
        "b differs",
    ]


@pytest.mark.parametrize("broken", ["partial", "left over"])
def test_a_step_that_leaves_a_cut_object_is_caught(tmp_path, broken):
    driver = object.__new__(curation_kill.Driver)
    driver.place = tmp_path
    name = "shards/a.tar" if broken == "partial" else "shards/b.tar"
    storage.write_bytes(str(tmp_path / "root" / name), b"cut")
    storage.write_bytes(str(tmp_path / "root" / "journal/x/0.jsonl"), b"may stand there until the step ends")
    (tmp_path / "root/shards/.a.tar.1234.tmp").write_bytes(b"on its way")
    assert driver._partial({"shards/a.tar": "the hash of the whole one"}) == [f"{name} is {broken}"]
