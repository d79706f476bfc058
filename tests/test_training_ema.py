"""The moving average of the weights: its formula, and what is published. Through checkpoints and ZeRO: test_training_zero3."""

from __future__ import annotations

from typing import Any

import pytest
from training_jobs import Jobs, raw

from vlmflow.training.ema import Ema, decay_at

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")


def test_decay_rises_to_the_one_asked_for() -> None:
    assert [decay_at(t, 0.9) for t in (0, 1, 79, 80, 10_000)] == [1 / 10, 2 / 11, 80 / 89, 0.9, 0.9]


def test_average_follows_the_formula_step_by_step() -> None:
    """Against the closed form: a weighted sum of all weights there ever were."""
    weights = torch.zeros(3)
    ema = Ema(0.7, {"w": weights})
    seen = [weights.clone().double()]
    for step in range(40):
        weights.copy_(torch.sin(torch.arange(3.0) + step))
        ema.update()
        seen.append(weights.clone().double())
    keeps = [min(0.7, (1 + t) / (10 + t)) for t in range(40)]
    shares = [1.0] + [1 - keep for keep in keeps]
    expected = torch.zeros(3, dtype=torch.double)
    for number, value in enumerate(seen):
        share = shares[number]
        for keep in keeps[number:]:
            share *= keep
        expected += share * value
    assert ema.taken == 40
    assert torch.allclose(ema.averages["w"].double(), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same stage with and without an average; the weights of every step of the one with it."""
    from vlmflow.training import engine as ds

    world = Jobs(tmp_path_factory.mktemp("ema"))
    jobs = {}
    jobs["plain"], jobs["one"] = world.make("plain"), world.make("one", ema=0.6)
    world.trainer(jobs["plain"]).run()
    alone = world.trainer(jobs["one"])
    weights = [ds.capture(alone.engine)[0]]
    one_step = alone._step

    def noted(*arguments: Any) -> Any:
        result = one_step(*arguments)
        weights.append(ds.capture(alone.engine)[0])
        return result

    alone._step = noted
    alone.run()
    return {"jobs": jobs, "weights": weights, "engine": alone.engine}


def test_published_is_the_average(trained: dict[str, Any]) -> None:
    """A plain loop over the weights of every step gives what one process published; frozen tensors are as they were."""
    first, *later = trained["weights"]
    average = {name: value.clone() for name, value in first.items()}
    for step, weights in enumerate(later):
        keep = min(0.6, (1 + step) / (10 + step))
        average = {n: keep * average[n] + (1 - keep) * weights[n] for n in average}
    published, last = raw(trained["jobs"]["one"]), later[-1]
    assert max(float((published[n] - average[n]).abs().max()) for n in average) < 1e-6
    assert max(float((published[n] - last[n]).abs().max()) for n in average) > 1e-4
    plain = raw(trained["jobs"]["plain"])
    assert max(float((plain[n] - last[n]).abs().max()) for n in average) == 0.0, "averaging changes no step"


def test_a_skipped_step_is_not_averaged(trained: dict[str, Any]) -> None:
    """Neither one that is held back nor one whose gradient is not finite."""
    from vlmflow.training import engine as ds

    engine = trained["engine"]
    before = ds.capture(engine)
    for held, value in ((True, 1.0), (False, float("nan"))):
        loss = sum(p.sum() for p in ds.trainable(engine).values()) * value
        ds.backward(engine, loss)
        ds.step(engine, held=held)
    assert engine.ema.taken == 5
    for old, new in zip(before, ds.capture(engine), strict=True):
        assert all(torch.equal(old[n], new[n]) for n in old)
