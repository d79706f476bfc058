"""The frozen/trainable table and the schedule."""

from __future__ import annotations

import math

import pytest

from vlmflow.errors import RecipeError
from vlmflow.training.optimizer import Rule, make_table, parameter_groups
from vlmflow.training.schedule import named_rates, rate

ROLES = {"vision": [r"vision\."], "vision.ocr": [r"vision_ocr\."], "projector": [r"proj\."], "language": [r"lm\."]}
SIZES = {
    **{f"vision.layers.{i}.w": 10 for i in range(4)},
    "vision.embed.w": 5,
    "vision_ocr.layers.0.w": 10,
    "proj.w": 7,
    "proj.bias": 1,
    "lm.layers.0.w": 20,
    "lm.head.w": 3,
}
LAYERS = {"vision": r"vision\.layers\.(\d+)\."}.get


def table(*rules: Rule, unused: tuple[str, ...] = ()):
    return make_table(SIZES, rules, ROLES, unused, LAYERS)


def test_first_matching_rule_wins_and_the_rest_is_frozen() -> None:
    made = table(Rule("re:proj\\.bias$", 1.0), Rule("projector", 2.0))
    assert made.rule_of == {"proj.bias": 0, "proj.w": 1}
    assert made.trainable == 8
    assert {r.module for r in made.rows if not r.trainable} == {"vision", "vision.ocr", "language"}
    text = made.as_text()
    assert "projector" in text and "frozen" in text and made.as_json()["total"] == sum(SIZES.values())


def test_last_layers_skip_those_that_are_never_used() -> None:
    made = table(Rule("vision", 1.0, last=2), unused=(r"vision\.layers\.3\.",))
    assert sorted(made.rule_of) == ["vision.layers.1.w", "vision.layers.2.w"]
    assert any("never used" in r.note and not r.trainable for r in made.rows)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("visoin", 1.0), r"matches none of 10 parameters.*projector"),
        (Rule("re:nothing", 1.0), "matches none"),
        (Rule("vision", 1.0, last=9), "has 4 layers"),
        (Rule("projector", 1.0, last=1), "no numbered layers"),
        (Rule("projector", 1.0, layer_decay=0.9), r"train\[0\].layer_decay is 0.9.*'projector' has no numbered layers"),
    ],
)
def test_refuses_what_cannot_be_meant(rule: Rule, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        table(rule)


def test_refuses_a_rule_that_an_earlier_one_covers_or_that_gets_no_gradient() -> None:
    with pytest.raises(RecipeError, match="earlier rule"):
        table(Rule("projector", 1.0), Rule("re:proj", 1.0))
    with pytest.raises(RecipeError, match="none of them ever gets a gradient"):
        table(Rule("projector", 1.0), unused=(r"proj\.",))


def test_groups_have_no_decay_on_norms_and_biases() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict(
        {"proj": torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3)), "lm": torch.nn.Linear(3, 3)}
    )
    rules = [Rule("projector", 0.5, weight_decay=0.3)]
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    made = make_table(sizes, rules, {"projector": [r"proj\."]})
    groups, labels = parameter_groups(model, made, rules, weight_decay=0.1)
    decays = {label: (len(g["params"]), g["weight_decay"]) for g, label in zip(groups, labels, strict=True)}
    assert decays == {"projector (no decay)": (3, 0.0), "projector": (1, 0.3)}
    assert [p.requires_grad for p in model["lm"].parameters()] == [False, False]


def test_schedule_is_a_pure_function_of_the_step() -> None:
    assert [rate(s, 10, "cosine", 0.2) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert rate(6, 10, "cosine", 0.2) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert rate(9, 10, "linear", 0.0, final=0.1) == pytest.approx(0.1 + 0.9 * 0.1)
    assert {rate(s, 10, "constant", 0.0) for s in range(10)} == {1.0}
    assert all(rate(s, 10, name, 0.03) > 0 for s in range(10) for name in ("cosine", "linear", "constant"))
    with pytest.raises(RecipeError, match="cosine"):
        rate(0, 10, "cosin", 0.0)


def layered(*rules: Rule, unused: tuple[str, ...] = ()):
    """A tower whose model order is embedding, four layers, final norm."""
    sizes = {"vision.embed.w": 5, **{f"vision.layers.{i}.w": 10 for i in range(4)}, "vision.norm.w": 2, "proj.w": 7}
    return make_table(sizes, rules, ROLES, unused, LAYERS)


def test_layer_decay_counts_the_layers_above() -> None:
    rates = layered(Rule("vision", 1.0, layer_decay=0.5), Rule("projector", 3.0)).rates
    assert rates == {
        "vision.embed.w": 0.5**4,
        "vision.layers.0.w": 0.5**3,
        "vision.layers.1.w": 0.5**2,
        "vision.layers.2.w": 0.5,
        "vision.layers.3.w": 1.0,
        "vision.norm.w": 1.0,
        "proj.w": 3.0,
    }


def test_layer_decay_counts_only_layers_that_are_used_but_also_frozen_ones() -> None:
    made = layered(Rule("vision", 1.0, last=2, layer_decay=0.5), unused=(r"vision\.layers\.3\.",))
    assert made.rates == {"vision.layers.1.w": 0.5, "vision.layers.2.w": 1.0}
    made = layered(Rule("re:layers.[02]", 1.0, layer_decay=0.5))
    assert made.rates == {"vision.layers.0.w": 0.125, "vision.layers.2.w": 0.5}


def test_layer_decay_shows_a_range_in_the_table_and_in_the_log() -> None:
    torch = pytest.importorskip("torch")
    made = layered(Rule("vision", 0.2, layer_decay=0.5), Rule("projector", 3.0))
    shown = {row.module: (row.lowest, row.lr) for row in made.rows}
    assert shown == {"vision": (0.0125, 0.2), "projector": (None, 3.0)}
    assert "0.0125..0.2" in made.as_text()

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))})
    rules = [Rule("tower", 1.0, layer_decay=0.5)]
    table = make_table(
        {n: p.numel() for n, p in model.named_parameters()},
        rules,
        {"tower": [r"layers"]},
        (),
        {"tower": r"layers\.(\d)"}.get,
    )
    groups, labels = parameter_groups(model, table, rules, weight_decay=0.1)
    of = {id(p): group for group in groups for p in group["params"]}
    assert [of[id(layer.weight)]["peak"] for layer in model["layers"]] == [0.25, 0.5, 1.0]
    assert [of[id(layer.bias)]["weight_decay"] for layer in model["layers"]] == [0.0] * 3
    assert named_rates(labels, [group["lr"] for group in groups]) == {
        "tower": 1.0,
        "tower (no decay)": 1.0,
        "tower (lowest)": 0.25,
        "tower (no decay) (lowest)": 0.25,
    }
