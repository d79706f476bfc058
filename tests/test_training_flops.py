"""Counting rules against what torch counts while a tiny model trains (same matrices, to the last operation)."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests import models_tiny as tiny
from vlmflow.errors import RecipeError
from vlmflow.training import flops
from vlmflow.training.optimizer import Rule, make_table

RULES = {
    "everything": [Rule("vision", 1e-3), Rule("vision.ocr", 1e-3), Rule("projector", 1e-3), Rule("language", 1e-3)],
    "projector only": [Rule("projector", 1e-3)],
    "one vision tower": [Rule("vision.ocr", 1e-3)],
    "last vision layer and projector": [Rule("vision", 1e-3, last=1), Rule("projector", 1e-3)],
    "language above frozen towers": [Rule("language", 1e-3)],
    "last language layer": [Rule("language", 1e-3, last=1)],
    "a matrix inside": [Rule("re:layers.1.self_attn.o_proj", 1e-3)],
}


def _trained(model, rules):
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    table = make_table(sizes, rules, tiny.FAMILY.roles, tiny.FAMILY.unused, tiny.FAMILY.layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in table.rule_of)
    return set(table.rule_of)


def _batch(model):
    """One sample alone: its segment is the row, so eager attention computes the whole square."""
    part = tiny.samples(model.config)[3]
    batch = tiny.pack([part])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        batch.pop(name)
    tokens, tiles = len(part["ids"]), sum(len(t) for t in part["tiles"])
    return batch, tokens, tiles, int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_rules_count_what_torch_counts(name, tie):
    model = tiny.build(tie=tie, attention="eager").train()
    trains = _trained(model, RULES[name])
    batch, tokens, tiles, targets = _batch(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch, loss_only=True).loss.backward()
    parts = flops.count(model, tiny.FAMILY, trains, causal=1.0)
    expected = flops.cost_model(parts).cost(tokens, tokens**2, tiles, targets)
    assert expected == counter.get_total_flops()


def test_causal_attention_counts_half():
    model = tiny.build()
    full, half = (flops.cost_model(flops.count(model, tiny.FAMILY, [], causal=share)) for share in (1.0, 0.5))
    assert half.per_token_squared == full.per_token_squared / 2 > 0
    assert half.per_token == full.per_token


def test_rules_of_thumb():
    """2N frozen, 4N passed through, 6N trained, for the language model's matrices."""
    model = tiny.build(tie=False)
    layers = [p for n, p in model.named_parameters() if "language_model.layers" in n and p.ndim == 2]
    size = sum(p.numel() for p in layers)

    def per_token(rules):
        return flops.cost_model(flops.count(model, tiny.FAMILY, _trained(model, rules))).per_token

    assert per_token([Rule("re:lm_head", 1e-3)]) == 2 * size
    assert per_token([Rule("projector", 1e-3)]) == 4 * size
    assert per_token([Rule("projector", 1e-3), Rule("language", 1e-3)]) == 6 * size


class Adapted(torch.nn.Module):
    """LoRA by hand, with the names that peft gives."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base_layer = base
        self.lora_A = torch.nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("names", [["q_proj", "k_proj", "v_proj", "o_proj"], ["o_proj"], ["down_proj", "gate_proj"]])
@pytest.mark.parametrize("part", ["language_model", "vision_tower_ocr"])
def test_adapters_train_beside_frozen_matrices(part, names):
    model = tiny.build(attention="eager").train()
    layer = getattr(model.model, part)
    layer = layer.layers[1] if part == "language_model" else layer.encoder.layers[1]
    if part != "language_model":
        names = [{"o_proj": "out_proj", "down_proj": "fc2", "gate_proj": "fc1"}.get(n, n) for n in names]
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if name in names:
                setattr(parent, name, Adapted(child))
    trains = set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        trains |= {name} if "lora_" in name else set()
    assert len(trains) == 2 * len(names)
    batch, tokens, tiles, targets = _batch(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch, loss_only=True).loss.backward()
    parts = flops.count(model, tiny.FAMILY, trains, causal=1.0)
    assert flops.cost_model(parts).cost(tokens, tokens**2, tiles, targets) == counter.get_total_flops()


def test_recomputed_layers_are_counted_apart():
    model = tiny.build()
    parts = flops.count(model, tiny.FAMILY, _trained(model, RULES["last vision layer and projector"]))
    again = flops.recomputed(parts, ["vision", "language"])
    forward = flops.forward_cost(parts)
    assert again.per_token == forward.per_token  # a gradient passes through the whole language model
    assert 0 < again.per_tile < forward.per_tile  # only the vision tower's last layer is in the graph
    assert flops.recomputed(parts, []) == flops.CostModel()


def test_cost_takes_arrays():
    import numpy as np

    model = flops.CostModel(2.0, 0.5, 10.0, 3.0)
    costs = model.cost(np.array([4, 0]), np.array([16, 0]), np.array([1, 0]), np.array([2, 0]))
    assert costs.tolist() == [8 + 8 + 10 + 6, 0.0]


def test_peak_is_known_stated_or_none():
    assert flops.peak_flops("NVIDIA H200", {}) == 989.5e12
    assert flops.peak_flops("NVIDIA H100 PCIe", {}) == 756.5e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB", {}) == 312e12
    assert flops.peak_flops("NVIDIA H200 MIG 1g.18gb", {}) is None
    assert flops.peak_flops("cpu", {}) is None
    assert flops.peak_flops("cpu", {"VLMFLOW_PEAK_TFLOPS": "0.5"}) == 0.5e12
    with pytest.raises(RecipeError, match="VLMFLOW_PEAK_TFLOPS is 'fast'"):
        flops.peak_flops("cpu", {"VLMFLOW_PEAK_TFLOPS": "fast"})


def test_utilisation_is_a_share_of_a_known_peak_only(monkeypatch):
    from vlmflow.training import record

    device = torch.device("cpu")
    monkeypatch.delenv("VLMFLOW_PEAK_TFLOPS", raising=False)
    record._peak.cache_clear()
    assert record.utilisation(6e12, 2.0, device) == {"tflops": 3.0}
    monkeypatch.setenv("VLMFLOW_PEAK_TFLOPS", "12")
    record._peak.cache_clear()
    assert record.utilisation(6e12, 2.0, device) == {"tflops": 3.0, "mfu": 0.25}
    record._peak.cache_clear()
