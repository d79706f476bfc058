"""The loop in one process: normalisation, resume, freezing, what stops it."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import training_world as world

from vlmflow import storage
from vlmflow.errors import StepFailed
from vlmflow.models.store import ModelRef, find
from vlmflow.training import checkpoint, launch, launchers
from vlmflow.training import run as training
from vlmflow.training.job import Job

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, a dataset and the weights of an uninterrupted training."""
    root = tmp_path_factory.mktemp("loop")
    init = world.initial(world.context(root, world.recipe()))
    data = world.dataset(root, [world.sample(i, images=i % 4 != 1) for i in range(24)])
    place = SimpleNamespace(root=root, init=init, data=data)
    place.job = make_job(place, "whole")
    place.weights = train(place.job)
    return place


def make_job(place: Any, name: str, **stage: Any) -> Job:
    ctx = world.context(place.root / name, world.recipe(**stage))
    spec = training.stage_of(ctx.recipe, "sft")
    job = training._job(ctx, name, name, spec, list(spec.data), place.init, {"seed": place.data})
    (Path(job.work) / "job.json").write_text(job.model_copy(update={"tracking": {}}).model_dump_json())
    return job.model_copy(update={"tracking": {}})


def trainer(job: Job, stop: threading.Event | None = None) -> Any:
    from vlmflow.training.trainer import Trainer

    return Trainer(job, rendezvous=f"file://{job.work}/meeting", stop=stop)


def weights_of(job: Job) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(job.out / "model.safetensors")


def train(job: Job) -> dict[str, Any]:
    trainer(job).run()
    return weights_of(job)


def log_of(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.log.read_text().splitlines()]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_trainable_parameters_change_and_frozen_ones_do_not(place: Any) -> None:
    from safetensors.torch import load_file

    before = load_file(place.job.model_folder() / "model.safetensors")
    changed = {n for n in before if not torch.equal(before[n], place.weights[n])}
    frozen = {n for n in before if "vision_tower" in n}
    assert changed == set(before) - frozen
    log = log_of(place.job)
    assert [r["step"] for r in log] == list(range(len(log)))
    assert log[-1]["loss"] < log[0]["loss"]
    assert set(log[0]["lr"]) == {"projector", "projector (no decay)", "language", "language (no decay)"}
    assert (place.job.out / "tokenizer.json").exists() and (place.job.out / "config.json").exists()


def test_four_packs_of_uneven_length_equal_one_large_pack(place: Any) -> None:
    """The gradient is that of the sum over targets, not of a mean of means."""
    from vlmflow.training import engine

    still = {
        "train": [{"modules": "projector", "lr": 1e-12}, {"modules": "language", "lr": 1e-12}],
        "optimizer": {"clip": 1e9},
    }
    many = trainer(make_job(place, "many", **still, budget={"tokens": 128, "tiles": 9}, packs=64))
    one = trainer(make_job(place, "one", **still, budget={"tokens": 4096, "tiles": 64}, packs=1))
    many.run()
    one.run()
    assert many.plan.steps == one.plan.steps == 1
    assert len(many.plan.pack_tokens) >= 4 and len(one.plan.pack_tokens) == 1
    assert many.plan.targets_of(0) == one.plan.targets_of(0)
    _, several = engine.capture(many.engine)
    _, single = engine.capture(one.engine)
    for name, value in single.items():
        assert torch.allclose(several[name], value, rtol=1e-4, atol=1e-8), name
    assert log_of(many.job)[0]["grad_norm"] == pytest.approx(log_of(one.job)[0]["grad_norm"], rel=1e-4)
    assert log_of(one.job)[0]["grad_norm"] > 0.01


def test_loss_is_nats_per_target_of_the_model_itself(place: Any) -> None:
    """The first logged loss equals cross-entropy of each sample computed alone."""
    made = trainer(make_job(place, "alone", train=[{"modules": "projector", "lr": 1e-12}]))
    micros = next(iter(_loader(made).steps()))[1]
    total = targets = 0.0
    for pack in made.plan.packs_of(0):
        for item in made.plan.items_of(pack):
            single = _loader(made)
            single.plan = SimpleNamespace(items_of=lambda _, i=item: [i], shards=made.plan.shards)
            batch = single.micro(0).batch
            from vlmflow.models.loss import packed_loss
            from vlmflow.training.batch import to_torch

            with torch.no_grad():
                value, count = packed_loss(made.engine.module, to_torch(batch))
            total, targets = total + float(value), targets + count
    assert targets == made.plan.targets_of(0)
    loss = made._step(0, micros).loss
    assert loss == pytest.approx(total / targets, rel=1e-4)


def _loader(made: Any) -> Any:
    from vlmflow.training.loader import Loader

    return Loader(made.plan, made.encoder, made.tile, made.family.positions, made.dummy, made.side, made.job.cache)


def test_stop_saves_and_resume_is_bit_exact(place: Any) -> None:
    from vlmflow.training.trainer import Preempted

    job = make_job(place, "stopped")
    stop = threading.Event()
    stop.set()
    with pytest.raises(Preempted):
        trainer(job, stop).run()
    assert len(log_of(job)) == 1
    assert same(train(job), place.weights)
    assert [r["step"] for r in log_of(job)] == [r["step"] for r in log_of(place.job)], "the log goes on where it was"


def test_cut_and_unfinished_checkpoints_are_passed_over(place: Any, capsys: pytest.CaptureFixture) -> None:
    job = make_job(place, "cut", checkpoint={"every": 1, "keep": 3})
    train(job)
    steps = sorted(checkpoint._steps(job.checkpoints))
    assert len(steps) == 3, "only the newest are kept"
    newest, middle, _ = (storage.join(job.checkpoints, f"step-{s:08d}") for s in reversed(steps))
    storage.delete(storage.join(newest, checkpoint.MARKER))
    path = storage.local_path(storage.join(middle, checkpoint.MOMENTS))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    assert same(train(job), place.weights)
    said = capsys.readouterr().out
    assert "not finished" in said and "cut or changed" in said and f"resumed at step {steps[0]}" in said


@pytest.mark.parametrize("stage", [{}, {"zero": 2}, {"zero": 3, "ema": 0.9}])
def test_a_captured_state_does_not_change_with_training(place: Any, stage: dict[str, Any]) -> None:
    """It is written by a thread while training goes on."""
    from vlmflow.training import engine

    made = trainer(make_job(place, f"captured{len(stage)}", max_steps=2, **stage))
    taken: list[Any] = []
    step = made._step

    def watched(number: int, micros: list[Any]) -> Any:
        result = step(number, micros)
        weights, moments = engine.capture(made.engine)
        taken.append(({**weights, **moments}, {n: t.clone() for n, t in {**weights, **moments}.items()}))
        return result

    made._step = watched
    made.run()
    assert same(*taken[0]) and not same(taken[0][0], taken[1][0])


def test_background_and_foreground_write_the_same_checkpoints(place: Any) -> None:
    """But for the times in the log; kept are the newest and every third."""
    stored = {}
    for background in (True, False):
        policy = {"every": 1, "keep": 1, "keep_every": 3, "background": background}
        job = make_job(place, f"background{background}", checkpoint=policy)
        assert same(train(job), place.weights)
        steps = len(log_of(job))
        assert sorted(checkpoint._steps(job.checkpoints)) == sorted({*range(3, steps, 3), steps - 1})
        assert all("checkpoint_wait" in record for record in log_of(job))
        names = {f"step-{steps - 1:08d}/{name}" for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS)}
        stored[background] = {name: storage.read_bytes(storage.join(job.checkpoints, name)) for name in names}
    assert stored[True] == stored[False]


def test_a_store_that_dies_does_not_end_a_training_that_has_a_checkpoint(
    place: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from vlmflow.errors import Unreachable
    from vlmflow.training import checkpoint_writer

    monkeypatch.setattr(checkpoint_writer, "PAUSE", 0.0)
    put, living = storage.put_file, [4]

    def dying(path: Any, uri: str) -> None:
        if living[0] == 0:
            raise Unreachable(f"{uri}: no store answers")
        living[0] -= 1
        put(path, uri)

    monkeypatch.setattr(storage, "put_file", dying)
    job = make_job(place, "dying", checkpoint={"every": 1})
    assert same(train(job), place.weights)
    said = capsys.readouterr().out
    assert "CHECKPOINT NOT WRITTEN at step 3" in said and "falls back to step 2" in said
    stop = threading.Event()
    stop.set()
    with pytest.raises(Unreachable):
        trainer(make_job(place, "dead"), stop).run()


def test_a_stop_does_not_outlast_its_grace(
    place: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A store that hangs when SIGTERM comes: the checkpoint before counts."""
    from vlmflow.training.trainer import Preempted

    monkeypatch.setenv("VLMFLOW_TRAIN_GRACE", "0.05")
    gate, put = threading.Event(), storage.put_file

    def hangs(path: Any, uri: str) -> None:
        if "step-00000001" not in uri:
            gate.wait(60)
        put(path, uri)

    monkeypatch.setattr(storage, "put_file", hangs)
    job, stop = make_job(place, "hangs", checkpoint={"every": 1, "keep": 9}), threading.Event()
    made = trainer(job, stop)
    step = made._step

    def until(number: int, micros: list[Any]) -> Any:
        if number == 1:  # the first checkpoint is complete, the second will hang
            assert made.saver.writer.ready(30)
            stop.set()
        return step(number, micros)

    made._step = until
    with pytest.raises(Preempted):
        made.run()
    said = capsys.readouterr().out
    assert "checkpoint of step 2 was not finished within" in said and "the newest complete one is step 1" in said
    assert [s for s, names in checkpoint._steps(job.checkpoints).items() if checkpoint.MARKER in names] == [1]
    thread = made.saver.writer._thread
    gate.set()
    thread.join(30)
    storage.delete(storage.join(job.checkpoints, "step-00000002", checkpoint.MARKER))  # as if the process had ended
    assert same(train(job), place.weights)
    assert "resumed at step 1 of" in capsys.readouterr().out


def test_what_may_change_on_resume_is_no_param_of_mlflow(place: Any) -> None:
    """MLflow refuses a param that changes."""
    tracking = [
        training._job(
            world.context(place.root / "tracked", world.recipe(**stage)), "sft", "k",
            world.recipe(**stage).stages["sft"], list(world.recipe().stages["sft"].data), place.init, {"seed": place.data},
        ).tracking
        for stage in ({}, {"processes": 2, "zero": 1, "checkpoint": {"every": 7}})
    ]  # fmt: skip
    assert tracking[0]["params"] == tracking[1]["params"] and "schedule" in tracking[0]["params"]["stage"]
    assert json.loads(tracking[1]["tags"]["vlmflow.execution.sft"])["processes"] == 2


def test_checkpoint_of_another_plan_is_refused(place: Any) -> None:
    from vlmflow.errors import CheckpointError

    job = make_job(place, "whole", packs=1)
    base = storage.join(str(place.root / "elsewhere"), "c")
    snapshot = checkpoint.Snapshot(3, {"a": torch.zeros(2)}, {"a.exp_avg": torch.zeros(2)}, {"plan": "x"}, "")
    checkpoint.write(base, snapshot, place.root / "w")
    with pytest.raises(CheckpointError, match="another position in the data"):
        trainer(job.model_copy(update={"checkpoints": base})).run()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_checkpoint_of_other_parameters_is_refused(place: Any, zero: int) -> None:
    from vlmflow.errors import CheckpointError
    from vlmflow.training import engine

    made = trainer(make_job(place, f"other{zero}", zero=zero))
    weights, moments = engine.capture(made.engine)
    name, value = next((n, t) for n, t in weights.items() if t.dim() == 1)
    with pytest.raises(CheckpointError, match="another stage or recipe"):
        engine.restore(made.engine, {n: t for n, t in weights.items() if n != name}, moments, 1)
    with pytest.raises(CheckpointError, match=r"has shape \(1,\), this model's"):  # it would be broadcast
        engine.restore(made.engine, weights | {name: value[:1]}, moments, 1)


def test_not_a_number_stops_with_the_samples(place: Any) -> None:
    made = trainer(make_job(place, "nan"))
    with torch.no_grad():
        made.engine.module.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(StepFailed, match=r"step 0: the loss is nan.*k0\d\d"):
        made.run()


def test_killed_rank_is_reported_and_the_rerun_gives_the_same_bits(place: Any) -> None:
    # written in the loop, so that the rank is still training when the event arrives
    job = make_job(place, "killed", checkpoint={"every": 3, "keep": 2, "background": False})

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            on_event.pid = event["pid"]  # type: ignore[attr-defined]
        if event["event"] == "checkpoint":
            os.kill(on_event.pid, signal.SIGKILL)  # type: ignore[attr-defined]

    with pytest.raises(StepFailed, match="SIGKILL"):
        launch.launch([Path(job.work) / "job.json"], 1, 1, on_event)
    assert not job.out.exists()
    assert same(train(job), place.weights)


def test_sigterm_then_the_step_again_publishes_the_same_model(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = world.context(place.root / "published", world.recipe())
    told = []

    def interrupted(request: launchers.LaunchRequest, on_event: Any) -> None:
        def event(e: dict[str, Any]) -> None:
            on_event(e)
            if e["event"] == "plan":
                told.append(e)
                os.kill(os.getpid(), signal.SIGTERM)

        launchers.launch(request, event)

    monkeypatch.setattr(training, "launch", interrupted)
    with pytest.raises(launch.TrainingPreempted) as stopped:
        training.run(ctx, "sft", place.init, {"seed": place.data})
    assert stopped.value.exit_code == 75 and told
    monkeypatch.setattr(training, "launch", launchers.launch)
    ref = training.run(ctx, "sft", place.init, {"seed": place.data})
    from safetensors.torch import load_file

    assert same(load_file(storage.local_path(storage.join(ref.uri, "model.safetensors"))), place.weights)
    assert ref.lineage.ancestor == place.init.weights_sha256 and ref.lineage.parents == [place.init.weights_sha256]
    assert len(storage.read_bytes(ref.lineage.log_uri).splitlines()) == len(log_of(place.job))
    checkpoints = storage.join(ctx.root, "checkpoints")
    assert storage.list_uris(checkpoints) == []
    stored = {i.uri.removeprefix(f"{ref.uri}/") for i in storage.list_uris(ref.uri)}
    assert stored == {"model.json", *(f.path for f in ref.files)}, (
        "a log in the model's folder would differ by candidate"
    )
    left_over = storage.join(checkpoints, ref.uri.rsplit("/", 1)[-1], "step-00000003", checkpoint.MARKER)
    storage.write_bytes(left_over, b"{}")  # killed between publishing and clearing

    def never(*_: Any) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(training, "launch", never)
    again: ModelRef = training.run(ctx, "sft", place.init, {"seed": place.data})
    assert storage.list_uris(checkpoints) == []
    assert again == ref == find(ctx, ref.uri.rsplit("/", 1)[-1])


def test_a_start_with_equal_weights_but_another_tokenizer_or_config_is_another_training(place: Any) -> None:
    """Random weights of one seed are equal under different tokenizers, tile limits and encoder weightings."""
    spec = training.stage_of(world.recipe(), "sft")

    def key(init: ModelRef) -> str:
        return training.train_digest(spec, list(spec.data), init, {"seed": place.data}, "points", 5)

    keys = {key(place.init)}
    for name in ("config.json", "tokenizer.json"):
        files = [f.model_copy(update={"sha256": "0" * 64}) if f.path == name else f for f in place.init.files]
        keys.add(key(place.init.model_copy(update={"files": files})))
    assert len(keys) == 3
    assert key(place.init.model_copy(update={"uri": "file:///elsewhere", "name": "other"})) in keys
