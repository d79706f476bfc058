"""The worker under the real torchrun, which knows nothing of our launcher: same job, same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import training_world as world

from vlmflow import storage
from vlmflow.errors import DataError
from vlmflow.models.store import ModelRef, find
from vlmflow.training import failure, launchers, plan_file
from vlmflow.training import run as training
from vlmflow.training.launchers import LaunchRequest

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
STAGE = {"processes": 2, "epochs": 2, "max_steps": 6}


class UnderTorchrun:
    """A launcher in the place of ours; keeps the last run's exit code and output."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.code, self.output = scratch, 0, ""

    def __call__(self, request: LaunchRequest, on_event: object) -> None:
        assert request.job.startswith("file://")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "VLMFLOW_SCRATCH": str(self.scratch), "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(
            [*command, "-m", "vlmflow.training.worker", request.job],
            env={**env, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,  # ours watches it to end with its launcher; under torchrun it is closed at once
            capture_output=True,
            text=True,
            timeout=200,
        )
        self.code, self.output = done.returncode, done.stdout + done.stderr


def test_two_ranks_under_torchrun_equal_two_under_our_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = world.initial(world.context(tmp_path, world.recipe()))
    data = {"seed": world.dataset(tmp_path, [world.sample(i, images=i % 4 != 1) for i in range(24)])}

    def train(name: str, **stage: object) -> ModelRef:
        place = world.context(tmp_path / name, world.recipe(**{**STAGE, **stage}))
        place.root = f"file://{place.root}"
        return training.run(place, "sft", init, data)

    ours = train("ours")
    torchrun = UnderTorchrun(tmp_path / "node")
    monkeypatch.setitem(launchers.LAUNCHERS, "local", torchrun)
    theirs = train("torchrun")
    assert torchrun.code == 0, torchrun.output
    assert [(f.path, f.sha256) for f in theirs.files] == [(f.path, f.sha256) for f in ours.files]
    place = world.context(tmp_path / "torchrun", world.recipe())
    assert find(place, theirs.uri.rsplit("/", 1)[-1]) == theirs

    def look(request: LaunchRequest, on_event: object) -> None:
        storage.write_bytes(storage.join(request.folder, "plan", plan_file.MARKER), b"{cut")
        torchrun(request, on_event)
        raise failure.read(request.folder)[0]

    monkeypatch.setitem(launchers.LAUNCHERS, "local", look)
    with pytest.raises(
        DataError, match=r"plan\.json holds 4 bytes that are not JSON"
    ):  # left in the store by the ranks
        train("damaged")
    assert torchrun.code == 1
