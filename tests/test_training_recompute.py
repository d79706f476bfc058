"""Recomputed activations: the same bits for less memory, also with dropout and noise, and only where asked."""

from __future__ import annotations

from typing import Any

import models_tiny
import pytest

from vlmflow.errors import RecipeError

torch = pytest.importorskip("torch")

from vlmflow.models.loss import packed_loss  # noqa: E402
from vlmflow.training.recompute import recompute  # noqa: E402


def gradients(model: Any, batch: dict[str, Any], seed: int = 1) -> dict[str, Any]:
    torch.manual_seed(seed)
    loss, _ = packed_loss(model, batch)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def held(model: Any, batch: dict[str, Any]) -> int:
    """Bytes that the graph of a forward pass keeps for the backward pass, parameters aside."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = packed_loss(model, batch)
    total = sum(kept.values())
    loss.backward()
    return total


@pytest.fixture
def model() -> Any:
    return models_tiny.build().train()


@pytest.fixture
def batch(model: Any) -> dict[str, Any]:
    return models_tiny.pack(models_tiny.samples(model.config))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_the_same_bits_and_less_is_kept(model: Any, batch: dict[str, Any], dropout: float) -> None:
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = dropout
    expected, before = gradients(model, batch), held(model, batch)
    model.zero_grad()
    roles = ["vision", "vision.ocr", "language"]
    assert recompute(model, models_tiny.FAMILY, roles) == []
    found = gradients(model, batch)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    assert held(model, batch) < before / 3


def test_only_the_named_role_recomputes(model: Any, batch: dict[str, Any]) -> None:
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith((".mlp", ".mlp.fc1")):
            module.register_forward_pre_hook(lambda *_, n=name: calls.append(n))
    recompute(model, models_tiny.FAMILY, ["vision"])
    gradients(model, batch)
    twice = {n for n in calls if calls.count(n) == 2}
    assert twice == {n for n in calls if ".vision_tower." in n} and twice
    calls.clear()
    model.eval()
    gradients(model, batch)
    with torch.no_grad():
        packed_loss(model.train(), batch)
    assert all(calls.count(n) == 2 for n in set(calls)), "one forward each: neither eval nor no_grad recomputes"


def test_frozen_role_is_said_and_runs_once(model: Any, batch: dict[str, Any]) -> None:
    calls: list[str] = []
    for part in ("model.vision_tower.", "model.language_model."):
        for name, parameter in model.named_parameters():
            if name.startswith(part):
                parameter.requires_grad_(False)
    layers = {"vision": model.model.vision_tower.encoder.layers[0], "language": model.model.language_model.layers[0]}
    for role, layer in layers.items():
        layer.mlp.register_forward_pre_hook(lambda *_, r=role: calls.append(r))
    notes = recompute(model, models_tiny.FAMILY, ["vision", "language"])
    assert len(notes) == 2 and "'vision' is frozen" in notes[0]
    gradients(model, batch)
    assert calls == ["vision", "language", "language"], "a gradient passes through the frozen language model only"


@pytest.mark.parametrize(("role", "message"), [("projector", "has no numbered layers"), ("visoin", "is not a role")])
def test_a_role_without_layers_is_refused(model: Any, role: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"memory.recompute: '{role}' {message}.*language, vision, vision.ocr"):
        recompute(model, models_tiny.FAMILY, [role])


def test_the_memory_forecast_rehearses_what_the_stage_recomputes() -> None:
    """Fewer bytes between forward and backward where a role recomputes, and a lower peak with few rows of logits."""
    import training_world as world

    from vlmflow.training import shape
    from vlmflow.training.run import stage_of
    from vlmflow.training.trace import rehearse

    config, train = models_tiny.build().config, [{"modules": "language", "lr": 0.01}]

    def rehearsed(**memory: Any) -> Any:
        stage = stage_of(world.recipe(train=train, memory=memory), "sft")
        model = shape.blank(config)
        shape.apply_rules(model, models_tiny.FAMILY, stage)
        return rehearse(model, 400, 4, 300)

    plain, again, rows = rehearsed(), rehearsed(recompute=["language"]), rehearsed(loss_rows=16)
    assert again.alive["language"] < plain.alive["language"] / 3
    assert again.alive["head"] == plain.alive["head"] > 4 * rows.alive["head"]
