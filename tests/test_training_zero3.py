"""ZeRO 3: partitioned parameters train, resume and are published as whole ones; checkpoints move between all stages."""

from __future__ import annotations

from typing import Any

import pytest
from training_jobs import Jobs, assert_equal, assert_same_bits, norms, raw, rules, train

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")

# An average of the weights is published, so what is compared has gone through all of the state.
SETTINGS: dict[str, Any] = {
    "checkpoint": {"every": 2, "keep": 1},
    "max_steps": 4,
    "ema": 0.6,
    "memory": {"loss_rows": 16, "recompute": ["vision", "language"]},
}
NEXT = {0: 3, 3: 1, 1: 2, 2: 0}  # a checkpoint written under one stage is continued under another


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Uninterrupted jobs, then jobs that begin with their checkpoint of step 2; ``seen`` = parameters in the end."""
    world = Jobs(tmp_path_factory.mktemp("zero3"))

    def make(name: str, processes: int = 2, **stage: Any) -> Any:
        return world.make(name, processes=processes, **SETTINGS, **stage)

    jobs = {f"whole-{zero}": make(f"whole-{zero}", zero=zero) for zero in range(4)}
    jobs["whole-bf16"] = make("whole-bf16", zero=3, dtype="bf16")
    frozen = {"train": rules("language"), "packs": 4}  # two micro-batches a rank, and four of one process
    jobs["frozen"] = make("frozen", zero=3, **frozen)
    jobs |= {f"noise-{zero}": make(f"noise-{zero}", zero=zero, noise={"alpha": 5.0}) for zero in (0, 3)}
    for zero in range(4):
        jobs[f"resumed-{zero}"] = make(f"resumed-{zero}", zero=zero, after=jobs[f"whole-{zero}"])
    jobs["resumed-bf16"] = make("resumed-bf16", zero=3, dtype="bf16", after=jobs["whole-bf16"])
    jobs |= {f"moved-{a}": make(f"moved-{a}", zero=b, after=jobs[f"whole-{a}"]) for a, b in NEXT.items()}
    notes = train(jobs.values())
    assert sum("resumed at step 2 of 4" in note for note in notes) == 5 + len(NEXT), notes
    alone = {f"alone-{zero}": make(f"alone-{zero}", 1, zero=zero, after=jobs["whole-3"]) for zero in (3, 0)}
    plain = torch.nn.functional.linear
    for name, job in alone.items():
        made = world.trainer(job)
        made.run()
        if name == "alone-3":
            seen = [(p.numel(), p.ds_persist, p.requires_grad) for p in made.engine.module.parameters()]
    assert torch.nn.functional.linear is plain, "what ZeRO 3 puts in its place is taken away by the next stage"
    for name, stage in {"one": {}, "one-frozen": frozen}.items():
        jobs[name] = make(name, 1, **stage)
        world.trainer(jobs[name]).run()
    return jobs | alone | {"seen": seen, "plan": made.plan}


def test_every_parameter_is_partitioned(trained: dict[str, Any]) -> None:
    """Between steps none is whole, small ones included, which DeepSpeed would keep."""
    assert {(size, persistent) for size, persistent, _ in trained["seen"]} == {(0, False)}
    assert {trains for _, _, trains in trained["seen"]} == {True}


def test_ranks_had_losses_of_different_numbers_of_chunks(trained: dict[str, Any]) -> None:
    """Were the head called once a chunk, ranks would gather its weights unequally often and ZeRO 3 would crash."""
    plan, rows = trained["plan"], SETTINGS["memory"]["loss_rows"]
    chunks = [
        [sum(-(-int(plan.pack_targets[p]) // rows) for p in packs if p is not None) for packs in plan.deal(step, 2)]
        for step in range(plan.steps)
    ]
    assert any(first != second for first, second in chunks), chunks


@pytest.mark.parametrize("zero", range(4))
def test_two_processes_equal_one(trained: dict[str, Any], zero: int) -> None:
    assert_equal(trained[f"whole-{zero}"], trained["one"])


def test_frozen_parameters_are_partitioned_too_and_micro_batches_add_up(trained: dict[str, Any]) -> None:
    assert_equal(trained["frozen"], trained["one-frozen"])


def test_noise_is_that_of_the_other_stages(trained: dict[str, Any]) -> None:
    assert_equal(trained["noise-3"], trained["noise-0"])
    assert norms(trained["noise-3"]) != pytest.approx(norms(trained["whole-3"]), rel=1e-3)


def test_bf16_follows_fp32(trained: dict[str, Any]) -> None:
    assert norms(trained["whole-bf16"]) == pytest.approx(norms(trained["one"]), rel=0.02)
    assert {tensor.dtype for tensor in raw(trained["whole-bf16"]).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [0, 1, 2, 3, "bf16"])
def test_resumed_has_the_bits_of_uninterrupted(trained: dict[str, Any], kind: Any) -> None:
    assert_same_bits(trained[f"resumed-{kind}"], trained[f"whole-{kind}"])


@pytest.mark.parametrize("zero", NEXT)
def test_a_checkpoint_moves_to_another_stage(trained: dict[str, Any], zero: int) -> None:
    assert_equal(trained[f"moved-{zero}"], trained["one"])


@pytest.mark.parametrize("zero", [0, 3])
def test_a_checkpoint_moves_to_another_number_of_processes(trained: dict[str, Any], zero: int) -> None:
    assert_equal(trained[f"alone-{zero}"], trained["one"])
