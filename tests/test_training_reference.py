"""The preference stage in the loop: its reference is measured once, from weights that never moved, and resume is exact."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import training_world as world
from preference_world import log_of, make_job, make_place, pairs_sample, same, stored, train, trainer

from vlmflow import storage
from vlmflow.errors import StepFailed
from vlmflow.training import reference

torch = pytest.importorskip("torch")
pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, pairs, and the weights of an uninterrupted training of two epochs."""
    place = make_place(tmp_path_factory.mktemp("preferences"))
    place.job = make_job(place, "whole", epochs=2)
    place.weights = train(place.job)
    return place


def measured(made: Any) -> Any:
    made._measure_reference()
    return made.reference


def test_preferences_are_learned_from_a_margin_of_zero(place: Any) -> None:
    log = log_of(place.job)
    first, last = log[0], log[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-6)
    assert [first[n] for n in ("margin", "reward_chosen", "reward_rejected")] == pytest.approx([0, 0, 0], abs=1e-5)
    assert last["loss"] < 0.3 and last["margin"] > 1 and last["accuracy"] == 1.0
    for record in log:
        assert record["margin"] == pytest.approx(record["reward_chosen"] - record["reward_rejected"], abs=2e-6)


def test_a_pair_is_one_item_of_two_segments_side_by_side(place: Any) -> None:
    made = trainer(make_job(place, "pairs"))
    loader = made._loader(made.plan)
    plan = made.plan
    assert len(plan.items) == 24 and sum(plan.items_in(step) for step in range(plan.steps)) == 24
    for pack in range(len(plan.pack_start) - 1):
        batch, items = loader.micro(pack).batch, plan.items_of(pack)
        borders, dummy = batch["cu_seq_lens_q"], int(plan.pack_tiles[pack] == 0)
        assert len(borders) - 1 == 2 * len(items) + dummy
        shown = batch.get("tile_index", np.zeros(dummy, dtype=int))
        assert len(batch["pixel_values"]) == sum(item.tiles for item in items) + dummy
        assert (np.bincount(shown) == (1 if dummy else 2)).all(), "each tile is shown in both answers and encoded once"
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        for number, item in enumerate(items):
            a, b, c = borders[2 * number : 2 * number + 3]
            assert c - a == item.tokens
            prompt = int((labels[a:b] != -100).argmax())
            assert (ids[a : a + prompt] == ids[b : b + prompt]).all() and (ids[a + prompt : b] != -100).all()
            said = [made.tokenizer.decode(part[part != -100]) for part in (labels[a:b], labels[b:c])]
            assert said[0].startswith("yes") and said[1].startswith("no")
            assert all(text.endswith("<|im_end|>") for text in said)
    loader.close()


def test_reference_is_the_initial_model_on_each_pair_alone(place: Any) -> None:
    from vlmflow.models.loss import packed_logprobs
    from vlmflow.training.batch import to_torch

    made = trainer(make_job(place, "alone", epochs=2))
    known = measured(made)
    loader = made._loader(made.plan)
    for pack in range(len(made.plan.pack_start) - 1):
        for number, item in enumerate(made.plan.items_of(pack)):
            loader.plan = SimpleNamespace(items_of=lambda _, i=item: [i], shards=made.plan.shards)
            with torch.no_grad():
                found, _ = packed_logprobs(made.engine.module.eval(), to_torch(loader.micro(0).batch))
            assert known.of(pack)[number] == pytest.approx(found[:2].numpy(), rel=1e-5)
            loader.plan = made.plan
    loader.close()


def test_packs_and_accumulation_do_not_matter(place: Any) -> None:
    from vlmflow.training import engine

    still = {
        "train": [{"modules": m, "lr": 1e-12} for m in ("projector", "language")],
        "optimizer": {"clip": 1e9},
        "objective": {"kind": "dpo", "sft_weight": 0.2, "label_smoothing": 0.1},
    }
    many = trainer(make_job(place, "many", **still, budget={"tokens": 300, "tiles": 8}, packs=64))
    one = trainer(make_job(place, "one", **still, budget={"tokens": 8192, "tiles": 256}, packs=1))
    many.run()
    one.run()
    assert many.plan.steps == one.plan.steps == 1
    assert len(many.plan.pack_tokens) >= 4 and len(one.plan.pack_tokens) == 1
    (_, several), (_, single) = engine.capture(many.engine), engine.capture(one.engine)
    for name, value in single.items():
        assert torch.allclose(several[name], value, rtol=1e-4, atol=1e-8), name
    a, b = log_of(many.job)[0], log_of(one.job)[0]
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and b["grad_norm"] > 0.01
    for name in ("loss", "margin", "nll_chosen"):
        assert a[name] == pytest.approx(b[name], rel=1e-5, abs=2e-6), name


def test_stopped_and_resumed_without_its_reference_is_bit_exact(place: Any) -> None:
    """What is gone is measured again before the checkpoint is put back, not from the weights that have moved."""
    from vlmflow.training.trainer import Preempted

    job = make_job(place, "stopped", epochs=2)
    stop = threading.Event()
    made = trainer(job, stop)
    measured(made)
    stop.set()
    with pytest.raises(Preempted):
        made.run()
    before = stored(job)
    assert before and len(log_of(job)) == 1
    for item in storage.list_uris(job.references):
        storage.delete(item.uri)
    assert same(train(job), place.weights)
    assert stored(job) == before
    assert [r["loss"] for r in log_of(job)] == [r["loss"] for r in log_of(place.job)]


def test_told_to_end_in_the_pass_it_keeps_the_parts_it_has(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmflow.training.trainer import Preempted

    monkeypatch.setattr(reference, "PART", 1)
    write, stop = reference._write, threading.Event()

    def written(uri: str, part: int, values: Any) -> None:
        write(uri, part, values)
        if part == 1:
            stop.set()

    monkeypatch.setattr(reference, "_write", written)
    job = make_job(place, "told", epochs=2)
    with pytest.raises(Preempted):
        trainer(job, stop).run()
    assert len(stored(job)) == 2 and not job.log.exists()
    stop.clear()
    assert same(train(job), place.weights)


def test_a_pair_is_measured_once_for_each_tile_limit(place: Any) -> None:
    phases = {"tiles": [{"until": 0.5, "max_tiles": 1}]}
    plan = trainer(make_job(place, "phases", epochs=4, mixture=phases)).plan
    once, where = reference.shown_once(plan)
    names = ["shard", "row", "first", "max_tiles", "tokens", "tiles"]
    assert (once.items[where][names] == plan.items[names]).all()
    assert set(plan.items["max_tiles"].tolist()) == {1, 2}
    assert len(once.items) == len(set(plan.items[names].tolist())) < len(plan.items)
    assert once.pack_start[-1] == len(once.items) and (np.diff(once.pack_start) > 0).all()


def test_killed_in_the_pass_it_goes_on_at_the_first_missing_part(
    place: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(reference, "PART", 1)
    whole = trainer(make_job(place, "parts", epochs=3))
    expected = measured(whole).values
    files = stored(whole.job)
    once, place_of = reference.shown_once(whole.plan)
    assert len(files) == once.steps >= 3 and len(once.pack_start) < len(whole.plan.pack_start), "each pair once"
    assert len(place_of) == len(whole.plan.items) and place_of.max() < len(once.items)

    cut = trainer(make_job(place, "parts-cut", epochs=3))
    asked: list[int] = []

    def count(part: int, *rest: Any) -> Any:
        asked.append(part)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return compute(part, *rest)

    compute = reference._compute
    monkeypatch.setattr(reference, "_compute", count)
    with pytest.raises(KeyboardInterrupt):
        measured(cut)
    assert cut.engine.training and len(stored(cut.job)) == 2
    (first, *_) = sorted(i.uri for i in storage.list_uris(cut.job.references))
    assert np.array_equal(measured(cut).values, expected)
    assert asked[2:] == [2, *range(2, once.steps)] and stored(cut.job) == files
    storage.write_bytes(first, storage.read_bytes(first)[:-5])  # damaged: measured again, and all after it
    asked[:] = [-1] * 10
    assert np.array_equal(measured(cut).values, expected) and asked[10:] == list(range(once.steps))
    asked[:] = [-1] * 10
    capsys.readouterr()
    assert np.array_equal(measured(cut).values, expected) and asked[10:] == []
    packs = len(once.pack_start) - 1
    assert f"{len(once.items)} pairs in {packs} packs, {packs} of them found in the store" in capsys.readouterr().out


def test_what_decides_the_reference_names_it(place: Any) -> None:
    def address(name: str, **stage: Any) -> str:
        job = make_job(place, name, **stage)
        from vlmflow.training import plan_file

        return reference.address(job, plan_file.load(job.plan, job.cache)).rsplit("/", 1)[-1]

    base = address("base")
    rates = [{"modules": "language", "lr": 0.5}]
    assert address("swept", objective={"kind": "dpo", "beta": 0.01, "sft_weight": 1}, train=rates) == base
    assert len({base, address("bf16", dtype="bf16"), address("short", budget={"tokens": 300, "tiles": 8})}) == 3


def test_noise_adapters_and_recomputation_do_not_touch_the_reference(place: Any) -> None:
    """It is the initial model as it stands, whatever is put around it for training."""
    plain, dressed = (
        make_job(place, "plain"),
        make_job(
            place,
            "dressed",
            noise={"alpha": 5.0},
            memory={"recompute": ["language"], "loss_rows": 16},
            train=[{"modules": "language", "lr": 0.003, "adapter": {"kind": "lora", "rank": 2}}],
        ),
    )
    found = [measured(trainer(job)).values for job in (plain, dressed)]
    assert list(stored(plain)) == list(stored(dressed))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    weights, log = train(dressed), log_of(dressed)
    assert log[0]["loss"] != log_of(place.job)[0]["loss"], "the policy has noise, the reference has none"
    assert not any("lora" in name for name in weights)


def test_an_initial_model_that_is_not_finite_is_refused_with_its_samples(place: Any) -> None:
    made = trainer(make_job(place, "nan"))
    with torch.no_grad():
        made.engine.module.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(StepFailed, match=r"reference: a log-probability .* not finite.*k0\d\d"):
        made.run()
    assert not stored(made.job)


BAD = {
    "chosen answer of a preference is empty": {"chosen": " "},
    "are the same": {"chosen": "no", "rejected": "no"},
    "ends with a turn of the assistant": {"conversations": [{"from": "gpt", "value": "<image>hm"}]},
    "2 <image> markers in its conversation but 1 images": {
        "conversations": [{"from": "human", "value": "<image><image>?"}]
    },
}


def test_bad_pairs_are_counted_with_their_reason_up_to_a_limit(place: Any) -> None:
    samples = [pairs_sample(i) for i in range(20)]
    for number, changes in enumerate(BAD.values()):
        samples[number] = pairs_sample(number, **changes)
    samples[10] = pairs_sample(10, rejected="long " * 200)
    samples[11] = world.sample(11)
    data = world.dataset(place.root, samples, name="bad")
    made = trainer(make_job(place, "bad", data, failure_limit=0.5))
    counts, report = made.plan.examples, made.plan.report
    reasons = {r["reason"]: r for r in counts["reasons"]}
    assert counts["failed"] == 5 and report["dropped"] == 1 and report["shown"] == 14
    for words in [*BAD, "has no preferences"]:
        (found,) = [r for r in reasons.values() if words in r["reason"]]
        assert found["count"] == 1 and found["example"].startswith("k0")
    assert "budget 400" in report["dropped_reasons"][0]["reason"]
    with pytest.raises(StepFailed, match=r"cannot be trained on, more than failure_limit 10\.0%"):
        make_job(place, "limit", data, failure_limit=0.1)


def test_a_pair_with_more_tiles_than_the_budget_is_dropped(place: Any) -> None:
    """Both answers show the same tiles, so a pair needs those of its images once."""
    data = world.dataset(place.root, [pairs_sample(i, images=4 if i == 2 else 1) for i in range(6)], name="big")
    made = trainer(make_job(place, "big", data, failure_limit=0.5, budget={"tokens": 4096, "tiles": 6}))
    assert made.plan.report["dropped"] == 1
    assert "8 tiles, budget 6" in made.plan.report["dropped_reasons"][0]["reason"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_equal_packs_give_equal_bits(place: Any, dtype: str) -> None:
    """The policy of the first step is the reference, in either dtype."""
    job = make_job(place, f"first-{dtype}", dtype=dtype, max_steps=2)
    train(job)
    first = log_of(job)[0]
    assert first["loss"] == round(math.log(2), 6)
    assert [first[n] for n in ("margin", "accuracy", "reward_chosen", "reward_rejected")] == [0, 0, 0, 0]
