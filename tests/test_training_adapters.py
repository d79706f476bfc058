"""LoRA and DoRA: what they attach to, that they train nothing else, and that what is published computes the same."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models_tiny
import pytest
import training_world as world

from vlmflow.errors import ModelError, RecipeError
from vlmflow.models.initial import save
from vlmflow.models.store import ModelLineage, publish
from vlmflow.recipe.optimizer import AdapterSpec
from vlmflow.training import run as training
from vlmflow.training.job import Job
from vlmflow.training.launch import launch

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("deepspeed")

from vlmflow.training import adapters  # noqa: E402

STAGES = (0, 1, 2, 3)
DORA = {"kind": "dora", "rank": 4, "alpha": 8.0}
MIXED = [
    {"modules": "projector", "lr": 0.01},
    {"modules": "re:vision_tower\\..*layer_norm1", "lr": 0.003},
    {"modules": "language", "lr": 0.02, "adapter": DORA},
    {"modules": "vision", "last": 1, "lr": 0.004, "adapter": {"kind": "lora", "rank": 2, "dropout": 0.1}},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("adapters")
    folder = root / "initial"
    save(models_tiny.build(), models_tiny.tokenizer(), folder)
    init = publish(world.context(root, world.recipe()), folder, "initial", ModelLineage(step="initial"), "initial")
    data = world.dataset(root, [world.sample(i, images=i % 4 != 1) for i in range(20)])
    place = SimpleNamespace(root=root, init=init, data=data)
    place.job = make_job(place, "whole", train=MIXED)
    place.trainer = trainer(place.job)
    place.trainer.run()
    return place


def make_job(place: Any, name: str, **stage: Any) -> Job:
    ctx = world.context(place.root / name, world.recipe(**stage))
    spec = training.stage_of(ctx.recipe, "sft")
    job = training._job(ctx, name, name, spec, list(spec.data), place.init, {"seed": place.data})
    job = job.model_copy(update={"tracking": {}})
    (Path(job.work) / "job.json").write_text(job.model_dump_json())
    return job


def trainer(job: Job, stop: threading.Event | None = None) -> Any:
    from vlmflow.training.trainer import Trainer

    return Trainer(job, rendezvous=f"file://{job.work}/meeting", stop=stop)


def weights_of(job: Job) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(job.out / "model.safetensors")


def test_published_model_is_plain_and_only_named_parts_moved(place: Any) -> None:
    from safetensors.torch import load_file

    before, after = load_file(place.job.model_folder() / "model.safetensors"), weights_of(place.job)
    assert set(before) == set(after)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    for name in before:
        linear = name.endswith("_proj.weight")
        vision = "vision_tower.encoder.layers.1." in name and name.endswith(
            ("_proj.weight", "fc1.weight", "fc2.weight")
        )
        plain = "projector" in name or ("vision_tower." in name and "layer_norm1" in name)
        assert (name in changed) == (("language_model" in name and linear) or vision or plain), name


def test_merged_model_computes_what_the_trained_one_did(place: Any) -> None:
    """Logits of the published folder, loaded without peft's layers, against the engine's own module."""
    from vlmflow.models import load_model

    plain, _ = load_model(place.job.out, dtype=torch.float32)
    assert not any("lora" in n for n, _ in plain.named_modules())
    batch = models_tiny.pack(models_tiny.samples(plain.config))
    batch.pop("labels")
    trained = place.trainer.engine.module.eval()
    with torch.no_grad():
        expected, found = trained(**batch).logits, plain(**batch).logits
    assert expected.std() > 0.01
    assert (expected - found).abs().max().item() < 1e-5


def test_trained_merged_exported_and_reloaded_are_equal(place: Any, tmp_path: Path) -> None:
    """The export, read by an interpreter without vlmflow and peft's layers, says what the trained folder says."""
    from vlmflow.export import folder, smoke

    folder.build(place.job.out, tmp_path / "export", "card", 1 << 30)
    question = smoke.Question([models_tiny.picture(1, 60)], "describe")
    outcome = smoke.compare(place.job.out, tmp_path / "export", [question], 4, tmp_path)
    assert outcome.max_logit_difference <= 1e-5 and outcome.same_text == 1 and outcome.logits > 0


def test_table_shows_adapters_with_counts(place: Any) -> None:
    from vlmflow.training.setup import prepare

    made = prepare(place.job, torch.device("cpu"))
    rows = {(r.module, r.note.split(",")[0]): r for r in made.table.rows}
    dora = rows["language", "dora of rank 4"]
    sizes = {n: p.numel() for n, p in made.engine.module.named_parameters() if "language_model" in n and ".lora_" in n}
    assert (dora.parameters, dora.tensors, dora.trainable, dora.lr) == (sum(sizes.values()), 3 * 14, True, 0.02)
    assert "on 14 linear layers" in dora.note and "not adapted: 1 Embedding" in dora.note
    assert not rows["language", "under adapters"].trainable
    assert "in the last 1 layers" in rows["vision", "lora of rank 2"].note
    trains = {n for n, p in made.engine.module.named_parameters() if p.requires_grad}
    assert trains == set(made.table.rule_of)
    assert made.table.trainable == sum(p.numel() for p in made.engine.module.parameters() if p.requires_grad)
    assert "dora of rank 4" in made.table.as_text()


def test_stopped_and_resumed_adapters_are_the_same_bits(place: Any) -> None:
    from vlmflow.training.trainer import Preempted

    job = make_job(place, "stopped", train=MIXED)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Preempted):
        trainer(job, stop).run()
    trainer(job).run()
    expected, found = weights_of(place.job), weights_of(job)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


@pytest.fixture(scope="module")
def ranks(place: Any) -> dict[str, Job]:
    """The same training by one process (``one``) and by two, with everything of ``memory`` that keeps the result."""
    memory = {"recompute": ["vision", "vision.ocr", "language"], "loss_rows": 16}
    rules = [{**rule, "adapter": {**rule["adapter"], "dropout": 0.0}} if "adapter" in rule else rule for rule in MIXED]
    stage = {"train": rules, "packs": 2, "max_steps": 4}
    jobs = {f"zero{n}": make_job(place, f"ranks{n}", processes=2, zero=n, memory=memory, **stage) for n in STAGES}
    jobs["bf16"] = make_job(place, "ranksbf16", processes=2, zero=2, dtype="bf16", memory=memory, **stage)
    launch([Path(job.work) / "job.json" for job in jobs.values()], 2, 1, lambda event: None)
    jobs["one"] = make_job(place, "one", **stage)
    trainer(jobs["one"]).run()
    return jobs


@pytest.mark.parametrize("zero", STAGES)
def test_two_processes_equal_one(ranks: dict[str, Job], zero: int) -> None:
    expected, found = weights_of(ranks["one"]), weights_of(ranks[f"zero{zero}"])
    assert expected.keys() == found.keys()
    worst = max((expected[n] - found[n]).abs().max().item() for n in expected)
    assert worst < 1e-5, f"weights differ by {worst}"


def test_bf16_merges_master_weights(ranks: dict[str, Job]) -> None:
    """Published in bf16, and a rounding of bf16 (2^-8) away from fp32's result where the training is alike."""
    from safetensors.torch import load_file

    start = load_file(ranks["one"].model_folder() / "model.safetensors")
    expected, found = weights_of(ranks["one"]), weights_of(ranks["bf16"])
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    adapted = [n for n in expected if "language_model" in n and n.endswith("_proj.weight")]
    for name in adapted:
        moved, apart = (expected[name] - start[name]).norm(), (expected[name] - found[name].float()).norm()
        assert moved > 0 and apart < 0.5 * moved, f"{name}: moved {moved}, apart {apart}"


def test_start_depends_on_seed_and_name_only() -> None:
    from torch import nn

    def start(seed: int, noise: int, names: tuple[str, ...] = ("a.weight", "b.weight")) -> dict[str, Any]:
        torch.manual_seed(7)
        model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})
        torch.manual_seed(noise)
        adapters.attach(model, dict.fromkeys(names, AdapterSpec(kind="dora", rank=2)), seed)
        return {n: p.detach() for n, p in model.named_parameters()}

    one, two, other = start(1, 1), start(1, 2, ("b.weight", "a.weight")), start(3, 1)
    assert all(torch.equal(one[n], two[n]) for n in one)
    first = "a.lora_A.default.weight"
    assert not torch.equal(one[first], other[first]) and not torch.equal(one[first], one["b.lora_A.default.weight"])
    bound = 8**-0.5
    assert one[first].abs().max() <= bound and one[first].abs().max() > bound / 2


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_adapters_change_nothing_and_merge_agrees_with_peft(kind: str, dtype: Any) -> None:
    from torch import nn

    torch.manual_seed(0)
    spec = AdapterSpec(kind=kind, rank=3, alpha=6.0)
    plain = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8, bias=False)).to(dtype)
    weights = {n: p.detach().clone() for n, p in plain.state_dict().items()}
    x = torch.randn(5, 16, dtype=dtype)
    before = plain(x)
    layers = {"0.weight": spec, "1.weight": spec}
    adapters.attach(plain, layers, 1)
    assert torch.equal(plain(x), before)
    untrained = adapters.merge(plain.state_dict(), layers)
    assert set(untrained) == set(weights) and all(torch.equal(untrained[n], weights[n]) for n in weights)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    after = plain(x)
    assert (after - before).abs().max() > 0.05
    made = adapters.merge(plain.state_dict(), layers)
    adapters.detach(plain, layers)
    assert set(plain.state_dict()) == set(weights)
    plain.load_state_dict(made)
    assert (plain(x) - after).abs().max() < (1e-6 if dtype == torch.float32 else 0.03)


def refused(*rules: dict[str, Any]) -> str:
    from vlmflow.recipe.optimizer import TrainRule
    from vlmflow.training.optimizer import Rule, make_table

    model, family = models_tiny.build(), models_tiny.FAMILY
    specs = [TrainRule(**r) for r in rules]
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    with pytest.raises(RecipeError) as caught:
        made = [Rule(r.modules, r.lr, r.last, adapter=r.adapter) for r in specs]
        make_table(sizes, made, family.roles, family.unused, family.layers, adapters.adaptable(model))
    return str(caught.value)


def test_refuses_what_cannot_work() -> None:
    lora: dict[str, Any] = {"adapter": {"rank": 2}, "lr": 0.01}
    said = refused({"modules": "re:vision_tower\\.embeddings", **lora})
    assert "no weight of a linear layer" in said and "1 Conv2d" in said and "1 Embedding" in said
    said = refused({"modules": "re:lm_head", **lora})
    assert "same tensor as model.language_model.embed_tokens.weight" in said
    assert "matches none" in refused({"modules": "re:nothing", **lora})
    twice = refused({"modules": "language", **lora}, {"modules": "re:q_proj\\.weight", "lr": 0.1, "adapter": {"rank": 4}},
                    {"modules": "vision", "lr": 0.1}, {"modules": "vision", **lora})  # fmt: skip
    assert "train[3]" in twice and "earlier rule" in twice
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})
    with torch.no_grad():
        model["a"].weight[2] = 0
    with pytest.raises(ModelError, match="row of zeros"):
        adapters.attach(model, {"a.weight": AdapterSpec(kind="dora", rank=2)}, 0)


def test_output_head_is_adapted_only_by_name_and_attention_blocks_of_torch_never() -> None:
    model = models_tiny.build(tie=False)
    found = adapters.adaptable(model)
    names = [n for n, _ in model.named_parameters()]
    language = [n for n in names if n.startswith(("model.language_model", "lm_head"))]
    assert "lm_head.weight" not in found.choose(0, "language", language)
    assert "1 output head" in found.left_out("language", language)
    assert found.choose(0, "re:lm_head", ["lm_head.weight"]) == ["lm_head.weight"]
    block = torch.nn.ModuleDict({"pool": torch.nn.MultiheadAttention(8, 2), "mlp": torch.nn.Linear(8, 8)})
    assert adapters.adaptable(block).weights == {"mlp.weight"}


def test_planning_counts_adapters_without_weights() -> None:
    """On the meta device the same table and a cost between that of a frozen and of a trained language model."""
    from vlmflow.training import shape

    def stage(*rules: dict[str, Any]) -> Any:
        return training.stage_of(world.recipe(train=list(rules)), "sft")

    config, family = models_tiny.build().config, models_tiny.FAMILY
    lora = {"modules": "language", "lr": 0.01, "adapter": {"kind": "dora", "rank": 2}}
    table = shape.apply_rules(shape.blank(config), family, stage(lora))
    assert {r.note.split(",")[0] for r in table.rows} >= {"dora of rank 2", "under adapters"}
    projector = {"modules": "projector", "lr": 0.01}
    costs = [
        shape.stage_cost(config, family, stage(*rules)).cost(100, 1000, 2)
        for rules in ([projector], [projector, lora], [projector, {"modules": "language", "lr": 0.01}])
    ]
    assert costs == sorted(costs) and len(set(costs)) == 3


def test_a_preference_stage_trains_adapters_from_its_reference(tmp_path: Path) -> None:
    """The first loss is log 2: neither attached adapters nor their dropout move the start; memory options change nothing."""
    import math

    import preference_world as preferences

    there = preferences.make_place(tmp_path)
    rules = [{"modules": "language", "lr": 0.01, "adapter": {**DORA, "dropout": 0.1}}]
    stage = {"train": rules, "max_steps": 2, "epochs": 2}
    jobs = [
        preferences.make_job(there, name, **stage, **changed)
        for name, changed in {"plain": {}, "thrifty": {"memory": {"loss_rows": 16, "recompute": ["language"]}}}.items()
    ]
    for job in jobs:
        preferences.train(job)
    plain, thrifty = (preferences.log_of(job) for job in jobs)
    assert plain[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and plain[1]["loss"] < 0.69
    assert [r["loss"] for r in thrifty] == pytest.approx([r["loss"] for r in plain], abs=1e-6)
