"""Which parameters a stage trains, and at which rate.

A stage is data: a list of ``{modules, last, lr, weight_decay, layer_decay}``. Here it meets a model's parameter names
through the family's role table. The result is a table that is printed and stored before anything is trained, because
most complaints about stage training are about parameters that were silently frozen or silently trained (spec:
training.md B.2 item 5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlmflow.errors import RecipeError
from vlmflow.training.adapters import now
from vlmflow.training.layer_decay import layers_above

if TYPE_CHECKING:
    import torch

    from vlmflow.recipe.optimizer import AdapterSpec
    from vlmflow.training.adapters import Adaptable

NO_DECAY = re.compile(r"(^|\.)bias$|norm|(^|\.)ln_\d|layrnorm|embed_positions|position_embedding|class_embedding")


@dataclass(frozen=True)
class Rule:
    """One entry of a stage's ``train`` list: which parameters, at which rate (per-rule weight decay or None)."""

    modules: str
    lr: float
    last: int | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    adapter: AdapterSpec | None = None


@dataclass
class Row:
    """One line of the table: parameters that share a role and a rule.

    ``lr`` is the highest peak rate among them; ``lowest`` the lowest, where layers have rates of their own.
    """

    module: str
    parameters: int
    tensors: int
    trainable: bool
    lr: float | None
    note: str = ""
    lowest: float | None = None

    @property
    def rate(self) -> str:
        """Its rate, or the range of its layers' rates."""
        if self.lr is None:
            return "-"
        return f"{self.lr:g}" if self.lowest is None else f"{self.lowest:.3g}..{self.lr:.3g}"


@dataclass
class Table:
    """Frozen and trainable parameters of a stage.

    Attributes:
        rows: what is printed.
        rule_of: parameter name -> index of the rule that trains it; names not in it are frozen.
        rates: parameter name -> its peak rate.
        notes: parameter name -> note of its row.
        adapters: weight -> adapter that trains in its place.
        beside: index of a rule with adapters -> what it matches that is no linear layer.
    """

    rows: list[Row]
    rule_of: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, AdapterSpec] = field(default_factory=dict)
    beside: dict[int, str] = field(default_factory=dict)

    @property
    def trainable(self) -> int:
        """Number of trainable parameters (scalars)."""
        return sum(row.parameters for row in self.rows if row.trainable)

    def as_json(self) -> dict[str, Any]:
        """The table as plain data."""
        total = sum(row.parameters for row in self.rows)
        return {"rows": [vars(row) for row in self.rows], "trainable": self.trainable, "total": total}

    def as_text(self) -> str:
        """The table for a terminal or a log."""
        head = ("module", "parameters", "tensors", "state", "lr", "")
        cells = [head] + [
            (
                r.module,
                f"{r.parameters:,}",
                str(r.tensors),
                "train" if r.trainable else "frozen",
                r.rate,
                r.note,
            )
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def make_table(
    sizes: Mapping[str, int],
    rules: Sequence[Rule],
    roles: Mapping[str, Sequence[str]],
    unused: Sequence[str] = (),
    layers: Any = None,
    adaptable: Adaptable | None = None,
) -> Table:
    """Match a stage's rules with a model's parameters; the first rule that matches a parameter wins.

    Args:
        sizes: parameter name -> number of scalars.
        roles: role name -> regexes of parameter names (``re.match``), from the family.
        unused: regexes of parameters that never get a gradient; always frozen (spec: systems.md A.0).
        layers: role -> regex whose first group is a layer number, for ``last``; None if the role has no layers.
        adaptable: what the adapters of rules can stand in for; None only if no rule has one.

    Raises:
        RecipeError: a rule that matches nothing (lists what exists) or nothing that it can adapt, or nothing left to train.
    """
    dead = {name for name in sizes if any(re.match(p, name) for p in unused)}
    rule_of: dict[str, int] = {}
    notes = dict.fromkeys(dead, "never used by the forward pass")
    adapters: dict[str, AdapterSpec] = {}
    beside: dict[int, str] = {}
    for index, rule in enumerate(rules):
        names = _matching(rule, sizes, roles)
        if rule.adapter is not None and adaptable is not None:
            adaptable.refuse_tied(index, rule.modules)
        if not names:
            raise RecipeError(
                f"train[{index}].modules '{rule.modules}' matches none of {len(sizes)} parameters; roles of this model: "
                f"{sorted(roles)}; or give 're:<regex>' on names such as {_examples(sizes)}"
            )
        alive = [n for n in names if n not in dead]
        if rule.last is not None:
            alive = _last_layers(rule, rule.last, index, alive, layers)
        if rule.adapter is not None and adaptable is not None and alive:
            beside[index] = adaptable.left_out(rule.modules, alive)
            alive = adaptable.choose(index, rule.modules, alive)
        fresh = [n for n in alive if n not in rule_of]
        if not fresh:
            why = "all of them are trained by an earlier rule" if alive else "none of them ever gets a gradient"
            raise RecipeError(
                f"train[{index}].modules '{rule.modules}' matches {len(names)} parameters but {why}; remove the rule"
            )
        rule_of.update(dict.fromkeys(fresh, index))
        if rule.adapter is not None:
            adapters.update(dict.fromkeys(fresh, rule.adapter))
        if rule.last is not None:
            notes.update(dict.fromkeys(fresh, f"last {rule.last} layers"))
    if not rule_of:
        raise RecipeError(
            "the stage trains nothing: its 'train' list is empty; name at least one module, e.g. projector"
        )
    rates = _rates(rules, {name: _role(name, roles) for name in sizes}, rule_of, layers, dead)
    return Table(_rows(sizes, rules, roles, rule_of, notes, rates), rule_of, rates, notes, adapters, beside)


def _role(name: str, roles: Mapping[str, Sequence[str]]) -> str:
    """The most specific role of a parameter: the longest role name that matches."""
    found = [role for role, patterns in roles.items() if any(re.match(p, name) for p in patterns)]
    return max(found, key=lambda role: (role.count("."), len(role)), default="other")


def _matching(rule: Rule, sizes: Mapping[str, int], roles: Mapping[str, Sequence[str]]) -> list[str]:
    if rule.modules.startswith("re:"):
        try:
            pattern = re.compile(rule.modules[3:])
        except re.error as error:
            raise RecipeError(f"'{rule.modules}' is not a regular expression: {error}") from error
        return [n for n in sizes if pattern.search(n)]
    patterns = roles.get(rule.modules, ())
    return [n for n in sizes if any(re.match(p, n) for p in patterns)]


def _examples(sizes: Mapping[str, int]) -> list[str]:
    return sorted({".".join(n.split(".")[:3]) for n in sizes})[:8]


def _last_layers(rule: Rule, last: int, index: int, names: list[str], layers: Any) -> list[str]:
    """Only the highest ``last`` layer numbers among the parameters that can be trained at all."""
    pattern = None if layers is None else layers(rule.modules)
    if pattern is None:
        raise RecipeError(
            f"train[{index}] asks for the last {last} layers of '{rule.modules}', which has no numbered layers"
        )
    number = {n: int(m.group(1)) for n in names if (m := re.search(pattern, n))}
    present = sorted(set(number.values()))
    if last > len(present):
        raise RecipeError(
            f"train[{index}] asks for the last {last} layers of '{rule.modules}', which has {len(present)} layers that "
            "can be trained; lower 'last' or remove it"
        )
    chosen = set(present[len(present) - last :])
    return [n for n in names if number.get(n) in chosen]


def _rates(
    rules: Sequence[Rule], role_of: Mapping[str, str], rule_of: Mapping[str, int], layers: Any, dead: set[str]
) -> dict[str, float]:
    """Peak rate of every trained parameter."""
    above = layers_above(role_of, layers, dead)
    for index, rule in enumerate(rules):
        if rule.layer_decay is not None and not any(n in above for n, r in rule_of.items() if r == index):
            raise RecipeError(
                f"train[{index}].layer_decay is {rule.layer_decay:g}, but '{rule.modules}' has no numbered layers, so there is "
                "nothing to lower the rate by; remove layer_decay from this rule"
            )
    rates = {}
    for name, index in rule_of.items():
        decay = rules[index].layer_decay
        rates[name] = rules[index].lr * (1.0 if decay is None else decay ** above.get(name, 0))
    return rates


def _rows(
    sizes: Mapping[str, int],
    rules: Sequence[Rule],
    roles: Mapping[str, Sequence[str]],
    rule_of: Mapping[str, int],
    notes: Mapping[str, str],
    rates: Mapping[str, float],
) -> list[Row]:
    groups: dict[tuple[str, int | None, str], list[str]] = {}
    for name in sizes:
        groups.setdefault((_role(name, roles), rule_of.get(name), notes.get(name, "")), []).append(name)
    rows = []
    for (role, rule, note), names in groups.items():
        peaks = sorted({rates[n] for n in names if n in rates})
        highest, lowest = (peaks[-1] if peaks else None), (peaks[0] if len(peaks) > 1 else None)
        rows.append(Row(role, sum(sizes[n] for n in names), len(names), rule is not None, highest, note, lowest))
    return rows


def with_adapters(
    table: Table,
    sizes: Mapping[str, int],
    rules: Sequence[Rule],
    roles: Mapping[str, Sequence[str]],
    made: Mapping[str, Sequence[str]],
) -> Table:
    """The table once adapters are attached: they train, the weights under them do not.

    Args:
        sizes: parameters of the adapted model.
        made: adapted weight -> its adapter's parameters (`adapters.attach`).
    """
    adapted = {weight: table.adapters[weight] for weight in made}
    rule_of, notes = {}, {now(name, adapted): note for name, note in table.notes.items()}
    rates: dict[str, float] = {}
    for name, index in table.rule_of.items():
        names = made.get(name, [now(name, adapted)])
        rule_of.update(dict.fromkeys(names, index))
        rates.update(dict.fromkeys(names, table.rates[name]))
    for weight, parts in made.items():
        index, spec = table.rule_of[weight], adapted[weight]
        layers = sum(table.rule_of[w] == index for w in made)
        last = f" in the last {rules[index].last} layers" if rules[index].last is not None else ""
        about = f"{spec.kind} of rank {spec.rank}, alpha {spec.alpha:g}, on {layers} linear layers{last}"
        beside = f"; not adapted: {table.beside[index]}" if table.beside.get(index) else ""
        notes.update(dict.fromkeys(parts, about + beside))
        notes[now(weight, adapted)] = "under adapters"
    return Table(_rows(sizes, rules, roles, rule_of, notes, rates), rule_of, rates, notes, adapted, table.beside)


def parameter_groups(
    model: torch.nn.Module, table: Table, rules: Sequence[Rule], weight_decay: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Set ``requires_grad`` by the table and return AdamW groups and one label a group.

    A rule gives up to two groups: matrices with weight decay; norms, biases and other vectors without. With layer-wise
    decay it gives two a rate, and they share a label.
    """
    groups: dict[tuple[int, bool, float], list[Any]] = {}
    for name, parameter in model.named_parameters():
        rule = table.rule_of.get(name)
        parameter.requires_grad_(rule is not None)
        if rule is not None:
            decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and not NO_DECAY.search(name.lower())
            groups.setdefault((rule, decays, table.rates[name]), []).append(parameter)
    made, labels = [], []
    for (rule, decays, peak), parameters in sorted(groups.items(), key=lambda group: group[0]):
        own = rules[rule].weight_decay
        decay = (weight_decay if own is None else own) if decays else 0.0
        made.append({"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay})
        labels.append(rules[rule].modules + ("" if decays else " (no decay)"))
    return made, labels
