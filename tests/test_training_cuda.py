"""What a rank does where there are GPUs, as far as that can be seen without one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vlmflow.errors import StepFailed

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

from vlmflow.training import engine  # noqa: E402


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A machine that seems to have two GPUs; what is done to them and to the process group, in order."""
    made: list[tuple[str, Any]] = []
    fake = SimpleNamespace(init_distributed=lambda **options: made.append(("join", options)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(("device", device)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(engine, "import_deepspeed", lambda: fake)
    return made


def test_a_rank_takes_the_gpu_of_its_place_before_it_meets_the_others(
    calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert engine.join("env://", 3, 4) == torch.device("cuda", 1)
    (first, device), (second, options) = calls
    assert (first, device, second) == ("device", torch.device("cuda", 1), "join")
    assert options["dist_backend"] == "nccl" and (options["rank"], options["world_size"]) == (3, 4)


def test_more_ranks_than_gpus_are_told_so_before_anything_is_done(
    calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(StepFailed, match=r"rank 2 of 4 is number 2 on its machine, which has 2 GPUs"):
        engine.join("env://", 2, 4)
    assert not calls
