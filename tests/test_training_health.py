"""A step that is not healthy does not touch the model, on any rank, under any ZeRO stage, and says which samples it had."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import training_world as world
from health_rank import poison

from vlmflow import storage
from vlmflow.errors import ModelError, StepFailed
from vlmflow.models.store import ModelLineage, publish
from vlmflow.recipe.stage import HealthSpec
from vlmflow.training import health
from vlmflow.training import run as training
from vlmflow.training.health import ENOUGH, WINDOW, Health
from vlmflow.training.job import Job

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")


def judge(*losses: float, **spec: Any) -> Health:
    made = Health(HealthSpec(**spec))
    for loss in losses:
        made.healthy(loss)
    return made


def bad(made: Health, loss: float = 1.0, norm: float = 1.0) -> dict[str, Any]:
    problem = made.of_loss(loss) or made.of_norm(norm) or "odd"
    return made.unhealthy(7, problem, loss, norm, torch.tensor([loss]), ["k1", "k2"])


def test_a_spike_is_a_multiple_of_the_running_median() -> None:
    assert judge(*[1.0] * WINDOW).of_loss(100.0) == "", "not watched unless asked for"
    made = judge(*[1.0] * (ENOUGH - 1), spike=3.0)
    assert made.of_loss(100.0) == "", "too few losses to know what is usual"
    made.healthy(1.0)
    assert made.of_loss(3.0) == ""
    assert "3.01 times 1, the median of the last 16 healthy steps (limit 3)" in made.of_loss(3.01)
    made = judge(*[9.0] * WINDOW, *[1.0] * (WINDOW // 2 + 1), spike=2.0)
    assert made.of_loss(2.5), "what lies further back than the window is forgotten"
    assert judge(*[9.0] * WINDOW, *[1.0] * (WINDOW // 2 - 1), spike=2.0).of_loss(2.5) == ""


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stops_or_is_skipped_as_told(loss: float) -> None:
    assert judge().of_loss(loss) and Health.of_norm(loss) and not Health.of_norm(1.0)
    with pytest.raises(StepFailed, match=r"step 7: the loss is .*health.not_finite is stop.*rank 0.*: k1, k2"):
        bad(judge(), loss)
    skipping = judge(not_finite="skip", skips=2)
    assert "step 7 skipped (1 of 2)" in bad(skipping, loss)["skipped"]
    assert list(bad(skipping, norm=loss)["samples"].values()) == [["k1", "k2"]]
    with pytest.raises(StepFailed, match=r"3 steps were skipped and health\.skips allows 2"):
        bad(skipping, loss)


def test_spikes_have_a_policy_of_their_own() -> None:
    assert bad(judge(on_spike="skip", not_finite="stop"))["skipped"]
    with pytest.raises(StepFailed, match=r"health\.on_spike is stop"):
        bad(judge(on_spike="stop", not_finite="skip"))


def test_memory_survives_a_checkpoint_bit_by_bit() -> None:
    made = judge(*[0.1 * i for i in range(100)], spike=2.0, not_finite="skip")
    bad(made, math.nan)
    again = Health(made.spec, json.loads(json.dumps(made.state())))
    assert list(again.losses) == list(made.losses) and len(again.losses) == WINDOW
    assert again.skipped == 1


def test_keys_are_bounded_when_ranks_exchange_them() -> None:
    for keys in ([], ["a", "größe"], [f"k{i}" for i in range(40)], ["x" * 1500] * 5, ["x" * 5000]):
        data = health.pack_keys(keys)
        assert len(data) == health.KEY_BYTES
        found = health.unpack_keys(data)
        shown = [k for k in found if k in keys]
        assert shown == keys[: len(shown)] and len(shown) <= health.KEYS
        assert found == keys if len(shown) == len(keys) else found[-1] == f"and {len(keys) - len(shown)} more"


def test_many_ranks_are_bounded_and_the_culprit_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmflow.training import collective

    monkeypatch.setattr(collective, "gather", lambda row, ranks: row[None].expand(ranks, -1))
    losses = torch.ones(30)
    losses[17] = math.nan
    samples = health._samples(losses, ["k"])
    assert next(iter(samples)) == "rank 17 (its loss is not finite)" and "and 22 more ranks" in samples
    assert len(samples) == health.RANKS + 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("health")
    init = world.initial(world.context(root, world.recipe()))
    return SimpleNamespace(root=root, init=init, data=world.dataset(root, [world.sample(i) for i in range(24)]))


def make_job(place: Any, name: str, **stage: Any) -> Job:
    ctx = world.context(place.root / name, world.recipe(**stage))
    spec = training.stage_of(ctx.recipe, "sft")
    job = training._job(ctx, name, name, spec, list(spec.data), place.init, {"seed": place.data})
    job = job.model_copy(update={"tracking": {}})
    (Path(job.work) / "job.json").write_text(job.model_dump_json())
    return job


def trainer(job: Job, poisoned: dict[int, Any], stop: threading.Event | None = None) -> Any:
    from vlmflow.training.trainer import Trainer

    made = Trainer(job, rendezvous=f"file://{job.work}/meeting", stop=stop)
    poison(made, poisoned)
    return made


def weights_of(job: Job) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(job.out / "model.safetensors")


def log_of(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in job.log.read_text().splitlines()]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


ENGINES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(("zero", "dtype"), ENGINES)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_leaves_no_trace(place: Any, zero: int, dtype: str, what: str) -> None:
    """Weights and moments are those before it, the optimizer counts it not, and no gradient is left for the next."""
    from vlmflow.training import engine as ds
    from vlmflow.training.engine_state import base_optimizer

    job = make_job(place, f"{what}{zero}{dtype}", zero=zero, dtype=dtype, health={"not_finite": "skip"}, max_steps=3)
    made = trainer(job, {1: (what, 0)})
    seen: list[Any] = []
    keys: dict[int, list[str]] = {}
    step = made._step

    def watched(number: int, micros: list[Any]) -> Any:
        keys[number] = [key for micro in micros for key in micro.keys]
        result = step(number, micros)
        seen.append(ds.capture(made.engine))
        return result

    made._step = watched
    made.run()
    (first, m1), (second, m2), (third, m3) = seen
    assert same(first, second) and same(m1, m2)
    assert not same(second, third) and all(torch.isfinite(t).all() for t in [*third.values(), *m3.values()])
    assert {float(s["step"]) for s in base_optimizer(made.engine).state.values()} == {2.0}
    log = log_of(job)
    assert [r["step"] for r in log if "skipped" in r] == [1]
    assert log[1]["samples"] and log[1]["loss" if what == "loss" else "grad_norm"] is None
    assert next(iter(log[1]["samples"].values())) == keys[1]


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_run_that_skipped_resumes_bit_by_bit(place: Any, zero: int) -> None:
    """AdamW's own count of steps is behind the step number, and what is a spike depends on the losses before."""
    poisoned = {1: ("loss", 0), 18: (50.0, 0), 21: (50.0, 0)}
    stage = {
        "zero": zero,
        "health": {"not_finite": "skip", "spike": 5.0},
        "packs": 1,
        "epochs": 3,
        "checkpoint": {"every": 20},
    }
    whole = make_job(place, f"whole{zero}", **stage)
    trainer(whole, poisoned).run()
    assert [r["step"] for r in log_of(whole) if "skipped" in r] == [1, 18, 21]
    cut = make_job(place, f"cut{zero}", **stage)

    class Cut(Exception):
        pass

    made = trainer(cut, poisoned)
    step = made._step

    def until(number: int, micros: list[Any]) -> Any:
        if number == 22:
            raise Cut
        return step(number, micros)

    made._step = until
    with pytest.raises(Cut):
        made.run()
    trainer(cut, poisoned).run()
    assert same(weights_of(cut), weights_of(whole))
    plain = ("loss", "grad_norm", "skipped", "step")
    assert [[r.get(n) for n in plain] for r in log_of(cut)] == [[r.get(n) for n in plain] for r in log_of(whole)]


def test_a_bad_step_stops_before_anything_changed(place: Any) -> None:
    from vlmflow.training import engine as ds

    made = trainer(make_job(place, "stops"), {0: ("gradient", 0)})
    before = ds.capture(made.engine)[0]
    with pytest.raises(StepFailed, match=r"step 0: the gradient norm is .*k0\d\d"):
        made.run()
    assert same(before, ds.capture(made.engine)[0])


def test_two_ranks_decide_together(place: Any) -> None:
    """One rank's NaN is skipped by both, which go on together; at the limit both stop and name both ranks' samples."""
    stage = {"processes": 2, "health": {"not_finite": "skip", "skips": 2}, "packs": 2, "epochs": 3}
    skip = [make_job(place, f"two{zero}", zero=zero, **stage) for zero in (0, 1, 2, 3)]
    stop = make_job(place, "limit", **stage)
    jobs: list[Any] = [[f"{job.work}/job.json", {1: ["loss", 1], 2: ["gradient", 0]}] for job in skip]
    jobs.append([f"{stop.work}/job.json", {step: ["loss", 1] for step in range(4)}])
    for code, said in ranks(jobs, place.root / "meeting"):
        assert code == StepFailed.exit_code, said
        assert "3 steps were skipped and health.skips allows 2" in said
        assert "rank 1 (its loss is not finite): k0" in said and "rank 0: k0" in said, said
    for job in skip:
        skipped = [r for r in log_of(job) if "skipped" in r]
        assert [r["step"] for r in skipped] == [1, 2]
        assert list(skipped[0]["samples"]) == ["rank 1 (its loss is not finite)", "rank 0"]
        assert all(skipped[0]["samples"].values()) and job.out.exists()
    expected = weights_of(skip[0])
    for job in skip[1:]:
        assert all(torch.allclose(t, expected[n], atol=1e-5) for n, t in weights_of(job).items())


def ranks(jobs: list[Any], meeting: Path) -> list[tuple[int, str]]:
    """(exit code, output) of two ranks that train the jobs."""
    from vlmflow.training.launch import Node, rank_environment

    script = str(Path(__file__).with_name("health_rank.py"))
    processes = []
    for rank in (0, 1):
        env = rank_environment(rank, Node(2), str(meeting), 1)
        env.pop("VLMFLOW_LAUNCHER")
        command = [sys.executable, script, str(rank), "2", str(meeting), json.dumps(jobs)]
        out = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, text=True))
    return [(p.returncode, said) for p in processes for said in [p.communicate(timeout=300)[0]]]


def test_a_weight_that_is_not_a_number_is_named_before_training(place: Any) -> None:
    from safetensors.torch import load_file, save_file

    for number, (value, zero) in enumerate(((math.nan, 0), (math.inf, 3))):
        folder = place.root / f"bad{number}"
        shutil.copytree(storage.local_path(place.init.uri), folder, ignore=shutil.ignore_patterns("model.json"))
        tensors = load_file(folder / "model.safetensors")
        name = sorted(n for n in tensors if "vision" in n and tensors[n].dim() == 2)[0]  # a frozen one
        tensors[name][1, 2] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        ctx = world.context(place.root / f"weight{number}", world.recipe())
        init = publish(ctx, folder, "bad", ModelLineage(step="initial"), f"bad{number}")
        job = make_job(SimpleNamespace(**vars(place) | {"init": init}), f"weight{number}", zero=zero)
        with pytest.raises(ModelError, match="not finite") as error:
            trainer(job, {})
        assert name.split(".", 2)[-1] in str(error.value) and not os.path.exists(job.log)
