"""torch.compile of the language model's layers: equal results, one compilation for all packs, and what it needs."""

from __future__ import annotations

from typing import Any

import models_tiny
import pytest
import training_world as world

from vlmflow.errors import RecipeError, StepFailed

torch = pytest.importorskip("torch")

from vlmflow.models.loss import packed_loss  # noqa: E402
from vlmflow.recipe.optimizer import AdapterSpec  # noqa: E402
from vlmflow.training import adapters, compiled  # noqa: E402
from vlmflow.training.recompute import recompute  # noqa: E402

CPU = torch.device("cpu")


def has_compiler() -> bool:
    try:
        compiled.check_compiler(CPU)
    except StepFailed:
        return False
    return True


def gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    model.zero_grad(set_to_none=True)
    loss, _ = packed_loss(model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: tuple[float, dict[str, Any]], expected: tuple[float, dict[str, Any]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and found[1].keys() == expected[1].keys()
    scale = max(g.abs().max().item() for g in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max().item() <= 1e-5 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")
        ),
    ],
)
def test_compiled_packed_equals_plain_separate_and_packs_share_the_compilation(backend: str) -> None:
    """Logits and gradients of packs of several lengths, with adapters and recomputation (eager) and without."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = models_tiny.build().train()
    if backend == "eager":
        adapters.attach(
            model, {n: AdapterSpec(rank=2) for n in adapters.adaptable(model).weights if "language" in n}, 0
        )
    parts = models_tiny.samples(model.config)
    packs = [models_tiny.pack(p) for p in (parts, parts[:3], parts[1:] * 2)]
    expected = [gradients(model, batch) for batch in packs]
    arguments = {k: v for k, v in packs[0].items() if k != "labels"}
    with torch.no_grad():
        logits = torch.cat([model(**_alone(part)).logits[0] for part in parts])
    assert compiled.compile_layers(model, models_tiny.FAMILY, CPU, backend) == 2
    if backend == "eager":
        recompute(model, models_tiny.FAMILY, ["language"])
    assert_equal(gradients(model, packs[0]), expected[0])
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 12
    for batch, one in zip(packs[1:], expected[1:], strict=True):
        assert_equal(gradients(model, batch), one)
    assert counters["stats"]["unique_graphs"] == graphs, "another length compiles nothing"
    with torch.no_grad():
        assert (model(**arguments).logits[0] - logits).abs().max().item() < 1e-5
    assert "graphs in" in compiled.cost()


def _alone(part: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in models_tiny.pack([part]).items() if k != "labels"}


def test_compile_with_zero_3_is_refused_with_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r"memory\.compile does not go with zero: 3"):
        world.recipe(zero=3, memory={"compile": True})
    world.recipe(zero=2, memory={"compile": True})


def test_without_a_compiler_it_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    model = models_tiny.build()
    with pytest.raises(StepFailed, match=r"memory\.compile: .* C\+\+ compiler .*apt-get install g\+\+"):
        compiled.compile_layers(model, models_tiny.FAMILY, CPU)
    assert all("forward" not in vars(layer) for layer in model.model.language_model.layers)
