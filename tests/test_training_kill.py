"""The kill benchmark in small: two processes, killed and stopped, learn bit by bit what undisturbed ones do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("deepspeed")
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import train_kill


def test_killed_and_stopped_is_undisturbed(tmp_path: Path) -> None:
    # Under this seed the kill waits from step 24 on: ten checkpoints follow, and a quick machine may write some of them unseen.
    arguments = ["--kills", "1", "--terms", "1", "--seed", "4", "--steps", "64", "--kinds", "during a write"]
    code = train_kill.main([*arguments, "--state", str(tmp_path / "state"), "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert code == 0, result["problems"]
    assert sorted(k["kind"] for k in result["kills"]) == ["SIGTERM to one rank", "during a write"]


def test_a_difference_is_seen(tmp_path: Path) -> None:
    """Checkpoints are judged by their own hashes, not by what the trainer says."""
    place = tmp_path / "checkpoints" / "key" / "step-00000004"
    place.mkdir(parents=True)
    from vlmflow.training import checkpoint

    base = (tmp_path / "checkpoints" / "key").as_uri()
    checkpoint.write(base, checkpoint.Snapshot(8, {}, {}, {"plan": "p"}, ""), tmp_path / "work")
    assert train_kill.lying(tmp_path.as_uri()) == ([8], [])
    (place / checkpoint.WEIGHTS).write_bytes(b"half")
    assert train_kill.lying(tmp_path.as_uri()) == ([8], [4])
    (tmp_path / "checkpoints" / "key" / "step-00000008" / checkpoint.LOG).write_text("other")
    assert train_kill.lying(tmp_path.as_uri()) == ([], [4, 8])
    kill = {"complete": [4], "partial": [8], "at_step": 9}

    class Said:
        def notices(self) -> list[str]:
            return ["resumed at step 8 of 9 (written by 2 processes)"]

        def done(self) -> int:
            return 8

    assert len(train_kill.resumption(Said(), kill)) == 2 and kill["redone"] == 5
